"""CodeGen: rotary positions, attention and MLP side by side in one block.

The arguments and outputs are Hugging Face's. ``past_key_values`` is a :class:`alula.cache.KVCache`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.config import CodeGenConfig
from alula.generation import GenerationMixin
from alula.models.blocks import (
    BlockObserver,
    BlockShape,
    ParallelBlockWeights,
    bind_parallel_block,
    run_parallel_blocks,
)
from alula.models.cross_attention import CrossAttention
from alula.models.decoder import DecoderModel, DecoderPreTrainedModel, DecoderWithHead
from alula.models.heads import LMHead, causal_lm_loss, normed_linear, select_positions
from alula.models.inputs import whole_or_nothing
from alula.models.layers import Embedding, LayerNorm, Linear, Module, ModuleList
from alula.ops import ACTIVATIONS, rotary_table
from alula.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

__all__ = ["CodeGenForCausalLM", "CodeGenModel", "CodeGenPreTrainedModel"]


class ShardedQKV(Linear):
    """Query, key and value projections without bias, stored as [q | k | v].

    The checkpoint has them in shards, each with its heads' rows in the order query, value, key.
    """

    def __init__(self, width: int, num_shards: int, dtype: torch.dtype) -> None:
        super().__init__(width, 3 * width, dtype, bias=False)
        self.num_shards = num_shards

    def _from_checkpoint(self, value: Tensor) -> Tensor:
        query, value, key = value.unflatten(0, (self.num_shards, 3, -1)).unbind(1)
        return torch.cat([part.flatten(0, 1) for part in (query, key, value)])

    def _to_checkpoint(self, value: Tensor) -> Tensor:
        query, key, value = value.unflatten(0, (3, self.num_shards, -1)).unbind(0)
        return torch.stack([query, value, key], 1).flatten(0, 2)


class CodeGenAttention(Module):
    def __init__(self, config: CodeGenConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv_proj = ShardedQKV(config.n_embd, config.num_shards, dtype)
        self.out_proj = Linear(config.n_embd, config.n_embd, dtype, bias=False)


class CodeGenMLP(Module):
    def __init__(self, config: CodeGenConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc_in = Linear(config.n_embd, config.intermediate_size, dtype)
        self.fc_out = Linear(config.intermediate_size, config.n_embd, dtype)


class CodeGenBlock(Module):
    """``x + attn(ln_1(x)) + mlp(ln_1(x))``; :func:`alula.models.blocks.run_parallel_blocks` runs it."""

    def __init__(self, config: CodeGenConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        self.attn = CodeGenAttention(config, dtype)
        self.mlp = CodeGenMLP(config, dtype)

    def merged_layers(self) -> list[tuple[int, tuple[Linear, ...]]]:
        """Matrices that are stored as one, below (0) or beside (1) each other."""
        attn, mlp = self.attn, self.mlp
        return [(0, (attn.qkv_proj, mlp.fc_in)), (1, (attn.out_proj, mlp.fc_out))]

    def bind(self) -> ParallelBlockWeights:
        attn, mlp = self.attn, self.mlp
        return bind_parallel_block(self.ln_1, attn.qkv_proj, mlp.fc_in, attn.out_proj, mlp.fc_out)


class CodeGenPreTrainedModel(DecoderPreTrainedModel):
    """What the classes share: configuration, old buffers."""

    config: CodeGenConfig
    config_class = CodeGenConfig
    ignored_tensors: ClassVar[re.Pattern[str]] = re.compile(
        r"h\.\d+\.attn\.(causal_mask|bias|masked_bias|embed_positions)"
    )


class CodeGenModel(DecoderModel, CodeGenPreTrainedModel):
    """The blocks without a head.

    Args:
        config: its sizes.
        dtype: of the weights and activations, default float32.
        init_weights: False leaves the weights without values, to be loaded.
    """

    def __init__(self, config: CodeGenConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        dtype = dtype or torch.float32
        super().__init__(config)
        self.wte = Embedding(config.vocab_size, config.n_embd, dtype)
        self.h = ModuleList([CodeGenBlock(config, dtype) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, dtype)
        self._rotary_table = rotary_table(config.n_positions, config.rotary_dim)
        if init_weights:
            self.init_weights()

    def block_shape(self) -> BlockShape:
        config = self.config
        return BlockShape(
            num_heads=config.n_head,
            num_kv_heads=config.n_head,
            head_dim=config.head_dim,
            width=config.n_embd,
            mlp_width=config.intermediate_size,
            scales=(config.head_dim**-0.5,) * config.n_layer,
            norm_eps=config.layer_norm_epsilon,
            activation=ACTIVATIONS[config.activation_function],
        )

    def _run_blocks(
        self,
        x: Tensor,
        cache: KVCache,
        positions: Tensor,
        lengths: Tensor,
        padding_positions: Tensor | None,
        mask: Tensor | None,
        head_masks: Sequence[Tensor] | None,
        causal: bool,
        observe: BlockObserver | None,
        cross: CrossAttention | None,
        position_ids: Tensor,
        tokens_to_keep: int = 0,
    ) -> Tensor:
        return run_parallel_blocks(
            self._bound.blocks,
            self._shape,
            x,
            cache.layers,
            positions,
            lengths,
            padding_positions,
            mask,
            head_masks,
            causal,
            observe,
            self._rotary_table,
            position_ids.to(torch.int32).expand(positions.shape).contiguous(),
            tokens_to_keep,
        )

    def _full_mask(self, mask: Tensor, batch: int, tokens: int, columns: int, cache: KVCache) -> Tensor:
        full = super()._full_mask(mask, batch, tokens, columns, cache)
        if full.dtype == torch.bool:
            return full
        return full.float() * self._shape.scales[0]  # transformers adds it before it divides by sqrt(D)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        head_mask: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """One pass over new tokens.

        Args:
            input_ids: int64 [B, T], or ``inputs_embeds`` [B, T, E] in the model's dtype in their place.
            past_key_values: the cache of earlier passes; it is extended in place and returned.
            attention_mask: [B, T] or [B, past + T], nonzero = token, 0 = padding (left, right or holes); or
                [B, T|1, S] / [B|1, H|1, T|1, S], bool (True = visible) or floating point (added to the scores before
                they are divided by sqrt(D)), which stands for the causal limit too. A padding token stores
                nothing and, unless it comes alone, sees the tokens before it; where a query sees no key its attention
                is zeros.
            token_type_ids: int64 [B, T], embedded with ``wte`` and added.
            position_ids: int64 [B, T] or [1, T], each below ``n_positions``; default: the column, counted from the
                start of the cache, with no correction for padding. They turn queries and keys and never choose what a
                query sees.
            head_mask: [H] or [L, H]; multiplies the attention probabilities.
            use_cache: return a cache (default: the configuration's).
            output_attentions: also the probabilities, L of [B, H, T, S]. output_hidden_states: also the input of every
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
        )
        last = self.ln_f(run.hidden)
        hidden_states = (*run.hidden_states, last) if with_hidden else None
        output = BaseModelOutputWithPast(last, run.cache, hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class CodeGenForCausalLM(GenerationMixin, DecoderWithHead, CodeGenPreTrainedModel):
    """Language model: logits over the vocabulary, with a bias, and weights of their own unless
    ``tie_word_embeddings``."""

    model_class = CodeGenModel

    def __init__(self, config: CodeGenConfig, *, dtype: torch.dtype | None = None, init_weights: bool = True) -> None:
        super().__init__(config, dtype)
        tied_to = self.transformer.wte if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.n_embd, config.vocab_size, self.dtype, tied_to, bias=True)
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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        head_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As :meth:`CodeGenModel.forward`, with logits [B, T', V].

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
        output = CausalLMOutputWithPast(loss, logits, run.cache, run.hidden_states, run.attentions)
        return output if self._wants("return_dict", return_dict) else output.to_tuple()
