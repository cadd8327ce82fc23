"""Cross-attention: the decoder's tokens look at the states of an encoder (GPT-2, multi-head GPTBigCode).

Keys and values of the encoder are made once, without its padding, and kept in the cache; a pass then costs three more
calls a layer: query (normed), attention, output (+ residual).

Alphabet: B batch, T query tokens, S encoder columns, H heads, D head size, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alula.cache import CrossKeyValues
from alula.models.blocks import BlockShape, attention_op, attention_probabilities, product
from alula.ops import PackedWeight

__all__ = ["CrossAttention", "CrossWeights", "make_cross_key_values"]


class CrossWeights(NamedTuple):
    """The tensors of one block's cross-attention."""

    norm_weight: Tensor  # [E]
    norm_bias: Tensor
    query_weight: PackedWeight  # [E, E]
    query_bias: Tensor
    key_value_weight: PackedWeight  # [2 E, E], keys first
    key_value_bias: Tensor
    out_weight: PackedWeight  # [E, E]
    out_bias: Tensor


def make_cross_key_values(
    blocks: Sequence[CrossWeights], shape: BlockShape, states: Tensor, real: Tensor | None
) -> CrossKeyValues:
    """Keys and values of encoder states [B, S, E] for every block; ``real`` bool [B, S] is false at padding."""
    batch, columns, width = states.shape
    lengths = torch.full((batch,), columns, dtype=torch.int32, device=states.device)
    if real is not None and bool(real.all()):
        real = None
    if real is not None:  # tokens to the front of each row, in their order
        lengths = real.sum(1, dtype=torch.int32)
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(lengths.max()))]
        states = states.gather(1, order.unsqueeze(2).expand(-1, -1, width))
    layers = []
    with torch.inference_mode(False), torch.no_grad():
        states = states.clone() if states.is_inference() else states
        for block in blocks:
            merged = product(states, block.key_value_weight, block.key_value_bias)
            heads = merged.view(batch, -1, 2, shape.num_heads, shape.head_dim).permute(0, 3, 1, 2, 4)
            layers.append(heads.flatten(3).contiguous())
        return CrossKeyValues(layers, lengths.clone(), None if real is None else real.clone())


class CrossAttention:
    """The cross-attention of one pass: what :func:`alula.models.blocks.run_blocks` calls in every block.

    Args:
        positions: int32 [B, T], negative at padding queries: they have a call of their own, so that tokens give the
            same bits whatever padding is beside them.
        mask: as :func:`alula.ops.attention` takes it, over the encoder's columns. head_masks: per block float32 [H].
        probabilities: a list to collect every block's [B, H, T, S] in, or None.
        may_pad: whether positions may be negative; where not, nothing is asked of the device.
    """

    def __init__(
        self,
        blocks: Sequence[CrossWeights],
        shape: BlockShape,
        encoded: CrossKeyValues,
        positions: Tensor,
        mask: Tensor | None,
        head_masks: Sequence[Tensor] | None,
        probabilities: list[Tensor] | None,
        may_pad: bool = True,
    ) -> None:
        self._blocks, self._shape, self._encoded = blocks, shape, encoded
        self._mask, self._head_masks, self._probabilities = mask, head_masks, probabilities
        self._all = torch.zeros_like(positions)
        self._tokens, self._padding = self._all, None
        if may_pad and bool((positions < 0).any()):
            self._tokens = self._all.masked_fill(positions < 0, -1)
            self._padding = self._all.masked_fill(positions >= 0, -1)
        self._query_shape = (*positions.shape, shape.num_heads, shape.head_dim)

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """x + cross-attention of the normed x, [B, T, E]."""
        norm_w, norm_b, query_w, query_b, _, _, out_w, out_b = self._blocks[layer]
        shape, kv, lengths = self._shape, self._encoded.layers[layer], self._encoded.lengths
        scale = shape.scales[layer]
        head_mask = None if self._head_masks is None else self._head_masks[layer]
        q = product(x, query_w, query_b, norm_w, norm_b, shape.norm_eps).view(self._query_shape)
        if self._probabilities is not None:
            self._probabilities.append(
                attention_probabilities(
                    q,
                    kv,
                    self._all,
                    lengths,
                    scale=scale,
                    causal=False,
                    mask=self._mask,
                    head_mask=head_mask,
                    real_columns=self._encoded.real,
                )
            )
        y = attention_op(q, kv, self._tokens, lengths, self._mask, head_mask, scale, False)
        if self._padding is not None:
            y += attention_op(q, kv, self._padding, lengths, self._mask, head_mask, scale, False)
        return product(y, out_w, out_b, residual=x)
