"""rotary: query and key turned by the angles of their positions, in float32 and rounded once."""

import pytest
import torch
from alula import ops
from alula.testing import hostile, reference
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor

SIZES = [(8, 2), (8, 8), (16, 6), (24, 24), (64, 32), (80, 64), (128, 128), (256, 64)]  # (D, rotary_dim)


def operands(
    batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, positions, table"""
    return (
        torch.randn(batch, tokens, heads, head_dim).to(dtype),
        torch.randn(batch, tokens, kv_heads, head_dim).to(dtype),
        torch.randint(0, 70, (batch, tokens), dtype=torch.int32),
        ops.rotary_table(70, rotary_dim),
    )


@pytest.mark.parametrize("head_dim, rotary_dim", SIZES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (4, 4)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_against_the_reference(
    head_dim: int, rotary_dim: int, heads: int, kv_heads: int, interleaved: bool, dtype: torch.dtype, isa: str
) -> None:
    q, k, positions, table = operands(2, 5, heads, kv_heads, head_dim, rotary_dim, dtype)
    actual = ops.rotary(q, k, positions, table, interleaved=interleaved)
    expected = reference.rotary(q, k, positions, table, interleaved=interleaved)
    for name, a, e in zip(("q", "k"), actual, expected, strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous()
        assert_close(a, e, tolerance=1e-6, name=name)
    assert_equal_bits(actual[0][..., rotary_dim:], q[..., rotary_dim:], name="values that do not turn")


@pytest.mark.parametrize("interleaved", [True, False])
def test_in_place_writes_through_strides_and_nowhere_else(interleaved: bool, dtype: torch.dtype, isa: str) -> None:
    q, k, positions, table = operands(2, 5, 3, 2, 24, 16, dtype)
    expected = ops.rotary(q, k, positions, table, interleaved=interleaved)
    base = torch.full((2, 6, 5, 50), torch.nan, dtype=dtype)
    q_view = base[:, :3, :, 1:25].transpose(1, 2).copy_(q)
    k_view = base[:, 3:5, :, 25:49].transpose(1, 2).copy_(k)
    got = ops.rotary(q_view, k_view, positions, table, interleaved=interleaved, inplace=True)
    assert got[0] is q_view
    assert got[1] is k_view
    assert_equal_bits(q_view, expected[0])
    assert_equal_bits(k_view, expected[1])
    assert base.isnan().sum() == base.numel() - q.numel() - k.numel()


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_in_memory_does_not_matter(layout: str, dtype: torch.dtype, isa: str) -> None:
    q, k, positions, table = operands(2, 5, 3, 1, 24, 16, dtype)
    expected = ops.rotary(q, k, positions, table)
    place = hostile.LAYOUTS[layout]
    actual = ops.rotary(place(q), place(k), positions.T.contiguous().T, place(table))
    assert_equal_bits(actual[0], expected[0])
    assert_equal_bits(actual[1], expected[1])


def test_turning_keeps_lengths_and_position_0_turns_nothing(dtype: torch.dtype, isa: str) -> None:
    q, k, positions, table = operands(1, 9, 2, 2, 16, 16, dtype)
    same = ops.rotary(q, k, torch.zeros_like(positions), table)
    assert_equal_bits(same[0], q)
    turned = ops.rotary(q.float(), k.float(), positions, table)[0].double()
    assert_close(turned.norm(dim=-1).float(), q.double().norm(dim=-1))


def test_scores_depend_on_the_distance_alone(isa: str) -> None:
    q, k = torch.randn(2, 1, 1, 1, 32).unbind(0)
    table = ops.rotary_table(2000, 32)
    scores = []
    for start in (0, 7, 1500):
        near, far = (torch.tensor([[start + d]], dtype=torch.int32) for d in (0, 13))
        turned_q, turned_k = ops.rotary(q, k, far, table)[0], ops.rotary(q, k, near, table)[1]
        scores.append((turned_q.double() * turned_k.double()).sum().item())
    assert max(scores) - min(scores) < 2e-3  # the angles are float32: 1500 radians carry 1e-4 each


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_table(base: float) -> None:
    """Against float64; the angles themselves are rounded to float32, an error of position * 2^-24."""
    positions, rotary_dim = 2048, 64
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    table = ops.rotary_table(positions, rotary_dim, base)
    assert table.dtype == torch.float32
    assert_close(table, torch.cat([angles.cos(), angles.sin()], dim=-1), tolerance=2.0**-23 * positions)


def test_threads_and_repetition_do_not_change_bits(dtype: torch.dtype, isa: str, threads: None) -> None:
    q, k, positions, table = operands(3, 100, 8, 2, 64, 32, dtype)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.rotary(q, k, positions, table))
    for result in results[1:]:
        assert_equal_bits(result[0], results[0][0])
        assert_equal_bits(result[1], results[0][1])
    alone = ops.rotary(q[1:2, 7:8], k[1:2, 7:8], positions[1:2, 7:8], table)
    assert_equal_bits(alone[0], results[0][0][1:2, 7:8])


@pytest.mark.parametrize("batch, tokens", [(0, 3), (2, 0)])
@pytest.mark.parametrize("inplace", [True, False])
def test_no_tokens(batch: int, tokens: int, inplace: bool, dtype: torch.dtype) -> None:
    q, k, positions, table = operands(batch, tokens, 3, 1, 16, 8, dtype)
    out = ops.rotary(q, k, positions, table, inplace=inplace)
    assert out[0].shape == q.shape
    assert out[1].shape == k.shape


def test_opcheck(dtype: torch.dtype) -> None:
    q, k, positions, table = operands(2, 3, 4, 1, 16, 8, dtype)
    for interleaved in (True, False):
        torch.library.opcheck(torch.ops.alula.rotary, (q, k, positions, table, interleaved))
    torch.library.opcheck(torch.ops.alula.rotary_, (q, k, positions, table, True))


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_are_refused(which: int) -> None:
    arguments = operands(1, 2, 1, 1, 8, 8, torch.float32)
    arguments[which].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        ops.rotary(*arguments)
