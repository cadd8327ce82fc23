"""The attention of one pass of a BigBird model: full over the cache, or over the blocks of a plan.

Alphabet: B batch, T query tokens, S key tokens, H heads, D head size, N block size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from alula import ops
from alula.block_plan import BlockPlan, batch_plans
from alula.config import BigBirdConfig
from alula.models.blocks import BlockShape, attention_op, attention_probabilities

__all__ = ["FullAttention", "SparseAttention", "default_plans"]

block_sparse_op = torch.ops.alula.block_sparse_attention.default


class FullAttention:
    """Attention over all keys of the cache, or over those before each query.

    Args:
        shape: of the blocks.
        visible: int32 [B, T], the last slot that each query sees; when not ``causal`` any slot, as it sees them all.
        padding: the same of padding queries alone, -1 for tokens; None where there is no padding. They have a call of
            their own, so that tokens give the same bits whatever padding is beside them.
        lengths: int32 [B], tokens stored in each row.
        real: bool [B, S], which columns of the batch are tokens; None: all of them.
        mask: as :func:`alula.ops.attention` takes it. head_masks: per block float32 [H].
    """

    def __init__(
        self,
        shape: BlockShape,
        visible: Tensor,
        padding: Tensor | None,
        lengths: Tensor,
        real: Tensor | None,
        mask: Tensor | None,
        head_masks: Sequence[Tensor] | None,
        causal: bool,
    ) -> None:
        self._visible, self._padding, self._lengths, self._real = visible, padding, lengths, real
        self._tokens = visible if padding is None else visible.masked_fill(padding >= 0, -1)
        self._scales, self._mask, self._head_masks, self._causal = shape.scales, mask, head_masks, causal

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [B, T, H, D], kv [B, H, S, 2*D] -> [B, T, H*D]."""
        lengths, mask, scale, causal = self._lengths, self._mask, self._scales[layer], self._causal
        head_mask = None if self._head_masks is None else self._head_masks[layer]
        y = attention_op(q, kv, self._tokens, lengths, mask, head_mask, scale, causal)
        if self._padding is not None:
            y += attention_op(q, kv, self._padding, lengths, mask, head_mask, scale, causal)
        return y

    def probabilities(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """[B, H, T, S], zeros in padding columns."""
        return attention_probabilities(
            q,
            kv,
            self._visible,
            self._lengths,
            scale=self._scales[layer],
            causal=self._causal,
            mask=self._mask,
            head_mask=None if self._head_masks is None else self._head_masks[layer],
            real_columns=self._real,
        )


class SparseAttention:
    """Attention over the blocks that a plan lists. Keys and values lie in their columns, padding included.

    Args:
        shape: of the blocks.
        plans: a plan for every block of the model.
        real: bool [B, T], which columns are tokens; None: all of them. Padding is not seen, and sees nothing.
        head_masks: per block float32 [H].
        first: int32 [B], the columns in which the rows begin; the plans are then lists of B, one for each row.
    """

    def __init__(
        self,
        shape: BlockShape,
        plans: Sequence[BlockPlan] | Sequence[Sequence[BlockPlan]],
        real: Tensor | None,
        head_masks: Sequence[Tensor] | None,
        first: Tensor | None = None,
    ) -> None:
        self._shape, self._plans, self._real, self._head_masks, self._first = shape, plans, real, head_masks, first

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [B, T, H, D], kv [B, H, T, 2*D] -> [B, T, H*D]; zeros where the query is padding."""
        plan, head_dim = self._plans[layer], self._shape.head_dim
        if self._first is not None:
            plan = batch_plans(plan, q, self._first)
        head_mask = None if self._head_masks is None else self._head_masks[layer]
        starts, entries, global_tokens, schedule, num_partials = plan.on(q.device)
        return block_sparse_op(
            q,
            kv[..., :head_dim],
            kv[..., head_dim:],
            starts,
            entries,
            global_tokens,
            plan.block_size,
            self._first,
            None,
            self._real,
            head_mask,
            self._shape.scales[layer],
            plan.is_causal,
            schedule,
            num_partials,
        )

    def probabilities(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """[B, H, T, T], those of one copy where a block counts more than once; zeros for padding."""
        probabilities = ops.block_sparse_probabilities(
            q,
            kv[..., : self._shape.head_dim],
            self._plans[layer],
            first=self._first,
            mask=self._real,
            scale=self._shape.scales[layer],
        )
        if self._head_masks is not None:
            probabilities *= self._head_masks[layer].view(-1, 1, 1)
        return probabilities.to(q.dtype)


def default_plans(config: BigBirdConfig, tokens: int, *, is_training: bool) -> list[BlockPlan]:
    """A plan for every block of a model: transformers' in evaluation and in training; all pairs for so few tokens that
    it attends to all.

    A decoder's is causal, which transformers' is not: each query sees the first block, the one before its own and its
    own, up to itself; the first block counts as often as in an encoder. Nothing in it depends on where the text ends.
    ValueError for block sizes that the kernels do not have.
    """
    size, num_random, layers = config.block_size, config.num_random_blocks, config.num_hidden_layers
    if tokens <= config.max_full_tokens:
        blocks = -(-tokens // size)
        return [BlockPlan.pattern(tokens, size, global_blocks=range(blocks), is_causal=config.is_decoder)] * layers
    if config.is_decoder:
        return [_causal_plan(-(-tokens // size), size, num_random)] * layers
    if not is_training:
        return [BlockPlan.evaluation(tokens, size, num_random)] * layers
    return [
        BlockPlan.training(
            tokens,
            size,
            num_random,
            num_heads=config.num_attention_heads,
            layer_idx=layer,
            max_position_embeddings=config.max_position_embeddings,
        )
        for layer in range(layers)
    ]


@functools.lru_cache(64)
def _causal_plan(num_blocks: int, block_size: int, num_random: int) -> BlockPlan:
    rows = (
        [0] * (1 + num_random if row else 1) + [block for block in (row - 1, row) if block > 0]
        for row in range(num_blocks)
    )
    return BlockPlan.from_lists(list(rows), block_size, is_causal=True)
