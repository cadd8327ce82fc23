"""The forward pass that stands in for transformers' BigBirdModel on one instance.

Embeddings, pooling and outputs are transformers'; the blocks between run as in alula's own class, with block-sparse
attention where transformers would use it. As in transformers, a model whose input was once too short for blocks stays
with full attention from then on.

Alphabet: B batch, T new tokens, S columns (past and new), H heads, D head size, E model width, N block size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import logging

from alula.integrations.transformers import versions
from alula.integrations.transformers.cache import adopt, decoder_cache
from alula.integrations.transformers.decoder import Pass, advance, past_of, prepare
from alula.integrations.transformers.state import StackState, head_masks, selected, tells_of_cross_attention, wanted
from alula.models.big_bird_attention import FullAttention, SparseAttention, default_plans
from alula.models.big_bird_blocks import run_post_norm_blocks

__all__ = ["BigBirdState"]

logger = logging.get_logger("alula.integrations.transformers")
_IS_5 = versions.number(versions.VERSION) >= (5, 0)
_MASKS_DECODERS = versions.masks_big_bird_decoders()


class BigBirdState(StackState):
    """An accelerated BigBirdModel."""

    acted_on = frozenset(
        (
            *versions.FORWARD,
            "head_mask",
            "encoder_hidden_states",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "cache_position",
        )
    )

    def why_plain(self, module: nn.Module, given: dict[str, Any]) -> str | None:
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if given.get("encoder_hidden_states") is not None:
            return "cross-attention (encoder_hidden_states)"
        ids = given.get("input_ids")
        tokens = (given["inputs_embeds"] if ids is None else ids).shape[1]
        if mask is not None and mask.dim() == 3:
            return "attention_mask has three dimensions"
        if self._chooses_blocks(module, tokens):
            if module.config.is_decoder:
                return "block-sparse attention of a decoder, which is not causal"
            if mask is not None and mask.dim() != 2:
                return "attention_mask of four dimensions with block-sparse attention"
            if wanted(module, given, "output_attentions"):
                return "output_attentions of block-sparse attention"
            if tokens % module.block_size and wanted(module, given, "output_hidden_states"):
                return "hidden states of an input that transformers pads to whole blocks"
        if module.config.is_decoder and not _MASKS_DECODERS:
            return f"a decoder, which transformers {versions.VERSION} runs without a causal mask"
        if cache is None:
            return None
        return self.why_not_cache(cache) if module.config.is_decoder else "past_key_values of an encoder"

    @staticmethod
    def _chooses_blocks(module: nn.Module, tokens: int) -> bool:
        config = module.config
        limit = (5 + 2 * config.num_random_blocks) * config.block_size
        return module.attention_type == "block_sparse" and tokens > limit

    def run(self, module: nn.Module, given: dict[str, Any], tracing: bool) -> Any:
        config, stack = module.config, self.stack
        input_ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        batch, tokens = (input_ids if embeds is None else embeds).shape[:2]
        attention_mask = given.get("attention_mask")
        if embeds is None and not tracing:
            module.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        is_sparse = self._chooses_blocks(module, tokens)
        if not is_sparse and module.attention_type == "block_sparse":
            logger.warning_once(
                f"{tokens} tokens are too few for block_sparse attention: this BigBird changes to original_full "
                "attention and stays with it, as it does in transformers"
            )
            module.set_attention_type("original_full")
            if not tracing:
                stack.watch(module)  # other modules around the same matrices

        cache = given.get("past_key_values")
        use_cache = config.is_decoder and not is_sparse and wanted(module, given, "use_cache")
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
            adopt(cache, len(stack.blocks))
        layers = None if cache is None else decoder_cache(cache).layers
        past = past_of(layers, given.get("cache_position"), tracing)
        x = module.embeddings(
            input_ids=input_ids,
            position_ids=given.get("position_ids"),
            token_type_ids=given.get("token_type_ids"),
            inputs_embeds=embeds,
            past_key_values_length=past,
        )
        seen = None if is_sparse else attention_mask
        run = prepare(stack, x, layers, past, seen, None, batch, tokens, tracing)
        of_heads = head_masks(given.get("head_mask"), len(stack.blocks))
        attend = self._sparse(attention_mask, tokens, of_heads) if is_sparse else self._full(run, config, of_heads)

        with_attentions = bool(wanted(module, given, "output_attentions"))
        chosen = wanted(module, given, "output_hidden_states")
        hidden, attentions = ([x] if chosen else None), ([] if with_attentions else None)
        last = run_post_norm_blocks(
            stack.blocks, stack.shape, x, run.kv, run.positions, attend, None, hidden, attentions
        )
        if layers is not None:
            advance(layers, tokens, past)
        if with_attentions:
            attentions = [F.pad(weights, (0, run.columns - weights.shape[3])) for weights in attentions]
        pooled = None if module.pooler is None else module.activation(module.pooler(last[:, 0, :]))
        return self._output(
            module,
            given,
            last,
            pooled,
            cache if use_cache or given.get("past_key_values") is not None else None,
            selected(module, tuple(hidden), chosen) if chosen else None,
            tuple(attentions) if with_attentions else None,
        )

    def _sparse(self, attention_mask: Tensor | None, tokens: int, of_heads: list[Tensor] | None) -> SparseAttention:
        plans = default_plans(self.stack.engine.config, tokens, is_training=False)
        real = None if attention_mask is None else attention_mask != 0
        if real is not None and not torch.compiler.is_compiling() and bool(real.all()):
            real = None
        return SparseAttention(self.stack.shape, plans, real, of_heads)

    def _full(self, run: Pass, config: Any, of_heads: list[Tensor] | None) -> FullAttention:
        causal = run.causal and config.is_decoder
        return FullAttention(self.stack.shape, run.positions, None, run.lengths, None, run.mask, of_heads, causal)

    def _output(
        self,
        module: nn.Module,
        given: dict[str, Any],
        last: Tensor,
        pooled: Tensor | None,
        cache: Cache | None,
        hidden_states: tuple | None,
        attentions: tuple | None,
    ) -> Any:
        cross = () if attentions is not None and tells_of_cross_attention(module) else None
        return_dict = given.get("return_dict")
        if return_dict is None:
            return_dict = getattr(module.config, "return_dict", True)
        if not return_dict and not _IS_5:  # a model without a pooler keeps its place in 4.57's tuple
            rest = (cache, hidden_states, attentions, cross)
            return (last, pooled, *(item for item in rest if item is not None))
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=pooled,
            past_key_values=cache,
            hidden_states=hidden_states,
            attentions=attentions,
            cross_attentions=cross,
        )
        return output if return_dict else output.to_tuple()
