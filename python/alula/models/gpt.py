"""What GPT-2 and GPTBigCode share: sequential blocks, learned positions, cross-attention, and the heads both have.

The arguments and outputs are Hugging Face's. ``past_key_values`` is a :class:`alula.cache.KVCache`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.config import GPT2Config, GPTBigCodeConfig
from alula.generation import GenerationMixin
from alula.models.blocks import BlockShape, BlockWeights, bind
from alula.models.cross_attention import CrossWeights
from alula.models.decoder import DecoderModel, DecoderWithHead
from alula.models.heads import (
    LMHead,
    causal_lm_loss,
    last_token_indices,
    normed_linear,
    select_positions,
    sequence_classification_loss,
    token_classification_loss,
)
from alula.models.inputs import require_tensors, whole_or_nothing
from alula.models.layers import Embedding, LayerNorm, Linear, Module, ModuleList, PositionTable
from alula.ops import ACTIVATIONS
from alula.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

__all__ = ["GPTForCausalLM", "GPTForSequenceClassification", "GPTForTokenClassification", "GPTModel"]

GPTConfig = GPTBigCodeConfig | GPT2Config


class GPTAttention(Module):
    def __init__(self, qkv: Linear, out: Linear) -> None:
        super().__init__()
        self.c_attn = qkv
        self.c_proj = out


class GPTCrossAttention(Module):
    """``c_attn`` makes keys and values (in this order) of the encoder's states, ``q_attn`` the query."""

    def __init__(self, width: int, dense: type[Linear], dtype: torch.dtype) -> None:
        super().__init__()
        self.c_attn = dense(width, 2 * width, dtype)
        self.q_attn = dense(width, width, dtype)
        self.c_proj = dense(width, width, dtype)


class GPTMLP(Module):
    def __init__(self, width: int, inner: int, dense: type[Linear], dtype: torch.dtype) -> None:
        super().__init__()
        self.c_fc = dense(width, inner, dtype)
        self.c_proj = dense(inner, width, dtype)


class GPTBlock(Module):
    """``x + attn(ln_1(x))``, with an encoder ``x + crossattention(ln_cross_attn(x))``, then ``x + mlp(ln_2(x))``;
    :func:`alula.models.blocks.run_blocks` runs it."""

    def __init__(self, config: GPTConfig, qkv: Linear, dense: type[Linear], dtype: torch.dtype) -> None:
        super().__init__()
        width, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(width, eps, dtype)
        self.attn = GPTAttention(qkv, dense(width, width, dtype))
        self.ln_2 = LayerNorm(width, eps, dtype)
        if config.add_cross_attention:
            self.crossattention = GPTCrossAttention(width, dense, dtype)
            self.ln_cross_attn = LayerNorm(width, eps, dtype)
        self.mlp = GPTMLP(width, config.intermediate_size, dense, dtype)

    def bind(self) -> BlockWeights:
        attn, mlp = self.attn, self.mlp
        return BlockWeights(*bind(self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj))

    def bind_cross(self) -> CrossWeights:
        cross = self.crossattention
        return CrossWeights(*bind(self.ln_cross_attn, cross.q_attn, cross.c_attn, cross.c_proj))


class GPTModel(DecoderModel):
    """The blocks without a head.

    Args:
        config: its sizes.
        dtype: of the weights and activations, default float32.
        init_weights: False leaves the weights without values, to be loaded.

    Subclasses set ``dense``, the class of their matrices, and say :meth:`make_qkv`.
    """

    dense: ClassVar[type[Linear]] = Linear

    def __init__(self, config: GPTConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        dtype = dtype or torch.float32
        super().__init__(config)
        self.wte = Embedding(config.vocab_size, config.n_embd, dtype)
        self.wpe = PositionTable(config.n_positions, config.n_embd, dtype)
        blocks = [GPTBlock(config, self.make_qkv(config, dtype), self.dense, dtype) for _ in range(config.n_layer)]
        self.h = ModuleList(blocks)
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        if init_weights:
            self.init_weights()

    def make_qkv(self, config: GPTConfig, dtype: torch.dtype) -> Linear:
        """The module of a block's query, key and value projections, stored as [q | k | v]."""
        return self.dense(config.n_embd, 3 * config.n_embd, dtype)

    def block_shape(self) -> BlockShape:
        config = self.config
        scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        by_layer = getattr(config, "scale_attn_by_inverse_layer_idx", False)
        return BlockShape(
            num_heads=config.n_head,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            width=config.n_embd,
            mlp_width=config.intermediate_size,
            scales=tuple(scale / (layer + 1 if by_layer else 1) for layer in range(config.n_layer)),
            norm_eps=config.layer_norm_epsilon,
            activation=ACTIVATIONS[config.activation_function],
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """One pass over new tokens.

        Args:
            input_ids: int64 [B, T], or ``inputs_embeds`` [B, T, E] in the model's dtype in their place.
            past_key_values: the cache of earlier passes; it is extended in place and returned.
            attention_mask: [B, T] or [B, past + T], nonzero = token, 0 = padding (left, right or holes); or
                [B, T|1, S] / [B|1, H|1, T|1, S], bool (True = visible) or floating point (added), which stands for
                the causal limit too. A padding token stores nothing and, unless it comes alone, sees the tokens
                before it; where a query sees no key its attention is zeros.
            token_type_ids: int64 [B, T], embedded with ``wte`` and added.
            position_ids: int64 [B, T] or [1, T]; default: the column, counted from the start of the cache, with no
                correction for padding. They choose rows of ``wpe`` and never what a query sees.
            encoder_hidden_states: [B, S, E] in the model's dtype, for a model with ``add_cross_attention``. Their keys
                and values are made once and kept in the cache; later passes with that cache may leave them out, and
                what they are given changes nothing.
            encoder_attention_mask: [B, S], nonzero = token, or a mask as above over the encoder's columns.
            head_mask: [H] or [L, H]; multiplies the attention probabilities, those of cross-attention too.
            use_cache: return a cache (default: the configuration's).
            output_attentions: also the probabilities, L of [B, H, T, S] (and of
                cross-attention). output_hidden_states: also the input of every
                block and the normed output, L + 1 of [B, T, E]. return_dict: False for a plain tuple.

        Raises ValueError for inputs that do not fit and RuntimeError where gradients are asked for.
        """
        with_hidden = self._wants("output_hidden_states", output_hidden_states)
        run = self.run(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            head_mask,
            use_cache,
            self._wants("output_attentions", output_attentions),
            with_hidden,
            encoder_hidden_states,
            encoder_attention_mask,
        )
        last = self.ln_f(run.hidden)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last,
            past_key_values=run.cache,
            hidden_states=(*run.hidden_states, last) if with_hidden else None,
            attentions=run.attentions,
            cross_attentions=run.cross_attentions,
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class GPTForCausalLM(GenerationMixin, DecoderWithHead):
    """Language model: logits over the vocabulary, from the embedding table where ``tie_word_embeddings``."""

    def __init__(self, config: GPTConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        tied_to = self.transformer.wte if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.n_embd, config.vocab_size, self.dtype, tied_to)
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
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """As :meth:`GPTModel.forward`, with logits [B, T', V].

        Args:
            labels: int64, the shape of the ids: each position's logits are scored against the next label, -100 left
                out. ``shift_labels`` are scored unshifted.
            logits_to_keep: 0 for logits of all positions, n for the last n only, or a tensor of positions.
            num_items_in_batch: divides the loss in place of the number of labels.
        """
        run = self._run(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            head_mask,
            use_cache,
            encoder_hidden_states,
            encoder_attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )
        hidden = run.hidden
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            hidden = select_positions(hidden, logits_to_keep)
        logits = normed_linear(hidden, self.transformer.final_norm(), self.lm_head)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithCrossAttentions(
            loss, logits, run.cache, run.hidden_states, run.attentions, run.cross_attentions
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class GPTForSequenceClassification(DecoderWithHead):
    """``score`` [num_labels, E] at the last token that is not ``pad_token_id``."""

    optional_weights = ("score.",)

    def __init__(self, config: GPTConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        self.num_labels = config.num_labels
        self.score = Linear(config.n_embd, config.num_labels, self.dtype, bias=False)
        if init_weights:
            self.init_weights()

    @whole_or_nothing
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """As :meth:`GPTModel.forward`, with logits [B, num_labels].

        ``labels``: what ``config.problem_type`` asks for, see
        :func:`alula.models.heads.sequence_classification_loss`. More than one sequence needs ``config.pad_token_id``.
        """
        require_tensors(input_ids=input_ids, inputs_embeds=inputs_embeds)
        given = input_ids if inputs_embeds is None else inputs_embeds
        last = None
        if given is not None and given.dim() >= 2 and given.numel():
            last = last_token_indices(input_ids, given.shape[0], given.shape[1], self.config.pad_token_id, given.device)
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
        pooled = run.hidden[torch.arange(run.hidden.shape[0]), last]
        logits = normed_linear(pooled, self.transformer.final_norm(), self.score)
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutputWithPast(loss, logits, run.cache, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class GPTForTokenClassification(DecoderWithHead):
    """``classifier`` [num_labels, E] with bias, at every token."""

    optional_weights = ("classifier.",)

    def __init__(self, config: GPTConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        self.num_labels = config.num_labels
        self.classifier = Linear(config.n_embd, config.num_labels, self.dtype)
        if init_weights:
            self.init_weights()

    @whole_or_nothing
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """As :meth:`GPTModel.forward`, with logits [B, T, num_labels]. ``labels``: int64 [B, T], -100: none."""
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
        logits = normed_linear(run.hidden, self.transformer.final_norm(), self.classifier)
        loss = None if labels is None else token_classification_loss(logits, labels)
        output = TokenClassifierOutput(loss, logits, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()
