"""block_sparse_attention: patterns of every kind, padding, hostile data, against fp64 and against dense attention."""

from typing import Any, NamedTuple

import pytest
import torch
from alula import BlockPlan, ops
from alula.testing import reference
from alula.testing.compare import assert_close
from torch import Tensor

BLOCK_SIZES = [16, 32, 64, 128]


class Case(NamedTuple):
    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, G, S, D], a view of a merged cache; NaN in slots that hold nothing
    v: Tensor
    plan: BlockPlan | list[BlockPlan]

    def run(self, **options: Any) -> Tensor:
        return ops.block_sparse_attention(*self, **options)


def make(
    plan: BlockPlan, tokens: int, dtype: torch.dtype, heads: int = 3, kv_heads: int = 3, head_dim: int = 16
) -> Case:
    kv_cache = torch.randn(2, kv_heads, tokens + 5, 2 * head_dim).to(dtype)
    kv_cache[:, :, tokens:] = torch.nan
    return Case(torch.randn(2, tokens, heads, head_dim).to(dtype), *kv_cache.split(head_dim, dim=-1), plan)


def check(case: Case, **options: Any) -> Tensor:
    actual = case.run(**options)
    expected = reference.block_sparse_attention(*case, **options)
    assert actual.dtype == case.q.dtype
    assert actual.is_contiguous()
    budget = reference.same_dtype(reference.block_sparse_attention, *case, **options)
    assert_close(actual, expected, budget_from=budget)
    return actual


def evaluation(num_blocks: int, block_size: int, num_random: int = 3) -> BlockPlan:
    return BlockPlan.evaluation(num_blocks * block_size, block_size, num_random)


# Number of tokens short of whole blocks.
@pytest.mark.parametrize("short", [0, 1, 15])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("num_blocks", [4, 7])
def test_evaluation_pattern(num_blocks: int, block_size: int, short: int, dtype: torch.dtype, isa: str) -> None:
    check(make(evaluation(num_blocks, block_size), num_blocks * block_size - short, dtype))


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 72, 80, 128, 248, 256])
def test_head_sizes(head_dim: int, dtype: torch.dtype, isa: str) -> None:
    check(make(evaluation(6, 32), 170, dtype, head_dim=head_dim))


def test_opcheck(dtype: torch.dtype) -> None:
    case = make(BlockPlan.pattern(70, 16, global_tokens=(20,)), 70, dtype)
    mask = torch.rand(2, 70) < 0.8
    first, lengths = torch.tensor([0, 3]).int(), torch.tensor([70, 60]).int()
    for options in ((None, None, None, None), (first, lengths, mask, torch.rand(3))):
        arguments = (*case[:3], *case.plan.tensors, 16, *options, 0.25, False)
        torch.library.opcheck(torch.ops.alula.block_sparse_attention, arguments)
