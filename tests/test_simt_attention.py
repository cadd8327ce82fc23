"""The CUDA kernel of attention in the host executor: prefill, chunks, decode with keys split over blocks, masks."""

from collections.abc import Iterator

import pytest
import torch
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from simt_ops import Ops
from simt_process import ORDERS, Executor
from test_attention import Case, make, ragged
from torch import Tensor


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


@pytest.fixture
def ops(executor: Executor) -> Ops:
    return Ops(executor)


def check(ops: Ops, case: Case, *, loosen: float = 1.0, num_multiprocessors: int = 1, **options: object) -> Tensor:
    actual = ops.attention(*case, num_multiprocessors=num_multiprocessors, **options)
    clean = case._replace(q=case.q.masked_fill((case.positions < 0)[..., None, None], 0.0))
    expected = reference.attention(*clean, **options)
    budget = reference.same_dtype(reference.attention, *clean, **options)
    assert_close(actual, expected, budget_from=budget, tolerance=1e-5 * loosen)
    return actual


@pytest.mark.parametrize("shape", shapes.ATTENTION, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_against_the_reference(ops: Ops, shape: shapes.Attention, causal: bool, dtype: torch.dtype) -> None:
    check(ops, make(shape, dtype), causal=causal)


@pytest.mark.parametrize("head_dim", [*shapes.HEAD_DIMS, 40, 96, 248])
@pytest.mark.parametrize("tokens, past", [(1, 70), (7, 12)])
def test_head_sizes(ops: Ops, head_dim: int, tokens: int, past: int, dtype: torch.dtype) -> None:
    check(ops, make(shapes.Attention(2, tokens, past, 3, 1, head_dim), dtype))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (16, 1), (17, 1), (32, 2), (48, 1), (5, 5)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_groups(ops: Ops, heads: int, kv_heads: int, tokens: int, dtype: torch.dtype) -> None:
    check(ops, make(shapes.Attention(2, tokens, 36, heads, kv_heads, 24), dtype))


@pytest.mark.parametrize("keys, multiprocessors", [(130, 1), (257, 2), (600, 3), (1025, 8), (4400, 100)])
@pytest.mark.parametrize("heads", [4, 20])
def test_decode_with_keys_split_over_blocks(
    ops: Ops, keys: int, multiprocessors: int, heads: int, dtype: torch.dtype
) -> None:
    check(ops, make(shapes.Attention(1, 1, keys - 1, heads, 1, 16), dtype), num_multiprocessors=multiprocessors)
    assert ops.splits == min(2 * multiprocessors, (keys + 5) // 128)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch, tokens, past", [(2, 1, 600), (2, 40, 30), (1, 1, 4200)])
def test_any_order_has_the_same_bits(
    executor: Executor, order: str, batch: int, tokens: int, past: int, dtype: torch.dtype
) -> None:
    """Of threads and of blocks: whoever comes last merges the splits in the order of the keys."""
    case = make(shapes.Attention(batch, tokens, past, 2 * batch, batch, 24), dtype)
    actual = Ops(executor, order).attention(*case, num_multiprocessors=8 * past // 256)
    assert_equal_bits(actual, Ops(executor).attention(*case, num_multiprocessors=8 * past // 256))


@pytest.mark.parametrize("head_dim", [16, 64, 72, 128])
@pytest.mark.parametrize("tokens, past, heads, kv_heads", [(64, 0, 4, 1), (43, 90, 6, 1), (130, 7, 2, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_128_rows(
    ops: Ops, tokens: int, past: int, heads: int, kv_heads: int, head_dim: int, causal: bool, value_dtype: torch.dtype
) -> None:
    """Where they are enough for the GPU; whatever the rest is."""
    check(ops, make(shapes.Attention(1, tokens, past, heads, kv_heads, head_dim), value_dtype), causal=causal)
    assert ops.rows == 128


def test_where_blocks_have_64_rows(ops: Ops, dtype: torch.dtype) -> None:
    """Where 128 would be too few blocks for the GPU, and fp32."""
    case = make(shapes.Attention(1, 130, 7, 2, 2, 64), dtype)
    for multiprocessors in (1, 2):
        check(ops, case, num_multiprocessors=multiprocessors)
        assert ops.rows == (128 if dtype != torch.float32 and multiprocessors == 1 else 64)


def test_blocks_of_128_rows_with_padding(ops: Ops, dtype: torch.dtype) -> None:
    case = ragged(6, 1, 24, dtype, [(20, 0), (0, 0), (3, 31)], columns=50)
    assert (check(ops, case)[case.positions < 0] == 0).all()
    assert ops.rows == (64 if dtype == torch.float32 else 128)


@pytest.mark.parametrize("step", [0.02, 0.3, 3.0, -0.1])
@pytest.mark.parametrize("tokens, heads, masked", [(1, 3, False), (80, 4, False), (5, 4, True)])
def test_scores_that_keep_rising(
    ops: Ops, step: float, tokens: int, heads: int, masked: bool, dtype: torch.dtype
) -> None:
    """The maximum is raised in steps: scores below and above the slack, from tile to tile and within one."""
    case = make(shapes.Attention(1, tokens, 500 - tokens, heads, 1, 16), dtype)
    case.q[...], case.kv_cache[:, :, :500, :15] = 1.0, 0.0
    rising = (torch.arange(500) * step).to(dtype)
    case.kv_cache[:, :, :500, 15] = rising[torch.randperm(500)] if tokens == 80 else rising
    mask = torch.zeros(1, 1, tokens, 500) if masked else None
    check(ops, case, scale=1.0, mask=mask, num_multiprocessors=1 if tokens > 1 else 3)


@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_decode_of_rows_of_different_lengths(ops: Ops, multiprocessors: int, dtype: torch.dtype) -> None:
    case = make(shapes.Attention(5, 1, 299, 6, 2, 24), dtype)
    for b, length in enumerate((300, 1, 64, 0, 129)):
        case.lengths[b], case.positions[b] = length, length - 1
        case.kv_cache[b, :, length:] = torch.nan
    assert (check(ops, case, num_multiprocessors=multiprocessors)[3] == 0).all()


@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_padding(ops: Ops, heads: int, kv_heads: int, causal: bool, dtype: torch.dtype) -> None:
    case = ragged(heads, kv_heads, 16, dtype, [(0, 0), (4, 0), (0, 3), (2, 5), (9, 0), (8, 0)])
    assert (check(ops, case, causal=causal)[case.positions < 0] == 0).all()


@pytest.mark.parametrize("batch, heads", [(2, 3), (1, 1)])
@pytest.mark.parametrize("tokens, past, multiprocessors", [(7, 0, 1), (5, 66, 1), (1, 300, 8)])
@pytest.mark.parametrize("kind", ["bool", "float", "same dtype"])
def test_masks(
    ops: Ops,
    batch: int,
    heads: int,
    tokens: int,
    past: int,
    multiprocessors: int,
    kind: str,
    dtype: torch.dtype,
) -> None:
    case = make(shapes.Attention(2, tokens, past, 3, 1, 16), dtype)
    keys = past + tokens
    visible = torch.rand(batch, heads, tokens, keys + 4) < 0.6
    visible[:, :, 0] = False
    mask = visible
    if kind != "bool":
        mask = torch.randn(visible.shape).masked_fill(~visible, -torch.inf)
        mask[..., keys:] = torch.nan
        mask = mask.to(dtype if kind == "same dtype" else torch.float32)
    for causal in (True, False):
        out = check(ops, case, mask=mask, causal=causal, num_multiprocessors=multiprocessors)
        assert (out[:, 0] == 0).all()


@pytest.mark.parametrize("head_dim", [64, 72, 128, 136, 256])
@pytest.mark.parametrize("tokens, past, multiprocessors", [(1, 300, 8), (7, 40, 1), (40, 0, 1)])
def test_masks_with_every_head_size(
    ops: Ops, tokens: int, past: int, multiprocessors: int, head_dim: int, dtype: torch.dtype
) -> None:
    """16, 32 and 64 query rows a block."""
    case = make(shapes.Attention(1, tokens, past, 3, 1, head_dim), dtype)
    visible = torch.rand(1, 3, tokens, past + tokens) < 0.6
    check(ops, case, mask=visible, num_multiprocessors=multiprocessors)
    check(ops, case, mask=torch.randn(visible.shape).masked_fill(~visible, -torch.inf))


def test_mask_of_a_very_negative_number(ops: Ops) -> None:
    case = make(shapes.Attention(1, 3, 40, 3, 1, 16), torch.float32)
    visible = torch.rand(1, 1, 3, 43) < 0.5
    visible[..., 0] = True
    lowest = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    check(ops, case, mask=lowest)
    lowest[:, :, 1] = torch.finfo(torch.float32).min  # all keys alike, then
    check(ops, case, mask=lowest)


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0, 3.0])
def test_scale(ops: Ops, scale: float, dtype: torch.dtype) -> None:
    check(ops, make(shapes.Attention(1, 4, 20, 3, 1, 16), dtype), scale=scale, loosen=10)


@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
@pytest.mark.parametrize("tokens, past", [(1, 300), (40, 0)])
def test_very_large_scores(ops: Ops, size: float, tokens: int, past: int) -> None:
    case = make(shapes.Attention(1, tokens, past, 3, 1, 16), torch.float32)
    q, kv_cache = (case.q * 4).round(), case.kv_cache.clone()
    kv_cache[..., :16] = (kv_cache[..., :16] * 4).round()
    scale = 2.0 ** round(torch.log2(torch.tensor(size / 256)).item())
    check(ops, case._replace(q=q, kv_cache=kv_cache), scale=scale, num_multiprocessors=4)


def test_head_mask(ops: Ops, dtype: torch.dtype) -> None:
    case = make(shapes.Attention(2, 5, 12, 4, 2, 16), dtype)
    out = check(ops, case, head_mask=torch.tensor([1.0, 0.0, 0.5, -2.0])).view(2, 5, 4, 16)
    assert (out[:, :, 1] == 0).all()


@pytest.mark.parametrize("tokens, past", [(1, 90), (20, 5)])
def test_a_bad_row_does_not_reach_the_others(ops: Ops, tokens: int, past: int, dtype: torch.dtype) -> None:
    case = make(shapes.Attention(3, tokens, past, 6, 2, 24), dtype)
    clean = ops.attention(*case)
    case.kv_cache[1, :, 2] = torch.nan
    case.q[2, tokens - 1, 4] = torch.nan
    dirty = ops.attention(*case)
    assert dirty[1].isnan().all()
    assert dirty[2].view(tokens, 6, 24)[tokens - 1, 4].isnan().all()
    dirty[1] = clean[1]
    dirty[2].view(tokens, 6, 24)[tokens - 1, 4] = clean[2].view(tokens, 6, 24)[tokens - 1, 4]
    assert_equal_bits(dirty, clean)


@pytest.mark.parametrize("tokens, past", [(1, 40), (14, 3)])
def test_misaligned_operands(ops: Ops, tokens: int, past: int, dtype: torch.dtype) -> None:
    case = make(shapes.Attention(2, tokens, past, 6, 2, 24), dtype)
    expected = ops.attention(*case)
    assert_equal_bits(ops.attention(*case._replace(q=hostile.misaligned(case.q))), expected)
    assert_equal_bits(ops.attention(*case._replace(kv_cache=hostile.misaligned(case.kv_cache))), expected)
