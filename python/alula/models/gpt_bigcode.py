"""GPTBigCode: SantaCoder, StarCoder and their kin. Multi-query or multi-head attention, learned positions.

The arguments and outputs are Hugging Face's. ``past_key_values`` is a :class:`alula.cache.KVCache`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.config import GPTBigCodeConfig
from alula.generation import GenerationMixin
from alula.models.base import PreTrainedModel
from alula.models.decoder import DecoderModel, DecoderRun
from alula.models.heads import (
    LMHead,
    causal_lm_loss,
    last_token_indices,
    normed_linear,
    select_positions,
    sequence_classification_loss,
    token_classification_loss,
)
from alula.models.layers import (
    QKV,
    BlockShape,
    BlockWeights,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    PositionTable,
    bind_block,
)
from alula.models.santacoder import SantaCoderSource, is_santacoder
from alula.ops import ACTIVATIONS
from alula.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from alula.weights import TensorSource

__all__ = [
    "GPTBigCodeForCausalLM",
    "GPTBigCodeForSequenceClassification",
    "GPTBigCodeForTokenClassification",
    "GPTBigCodeModel",
    "GPTBigCodePreTrainedModel",
]


class GPTBigCodeAttention(Module):
    def __init__(self, config: GPTBigCodeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, heads, head_dim = config.n_embd, config.n_head, config.head_dim
        self.c_attn = QKV(width, heads, config.num_key_value_heads, head_dim, dtype, interleaved=not config.multi_query)
        self.c_proj = Linear(width, width, dtype)


class GPTBigCodeMLP(Module):
    def __init__(self, config: GPTBigCodeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.intermediate_size, dtype)
        self.c_proj = Linear(config.intermediate_size, config.n_embd, dtype)


class GPTBigCodeBlock(Module):
    """``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``; :func:`alula.models.layers.run_blocks` runs it."""

    def __init__(self, config: GPTBigCodeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        self.attn = GPTBigCodeAttention(config, dtype)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        self.mlp = GPTBigCodeMLP(config, dtype)

    def bind(self) -> BlockWeights:
        attn, mlp = self.attn, self.mlp
        return bind_block(self.ln_1, attn.c_attn, attn.c_proj, self.ln_2, mlp.c_fc, mlp.c_proj)


class GPTBigCodePreTrainedModel(PreTrainedModel):
    """What the four classes share: configuration, old buffers, SantaCoder's layout, initial values."""

    config: GPTBigCodeConfig
    config_class = GPTBigCodeConfig
    ignored_tensors: ClassVar[re.Pattern[str]] = re.compile(r"bias|h\.\d+\.attn\.(bias|masked_bias)")

    def checkpoint_view(self, source: TensorSource) -> TensorSource:
        return SantaCoderSource(source) if is_santacoder(source) else source

    @torch.no_grad()
    def init_weights(self, names: list[str] | None = None) -> None:
        """Normal values of ``initializer_range`` for matrices (over sqrt(2 L) for the residual projections), ones and
        zeros for layer norms, zeros for biases."""
        config = self.config
        slots = self.weight_slots()
        for name in slots if names is None else names:
            slot = slots[name]
            value = torch.zeros(slot.shape, dtype=slot.dtype)
            if isinstance(slot.module, LayerNorm):
                value += slot.name == "weight"
            elif slot.name == "weight":
                std = config.initializer_range
                value.normal_(std=std / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else std)
            slot.write(value)

    def _wants(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)


class GPTBigCodeModel(DecoderModel, GPTBigCodePreTrainedModel):
    """The blocks without a head.

    Args:
        config: its sizes.
        dtype: of the weights and activations, default float32.
        init_weights: False leaves the weights without values, to be loaded.
    """

    def __init__(
        self, config: GPTBigCodeConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True
    ) -> None:
        dtype = dtype or torch.float32
        super().__init__(config)
        self.wte = Embedding(config.vocab_size, config.n_embd, dtype)
        self.wpe = PositionTable(config.n_positions, config.n_embd, dtype)
        self.h = ModuleList([GPTBigCodeBlock(config, dtype) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        if init_weights:
            self.init_weights()

    def block_shape(self) -> BlockShape:
        config = self.config
        return BlockShape(
            num_heads=config.n_head,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            width=config.n_embd,
            mlp_width=config.intermediate_size,
            scale=config.head_dim**-0.5 if config.scale_attn_weights else 1.0,
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
                [B, T, S] / [B or 1, H or 1, T, S], bool (True = visible) or floating point (added), which stands for
                the causal limit too. A padding token stores nothing and, unless it comes alone, sees the tokens
                before it; where a query sees no key its attention is zeros.
            token_type_ids: int64 [B, T], embedded with ``wte`` and added.
            position_ids: int64 [B, T] or [1, T]; default: the column, counted from the start of the cache, with no
                correction for padding. They choose rows of ``wpe`` and never what a query sees.
            head_mask: [H] or [L, H]; multiplies the attention probabilities.
            use_cache: return a cache (default: the configuration's).
            output_attentions: also the probabilities, L of [B, H, T, S]. output_hidden_states: also the input of every
                block and the normed output, L + 1 of [B, T, E]. return_dict: False for a plain tuple.

        Raises ValueError for inputs that do not fit and RuntimeError where gradients are asked for.
        """
        _refuse_encoder(encoder_hidden_states, encoder_attention_mask)
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
        )
        last = self.ln_f(run.hidden)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last,
            past_key_values=run.cache,
            hidden_states=(*run.hidden_states, last) if with_hidden else None,
            attentions=run.attentions,
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class _GPTBigCodeWithHead(GPTBigCodePreTrainedModel):
    """A head on a :class:`GPTBigCodeModel` named ``transformer``."""

    transformer: GPTBigCodeModel

    def __init__(self, config: GPTBigCodeConfig, dtype: torch.dtype | None) -> None:
        super().__init__(config)
        self.transformer = GPTBigCodeModel(config, dtype=dtype, init_weights=False)

    def _run(self, *inputs: Any, output_attentions: bool | None, output_hidden_states: bool | None) -> DecoderRun:
        run = self.transformer.run(
            *inputs,
            self._wants("output_attentions", output_attentions),
            self._wants("output_hidden_states", output_hidden_states),
        )
        if run.hidden_states is None:
            return run
        return run._replace(hidden_states=(*run.hidden_states, self.transformer.ln_f(run.hidden)))


class GPTBigCodeForCausalLM(GenerationMixin, _GPTBigCodeWithHead):
    """Language model: logits over the vocabulary, from the embedding table where ``tie_word_embeddings``."""

    def __init__(
        self, config: GPTBigCodeConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True
    ) -> None:
        super().__init__(config, dtype)
        tied_to = self.transformer.wte if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.n_embd, config.vocab_size, self.dtype, tied_to)
        if init_weights:
            self.init_weights()

    def tied_aliases(self) -> dict[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"} if self.lm_head.is_tied else {}

    def get_output_embeddings(self) -> LMHead:
        return self.lm_head

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
        """As :meth:`GPTBigCodeModel.forward`, with logits [B, T', V].

        Args:
            labels: int64, the shape of the ids: each position's logits are scored against the next label, -100 left
                out. ``shift_labels`` are scored unshifted.
            logits_to_keep: 0 for logits of all positions, n for the last n only, or a tensor of positions.
            num_items_in_batch: divides the loss in place of the number of labels.
        """
        _refuse_encoder(encoder_hidden_states, encoder_attention_mask)
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
        hidden = run.hidden
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            hidden = select_positions(hidden, logits_to_keep)
        logits = normed_linear(hidden, self.transformer.final_norm(), self.lm_head)
        loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithCrossAttentions(loss, logits, run.cache, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class GPTBigCodeForSequenceClassification(_GPTBigCodeWithHead):
    """``score`` [num_labels, E] at the last token that is not ``pad_token_id``."""

    optional_weights = ("score.",)

    def __init__(
        self, config: GPTBigCodeConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True
    ) -> None:
        super().__init__(config, dtype)
        self.num_labels = config.num_labels
        self.score = Linear(config.n_embd, config.num_labels, self.dtype, bias=False)
        if init_weights:
            self.init_weights()

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
        """As :meth:`GPTBigCodeModel.forward`, with logits [B, num_labels].

        ``labels``: what ``config.problem_type`` asks for, see
        :func:`alula.models.heads.sequence_classification_loss`. More than one sequence needs ``config.pad_token_id``.
        """
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


class GPTBigCodeForTokenClassification(_GPTBigCodeWithHead):
    """``classifier`` [num_labels, E] with bias, at every token."""

    optional_weights = ("classifier.",)

    def __init__(
        self, config: GPTBigCodeConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True
    ) -> None:
        super().__init__(config, dtype)
        self.num_labels = config.num_labels
        self.classifier = Linear(config.n_embd, config.num_labels, self.dtype)
        if init_weights:
            self.init_weights()

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
        """As :meth:`GPTBigCodeModel.forward`, with logits [B, T, num_labels]. ``labels``: int64 [B, T], -100: none."""
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


def _refuse_encoder(encoder_hidden_states: Tensor | None, encoder_attention_mask: Tensor | None) -> None:
    if encoder_hidden_states is not None or encoder_attention_mask is not None:
        raise ValueError("encoder_hidden_states and encoder_attention_mask need cross-attention: not supported yet")
