"""Cross-attention of an accelerated GPT-2: its tokens look at the states of an encoder.

As in transformers, keys and values of the encoder are made once, kept in the cross-attention half of an
``EncoderDecoderCache``, and from then on taken from there, whatever states are given. Padding of the encoder is a mask.

Alphabet: B batch, T query tokens, S encoder columns, H heads, D head size, E model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from alula.integrations.transformers import versions
from alula.integrations.transformers.cache import GrowingLayer, adopt
from alula.integrations.transformers.packing import PackedStack
from alula.models.blocks import attention_op, attention_probabilities, product

__all__ = ["CrossPass", "why_not"]

_IS_5 = versions.number(versions.VERSION) >= (5, 0)


def why_not(stack: PackedStack, given: dict[str, Any], batch: int, use_cache: bool) -> str | None:
    """Why alula cannot run the cross-attention of this call; None if it can. May put alula's layers into the cache."""
    states, mask, cache = (
        given.get(name) for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
    )
    if stack.cross is None:
        return "cross-attention (encoder_hidden_states)"
    if states.dim() != 3 or states.shape[0] != batch:
        return "encoder_hidden_states is of another batch than the input"
    if mask is not None and mask.dim() != 2 and not (_IS_5 and mask.dim() == 4):
        return f"encoder_attention_mask has {mask.dim()} dimensions"
    if isinstance(cache, EncoderDecoderCache):
        return adopt(cache.cross_attention_cache, len(stack.blocks))
    return "cross-attention with a cache that has no place for it" if cache is not None and not use_cache else None


class CrossPass:
    """The cross-attention of one pass: what :func:`alula.models.blocks.run_blocks` calls in every block.

    Args:
        states: [B, S, E]. mask: [B, S], or [B or 1, H or 1, T or 1, S], bool (True: seen) or added to the scores.
        cache: where keys and values are, or go; None: they are not kept.
        head_masks: per block float32 [H]. probabilities: a list to collect every block's [B, H, T, S] in, or None.
    """

    def __init__(
        self,
        stack: PackedStack,
        states: Tensor,
        mask: Tensor | None,
        cache: EncoderDecoderCache | None,
        tokens: int,
        head_masks: list[Tensor] | None,
        probabilities: list[Tensor] | None,
    ) -> None:
        self._weights, self._shape = stack.cross, stack.shape
        self._head_masks, self._probabilities = head_masks, probabilities
        batch, size = states.shape[0], stack.shape.head_dim
        if cache is None:
            self._kv = [self._made(layer, states) for layer in range(len(self._weights))]
            columns: int | Tensor = states.shape[1]
        else:
            layers = cache.cross_attention_cache.layers
            for index, layer in enumerate(layers):
                if not cache.is_updated.get(index):
                    merged = self._made(index, states)
                    layer.update(merged[..., :size], merged[..., size:])
                    cache.is_updated[index] = True
            self._kv = [layer.merged for layer in layers]
            first = layers[0]
            columns = first.length if type(first) is GrowingLayer else first.cumulative_length
        if isinstance(columns, Tensor):
            self._lengths = columns.to(torch.int32).expand(batch)
            visible = self._kv[0].shape[2]
        else:
            self._lengths = torch.full((batch,), columns, dtype=torch.int32, device=states.device)
            visible = columns
        self._positions = torch.zeros((batch, tokens), dtype=torch.int32, device=states.device)
        self._mask = _mask(mask, batch, tokens, visible)
        self._query_shape = (batch, tokens, stack.shape.num_heads, size)

    def _made(self, layer: int, states: Tensor) -> Tensor:
        """Keys and values of the encoder for one block, [B, H, S, 2*D]."""
        weights, shape = self._weights[layer], self._shape
        merged = product(states, weights.key_value_weight, weights.key_value_bias)
        heads = merged.view(*states.shape[:2], 2, shape.num_heads, shape.head_dim).permute(0, 3, 1, 2, 4)
        return heads.flatten(3).contiguous()

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """x + cross-attention of the normed x, [B, T, E]."""
        weights, shape, kv = self._weights[layer], self._shape, self._kv[layer]
        scale, head_mask = shape.scales[layer], None if self._head_masks is None else self._head_masks[layer]
        q = product(
            x,
            weights.query_weight,
            weights.query_bias,
            weights.norm_weight,
            weights.norm_bias,
            shape.norm_eps,
        ).view(self._query_shape)
        if self._probabilities is not None:
            self._probabilities.append(
                attention_probabilities(
                    q,
                    kv,
                    self._positions,
                    self._lengths,
                    scale=scale,
                    causal=False,
                    mask=self._mask,
                    head_mask=head_mask,
                )
            )
        y = attention_op(q, kv, self._positions, self._lengths, self._mask, head_mask, scale, False)
        return product(y, weights.out_weight, weights.out_bias, residual=x)


def _mask(mask: Tensor | None, batch: int, tokens: int, columns: int) -> Tensor | None:
    """A mask over the encoder's columns as alula's attention takes it."""
    if mask is None:
        return None
    if mask.dim() == 4:
        return mask.expand(-1, -1, tokens, -1)
    seen = mask != 0
    if not torch.compiler.is_compiling() and bool(seen.all()) and seen.shape[1] == columns:
        return None
    return nn.functional.pad(seen, (0, columns - seen.shape[1]))[:, None, None, :].expand(batch, 1, tokens, columns)
