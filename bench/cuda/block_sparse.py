"""Cases of block-sparse attention on a GPU: BigBird's five blocks a row, and eight random ones more for each head.

Peers, made once they are needed, since compiling takes long: flex_attention, compiled, with the same blocks as its mask
(which cannot count, so every block counts once); and dense attention over all keys, which means something else and is
there to show what the blocks save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from alula import BlockPlan, ops
from torch import Tensor

from .timing import Bench, Case

HEADS, DIM, BLOCK, RANDOM_BLOCKS = 12, 64, 64, 8  # of BigBird base
TILES = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK}  # of flex_attention: its own on H100, 128 x 128, do not divide the blocks

SHAPES = [(1, 4096, 0), (1, 4096, RANDOM_BLOCKS), (8, 4096, 0), (1, 16384, 0)]  # batch, tokens, random blocks


def cases(bench: Bench) -> list[Case]:
    """T tokens, bf16; a case for each of SHAPES."""
    return [_case(bench, *shape) for shape in bench.choose(SHAPES, [(1, 512, 0)])]


def _case(bench: Bench, batch: int, tokens: int, num_random: int) -> Case:
    plan = BlockPlan.pattern(tokens, BLOCK, num_random_blocks=num_random, num_heads=HEADS if num_random else 1)
    pairs = len(plan.entries) * HEADS // plan.num_heads * BLOCK * BLOCK
    copies = 2
    queries = [bench.rand(batch, tokens, HEADS, DIM) for _ in range(copies)]
    caches = [bench.rand(batch, HEADS, tokens, 2 * DIM) for _ in range(copies)]
    # As a caller of the peers has them: apart, heads first.
    apart = [
        (q.transpose(1, 2).contiguous(), *(part.contiguous() for part in kv.split(DIM, dim=-1)))
        for q, kv in zip(queries, caches, strict=True)
    ]

    def alula(i: int) -> Tensor:
        k, v = caches[i].split(DIM, dim=-1)
        return ops.block_sparse_attention(queries[i], k, v, plan)

    def flex(i: int) -> Tensor:
        call, mask = _compiled(bench, plan)
        return call(*apart[i], block_mask=mask, kernel_options=TILES).transpose(1, 2).flatten(2)

    def dense(i: int) -> Tensor:
        return F.scaled_dot_product_attention(*apart[i]).transpose(1, 2).flatten(2)

    blocks = f"5 + {num_random}" if num_random else "5"
    name = f"block_sparse_attention {blocks} blocks B{batch} H{HEADS} D{DIM} T{tokens} bf16"
    contestants = {"alula": alula, "torch flex": flex, "torch dense sdpa": dense}
    return Case(name, contestants, copies, flops=4.0 * batch * pairs * DIM)


@functools.cache
def _compiled(bench: Bench, plan: Any) -> tuple[Callable[..., Tensor], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    listed = torch.from_numpy(plan.block_counts() > 0).to(bench.device)
    is_shared, last, tokens = plan.num_heads == 1, plan.num_blocks - 1, plan.num_blocks * BLOCK

    def is_near_or_global(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The pattern without random blocks, computed: no table to look it up in."""
        i, j = query // BLOCK, key // BLOCK
        return (i == 0) | (i == last) | (j == 0) | (j == last) | ((i - j).abs() <= 1)

    def is_listed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return listed[head, query // BLOCK, key // BLOCK]

    mask = create_block_mask(
        is_near_or_global if is_shared else is_listed,
        None,
        None if is_shared else HEADS,
        tokens,
        tokens,
        device=bench.device.type,
        BLOCK_SIZE=BLOCK,
    )
    return bench.compiled(flex_attention, dynamic=False), mask
