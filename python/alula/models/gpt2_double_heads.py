"""GPT2DoubleHeadsModel: a language model with a second head that scores choices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alula.activations import activate
from alula.cache import KVCache
from alula.config import GPT2Config
from alula.generation import GenerationMixin
from alula.models.decoder import DecoderWithHead
from alula.models.gpt2 import GPT2Model, GPT2PreTrainedModel
from alula.models.heads import LMHead, causal_lm_loss, choice_loss, normed_linear, select_positions
from alula.models.inputs import require_tensors, whole_or_nothing
from alula.models.layers import Linear, Module
from alula.outputs import GPT2DoubleHeadsModelOutput

__all__ = ["GPT2DoubleHeadsModel"]


class GPT2SequenceSummary(Module):
    """One vector of a sequence (``summary_type``), projected and activated."""

    def __init__(self, config: GPT2Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = config.summary_type
        # transformers documents "tanh" as the only activation and applies whichever is named: so do we.
        self.activation = config.summary_activation or "none"
        self.summary: Linear | None = None
        if config.summary_use_proj:
            to_labels = config.summary_proj_to_labels and config.num_labels > 0
            self.summary = Linear(config.n_embd, config.num_labels if to_labels else config.n_embd, dtype)

    def forward(self, hidden: Tensor, token_ids: Tensor | None) -> Tensor:
        """hidden [B, T, E] or [B, C, T, E], normed; token_ids int64 [B] or [B, C], each in [0, T).

        Returns [..., labels or E]. All kinds but "cls_index" pool over the second dimension, as in transformers: that
        of the choices where there are any.
        """
        if self.kind == "mean":
            pooled = hidden.float().mean(1).to(hidden.dtype)
        elif self.kind == "first":
            pooled = hidden[:, 0]
        elif self.kind == "last":
            pooled = hidden[:, -1]
        elif token_ids is None:
            pooled = hidden[..., -1, :]
        else:
            pooled = torch.take_along_dim(hidden, token_ids[..., None, None], dim=-2).squeeze(-2)
        if self.summary is not None:
            pooled = self.summary(pooled)
        return activate(pooled.float(), self.activation).to(hidden.dtype)


class GPT2DoubleHeadsModel(GenerationMixin, DecoderWithHead, GPT2PreTrainedModel):
    """``lm_head``, a language model's, and ``multiple_choice_head``, one score for each sequence.

    The inputs have a dimension of choices between batch and tokens. Making the model sets ``config.num_labels`` to 1,
    as transformers does.
    """

    model_class = GPT2Model
    optional_weights = ("multiple_choice_head.",)

    def __init__(self, config: GPT2Config, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        config.num_labels = 1
        tied_to = self.transformer.wte if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.n_embd, config.vocab_size, self.dtype, tied_to)
        self.multiple_choice_head = GPT2SequenceSummary(config, self.dtype)
        if init_weights:
            self.init_weights()

    def tied_aliases(self) -> dict[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"} if self.lm_head.is_tied else {}

    def get_output_embeddings(self) -> LMHead:
        return self.lm_head

    @whole_or_nothing
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> GPT2DoubleHeadsModelOutput | tuple[Any, ...]:
        """As :meth:`GPT2Model.forward` with one more dimension: C choices for each of B.

        Args:
            input_ids: int64 [B, C, T] (or [B, T]); so are masks of tokens, token types and positions.
            inputs_embeds: [B, C, T, E] (or [B, T, E]).
            mc_token_ids: int64 [B, C] (or [B]), the token of each sequence that ``summary_type`` "cls_index" takes;
                default: the last.
            labels: int64, the shape of the ids, scored as a language model's. mc_labels: int64 [B], each in [0, C).
            logits_to_keep: as for :class:`GPT2LMHeadModel`, for inputs without choices; the second head sees all.

        Returns logits [B, C, T, V] and mc_logits [B, C] (:class:`GPT2SequenceSummary`); hidden states (but for the
        last, [B, C, T, E]) and attentions have B * C rows, as in transformers.
        """
        require_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mc_token_ids=mc_token_ids,
            labels=labels,
        )
        given = input_ids if inputs_embeds is None else inputs_embeds
        leading: list[int] | None = None
        if given is not None and given.dim() == (3 if inputs_embeds is None else 4):
            leading = list(given.shape[:2])
            tensors = (input_ids, attention_mask, token_type_ids, position_ids)
            input_ids, attention_mask, token_type_ids, position_ids = (_without_choices(t, leading) for t in tensors)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)
        if given is not None and mc_token_ids is not None:
            _check_choice_ids(mc_token_ids, leading or [given.shape[0]], given.shape[1 if leading is None else 2])
        run = self._run(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            head_mask,
            use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        kept = select_positions(run.hidden, logits_to_keep)
        logits = normed_linear(kept, self.transformer.final_norm(), self.lm_head)
        last = self.transformer.ln_f(run.hidden)
        loss = None
        if labels is not None:
            loss = causal_lm_loss(logits, labels if leading is None else labels.flatten(0, 1))
        hidden_states = run.hidden_states
        if leading is not None:
            logits, last = logits.unflatten(0, leading), last.unflatten(0, leading)
            if hidden_states is not None:
                hidden_states = (*hidden_states[:-1], last)
        mc_logits = self.multiple_choice_head(last, mc_token_ids).squeeze(-1)
        mc_loss = None if mc_labels is None else choice_loss(mc_logits, mc_labels, "mc_labels")
        output = GPT2DoubleHeadsModelOutput(loss, mc_loss, logits, mc_logits, run.cache, hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


def _without_choices(tensor: Tensor | None, leading: list[int]) -> Tensor | None:
    """[B, C, T] as [B * C, T]; tensors of other shapes as they are, for the model to judge."""
    return tensor.flatten(0, 1) if tensor is not None and list(tensor.shape[:-1]) == leading else tensor


def _check_choice_ids(ids: Tensor, leading: list[int], tokens: int) -> None:
    if list(ids.shape) != leading or ids.dtype != torch.int64:
        raise ValueError(f"mc_token_ids has shape {list(ids.shape)} and dtype {ids.dtype}; accepted: {leading}, int64")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= tokens):
        wrong = ids[(ids < 0) | (ids >= tokens)]
        raise ValueError(f"mc_token_ids holds {int(wrong[0])}; accepted: 0 to {tokens - 1}, the tokens of a sequence")
