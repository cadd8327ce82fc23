"""What the models return: Hugging Face's output classes, read by attribute, by key or by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from alula.cache import KVCache

__all__ = [
    "BaseModelOutputWithPast",
    "BaseModelOutputWithPastAndCrossAttentions",
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "BigBirdForPreTrainingOutput",
    "BigBirdForQuestionAnsweringModelOutput",
    "CausalLMOutputWithCrossAttentions",
    "CausalLMOutputWithPast",
    "GPT2DoubleHeadsModelOutput",
    "MaskedLMOutput",
    "ModelOutput",
    "MultipleChoiceModelOutput",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutput",
    "SequenceClassifierOutputWithPast",
    "TokenClassifierOutput",
]


class ModelOutput:
    """A dataclass that is also a mapping and a tuple of those of its fields that are not None.

    ``out.logits``, ``out["logits"]`` and ``out[0]`` read it; iteration, ``keys``, ``items`` and ``in`` go over names.
    """

    __slots__ = ()

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(self.values())

    def items(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None]

    def keys(self) -> list[str]:
        return [name for name, _ in self.items()]

    def values(self) -> list[Any]:
        return [value for _, value in self.items()]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.items()).get(name, default)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            for name, value in self.items():
                if name == key:
                    return value
            raise KeyError(key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.items())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@dataclass(slots=True, eq=False)
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """``last_hidden_state`` [B, T, E]; ``hidden_states`` L + 1 of [B, T, E]; ``attentions`` L of [B, H, T, S]."""

    last_hidden_state: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """``logits`` [B, T', V] for the T' positions asked for; ``loss`` a float32 scalar if labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """``logits`` [B, num_labels]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class TokenClassifierOutput(ModelOutput):
    """``logits`` [B, T, num_labels]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """``last_hidden_state`` [B, T, E]; ``hidden_states`` L + 1 of [B, T, E]; ``attentions`` L of [B, H, T, S]."""

    last_hidden_state: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """``logits`` [B, T', V] for the T' positions asked for; ``loss`` a float32 scalar if labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class QuestionAnsweringModelOutput(ModelOutput):
    """``start_logits`` and ``end_logits`` [B, T]."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class GPT2DoubleHeadsModelOutput(ModelOutput):
    """``logits`` [B, C, T, V] and ``mc_logits`` [B, C] for C choices; a loss for each."""

    loss: Tensor | None = None
    mc_loss: Tensor | None = None
    logits: Tensor | None = None
    mc_logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """``last_hidden_state`` [B, T, E]; ``pooler_output`` [B, E]; the rest as above."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class MaskedLMOutput(ModelOutput):
    """``logits`` [B, T, V]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class SequenceClassifierOutput(ModelOutput):
    """``logits`` [B, num_labels]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class MultipleChoiceModelOutput(ModelOutput):
    """``logits`` [B, C] for C choices; hidden states and attentions of B * C rows."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class BigBirdForPreTrainingOutput(ModelOutput):
    """``prediction_logits`` [B, T, V]; ``seq_relationship_logits`` [B, 2]; ``loss`` the sum of both."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(slots=True, eq=False)
class BigBirdForQuestionAnsweringModelOutput(ModelOutput):
    """``start_logits`` and ``end_logits`` [B, T]; ``pooler_output`` [B, E] where there is a pooler."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
