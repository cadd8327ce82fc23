"""What all classes of BigBird share: how a pass ends, checkpoints, initial values.

Alphabet: B batch, T tokens, E model width.
"""

from __future__ import annotations

import re
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.config import BigBirdConfig
from alula.models.base import PreTrainedModel
from alula.models.layers import Embedding, LayerNorm
from alula.weights import RenamedSource, TensorSource

__all__ = ["BigBirdPreTrainedModel", "BigBirdRun"]


class BigBirdRun(NamedTuple):
    """One pass: the last block's output [B, T, E]; the column of each row's first token, int64 [B], or None where that
    is column 0; the cache; what was asked for."""

    hidden: Tensor
    first: Tensor | None
    cache: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    cross_attentions: tuple[Tensor, ...] | None

    def first_tokens(self) -> Tensor:
        """[B, E], the output at the first token of each row."""
        hidden = self.hidden
        if self.first is None:
            return hidden[:, 0]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), self.first]


class BigBirdPreTrainedModel(PreTrainedModel):
    """What all classes share."""

    config: BigBirdConfig
    config_class = BigBirdConfig
    base_model_prefix = "bert"
    ignored_tensors: ClassVar[re.Pattern[str]] = re.compile(r"embeddings\.(position_ids|token_type_ids)")

    def optional_prefixes(self) -> tuple[str, ...]:
        """Those of the class, the pooler, and cross-attention: a decoder gets it on top of an encoder's checkpoint."""
        cross = {name[: name.index(".crossattention.")] for name in self.weight_slots() if ".crossattention." in name}
        pooler = ("pooler.", f"{self.base_model_prefix}.pooler.")
        return (*self.optional_weights, *pooler, *sorted(f"{name}.crossattention." for name in cross))

    def checkpoint_view(self, source: TensorSource) -> TensorSource:
        """The source with ``LayerNorm.gamma`` and ``LayerNorm.beta`` under their present names."""
        old = re.compile(r"(.*\bLayerNorm\.)(gamma|beta)")
        present = {"gamma": "weight", "beta": "bias"}
        found = {name: old.fullmatch(name) for name in source.names()}
        renamed = {m[1] + present[m[2]]: name for name, m in found.items() if m}
        return RenamedSource(source, renamed) if renamed else source

    @torch.no_grad()
    def init_weights(self, names: list[str] | None = None) -> None:
        """Normal values of ``initializer_range`` for matrices and tables (zeros in the row of ``pad_token_id``), ones
        and zeros for layer norms, zeros for biases."""
        slots = self.weight_slots()
        for name in slots if names is None else names:
            slot = slots[name]
            value = torch.zeros(slot.shape, dtype=slot.dtype)
            if isinstance(slot.module, LayerNorm):
                value += slot.name == "weight"
            elif slot.name == "weight":
                value.normal_(std=self.config.initializer_range)
                pad = self.config.pad_token_id
                if isinstance(slot.module, Embedding) and pad is not None and -len(value) <= pad < len(value):
                    value[pad] = 0
            slot.write(value)

    def get_input_embeddings(self) -> Embedding:
        return self.base_model.embeddings.word_embeddings

    def _place_input_embeddings(self, embedding: Embedding) -> None:
        self.base_model.embeddings.word_embeddings = embedding

    def _wants(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)
