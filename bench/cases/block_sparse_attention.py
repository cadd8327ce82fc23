"""Cases of `block_sparse_attention`: BigBird's pattern with the five blocks a row that it has in evaluation, and with
eight random ones more, at 4096 and 16384 tokens. The peer is torch's flex_attention, compiled, with the same blocks as
its mask; as a mask cannot count, every block counts once (to alula, a count costs nothing)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from alula import BlockPlan, ops
from alula.bench.cases.case import PEAKS, Call, Case, Inputs, randn
from torch import Tensor

HEADS, DIM, BLOCK = 12, 64, 64  # BigBird base
RANDOM_BLOCKS = 8


def cases(quick: bool) -> list[Case]:
    """T tokens, H heads, D head size, N block size."""
    dtypes = (torch.float32, torch.bfloat16)
    if quick:
        return [_case(dtype, 512, 0) for dtype in dtypes]
    return [
        _case(dtype, tokens, num_random)
        for dtype in dtypes
        for tokens, num_random in ((4096, 0), (4096, RANDOM_BLOCKS), (16384, 0))
    ]


def _case(dtype: torch.dtype, tokens: int, num_random: int) -> Case:
    plan = BlockPlan.pattern(tokens, BLOCK, num_random_blocks=num_random, num_heads=HEADS if num_random else 1)
    blocks = f"5 + {num_random}" if num_random else "5"
    pairs = len(plan.entries) * HEADS // plan.num_heads * BLOCK * BLOCK  # of a query and a key

    def make(generator: torch.Generator) -> Inputs:
        return {
            "q": randn(generator, 1, tokens, HEADS, DIM, dtype=dtype),
            "kv_cache": randn(generator, 1, HEADS, tokens, 2 * DIM, dtype=dtype),
        }

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> Tensor:
        return _reference(inputs, plan, compute_dtype)

    def alula(inputs: Inputs) -> Call:
        k, v = inputs["kv_cache"].split(DIM, dim=-1)
        return lambda: ops.block_sparse_attention(inputs["q"], k, v, plan)

    def flex(inputs: Inputs) -> Call:
        return _flex_attention(inputs, plan)

    return Case(
        op="block_sparse_attention",
        name=f"{blocks} blocks a row T{tokens} H{HEADS} D{DIM} N{BLOCK}",
        dtype=dtype,
        bound=PEAKS[dtype],
        work=4 * pairs * DIM,
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch flex": flex},
    )


def _reference(inputs: Inputs, plan: BlockPlan, compute_dtype: torch.dtype) -> Tensor:
    """alula.testing.reference's formula, a block of queries at a time: the whole matrix of scores would not fit."""
    q, kv_cache = inputs["q"].to(compute_dtype), inputs["kv_cache"].to(compute_dtype)
    rows = []
    for block in range(plan.num_blocks):
        here = slice(block * BLOCK, (block + 1) * BLOCK)
        heads = []
        for head in range(HEADS):
            starts = plan.starts[head % plan.num_heads]
            listed = torch.from_numpy(plan.entries[starts[block] : starts[block + 1]].copy()).long()
            keys = (listed[:, :1] * BLOCK + torch.arange(BLOCK)).flatten()
            key, value = kv_cache[0, head, keys].split(DIM, dim=-1)
            scores = (q[0, here, head] @ key.T).to(torch.promote_types(compute_dtype, torch.float32))
            heads.append(F.softmax(scores / math.sqrt(DIM), dim=-1).to(compute_dtype) @ value)
        rows.append(torch.cat(heads, dim=-1))
    return torch.cat(rows)[None]


def _flex_attention(inputs: Inputs, plan: BlockPlan) -> Call:
    q = inputs["q"].transpose(1, 2).contiguous()
    k, v = (part.contiguous() for part in inputs["kv_cache"].split(DIM, dim=-1))
    tokens = q.shape[2]
    call, mask = _compiled(plan)

    def run() -> Tensor:
        out = call(q, k, v, block_mask=mask)
        return out.transpose(1, 2).reshape(1, tokens, HEADS * DIM)

    return run


@functools.cache
def _compiled(plan: BlockPlan) -> tuple[Callable[..., Tensor], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    listed = torch.from_numpy(plan.block_counts() > 0)
    is_shared, last, tokens = plan.num_heads == 1, plan.num_blocks - 1, plan.num_blocks * BLOCK

    def is_near_or_global(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The pattern without random blocks; flex_attention computes it faster than it looks it up."""
        i, j = query // BLOCK, key // BLOCK
        return (i == 0) | (i == last) | (j == 0) | (j == last) | ((i - j).abs() <= 1)

    def is_listed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return listed[head, query // BLOCK, key // BLOCK]

    is_seen = is_near_or_global if is_shared else is_listed
    heads = None if is_shared else HEADS
    mask = create_block_mask(is_seen, None, heads, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    return torch.compile(flex_attention, dynamic=False), mask
