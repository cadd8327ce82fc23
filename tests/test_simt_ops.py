"""The CUDA kernels of the simple ops, run in the host executor against the references: softmax, layer norm, rotary,
embedding. Shapes as in the tests of the CPU kernels, where they are small."""

from collections.abc import Iterator

import pytest
import torch
from alula.ops import rotary_table
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from simt_ops import Ops, no_faults
from simt_process import ORDERS, Executor


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


@pytest.fixture
def ops(executor: Executor) -> Ops:
    return Ops(executor)


# --- scaled_masked_softmax -------------------------------------------------------------------------------------------


def check_softmax(ops: Ops, scores: torch.Tensor, mask: torch.Tensor | None = None, **options: object) -> torch.Tensor:
    actual = ops.scaled_masked_softmax(scores, mask, **options)
    expected = reference.scaled_masked_softmax(scores, mask, **{k: v for k, v in options.items() if k != "dtype"})
    assert_close(actual, expected, magnitude=expected.abs() + 1e-30, tolerance=3e-6)
    return actual


SOFTMAX_LONG = [
    shapes.Softmax(1, 1, 3, 1017),  # the longest row of a warp (16 bits), and beyond
    shapes.Softmax(1, 1, 3, 1025),
    shapes.Softmax(1, 1, 2, 8191),
    shapes.Softmax(1, 1, 2, 8200),
    shapes.Softmax(1, 1, 1, 20011),
]


@pytest.mark.parametrize("shape", [*shapes.SOFTMAX, *SOFTMAX_LONG], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_softmax(ops: Ops, shape: shapes.Softmax, causal: bool, dtype: torch.dtype) -> None:
    check_softmax(ops, torch.randn(shape).to(dtype) * 3, causal=causal, scale=0.3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("keys", [37, 1500, 9001])
def test_softmax_in_any_order_has_the_same_bits(executor: Executor, order: str, keys: int, dtype: torch.dtype) -> None:
    scores = torch.randn(6, keys).to(dtype)
    actual = check_softmax(Ops(executor, order), scores)
    assert_equal_bits(actual, Ops(executor).scaled_masked_softmax(scores))


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [37, 1500, 9001])
def test_softmax_dtype_of_the_result(ops: Ops, keys: int, out: torch.dtype, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 2, keys).to(dtype)
    check_softmax(ops, scores, dtype=out, scale=0.5)
    check_softmax(ops, scores, torch.rand(2, 2, keys) < 0.6, dtype=out, scale=0.5)


@pytest.mark.parametrize("mask_shape", [(2, 3, 5, 37), (2, 1, 1, 37), (1, 1, 5, 1), (3, 1, 37), (37,), ()])
@pytest.mark.parametrize("kind", ["bool", "float", "same dtype"])
def test_softmax_masks(ops: Ops, mask_shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    visible = torch.rand(mask_shape) < 0.7
    mask = visible
    if kind != "bool":
        mask = torch.randn(mask_shape).masked_fill(~visible, -torch.inf)
        mask = mask.to(dtype if kind == "same dtype" else torch.float32)
    for causal in (False, True):
        check_softmax(ops, torch.randn(2, 3, 5, 37).to(dtype), mask, scale=0.7, causal=causal)


@pytest.mark.parametrize("keys", [64, 1504, 9008])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
def test_softmax_masks_read_by_packs(ops: Ops, keys: int, mask_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Rows of whole packs; the same mask from another place, and two keys apart, gives the same bits."""
    scores, visible = torch.randn(2, 3, keys).to(dtype), torch.rand(2, 1, keys) < 0.7
    mask = visible
    if mask_dtype != torch.bool:
        mask = torch.randn(visible.shape).masked_fill(~visible, -torch.inf).to(mask_dtype)
    out = check_softmax(ops, scores, mask, scale=0.7)
    assert_equal_bits(ops.scaled_masked_softmax(scores, hostile.misaligned(mask), scale=0.7), out)
    assert_equal_bits(ops.scaled_masked_softmax(scores, mask.repeat_interleave(2, dim=-1)[..., ::2], scale=0.7), out)


@pytest.mark.parametrize("keys", [37, 1500, 9001])
def test_softmax_special_values(ops: Ops, keys: int, dtype: torch.dtype) -> None:
    scores = torch.randn(7, keys).to(dtype)
    scores[1, 3], scores[2, 3], scores[3, 3] = torch.nan, torch.inf, -torch.inf
    scores[4] = -torch.inf
    scores[5, : keys - 1] = -torch.inf
    check_softmax(ops, scores)
    visible = torch.rand(7, keys) < 0.5
    visible[0] = False
    visible[1, 3] = visible[2, 3] = False
    out = check_softmax(ops, scores, visible)
    assert (out[0] == 0).all()
    check_softmax(ops, scores.nan_to_num(posinf=1e4, neginf=-1e4) * 6, scale=-1.0)


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_softmax_very_large_scores(ops: Ops, size: float) -> None:
    scores = torch.tensor([[size, -size, 0.0], [-size, -size, -size], [size, size, size], [0.0, 1.0, -size]])
    check_softmax(ops, scores.repeat(1, 7))
    check_softmax(ops, scores.repeat(1, 7) / 4, scale=3.0)


def test_softmax_causal_does_not_look_at_hidden_scores(ops: Ops, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 33, 17).to(dtype)
    visible = torch.ones(33, 17, dtype=torch.bool).tril(17 - 33)
    out = ops.scaled_masked_softmax(scores.masked_fill(~visible, torch.nan), causal=True)
    assert_close(out, reference.scaled_masked_softmax(scores, visible), tolerance=3e-6)


@pytest.mark.parametrize("keys", [37, 1500])
def test_softmax_of_misaligned_tensors(ops: Ops, keys: int, dtype: torch.dtype) -> None:
    scores = torch.randn(5, keys).to(dtype)
    expected = ops.scaled_masked_softmax(scores)
    assert_equal_bits(ops.scaled_masked_softmax(hostile.misaligned(scores)), expected)
    assert_equal_bits(ops.scaled_masked_softmax(scores, offset=1), expected)


# --- layer_norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [*shapes.NORM_WIDTHS, 768, 2048, 2056, 4104, 6144, 8200, 16400])
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(ops: Ops, width: int, with_residual: bool, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, width).to(dtype), torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    residual = torch.randn(3, width).to(dtype) if with_residual else None
    for b in (bias, None):
        actual = ops.layer_norm(x, weight, b, residual=residual)
        expected = reference.layer_norm(x, weight, b, residual=residual)
        assert_close(actual, expected, tolerance=2e-6 if width > 2 else 1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_layer_norm_in_any_order_has_the_same_bits(executor: Executor, order: str, dtype: torch.dtype) -> None:
    for width in (97, 1024, 4104):
        x, weight = torch.randn(3, width).to(dtype), torch.randn(width).to(dtype)
        expected = Ops(executor).layer_norm(x, weight)
        assert_equal_bits(Ops(executor, order).layer_norm(x, weight), expected)


def test_layer_norm_far_from_zero(ops: Ops) -> None:
    """A mean a thousand times the deviation: the variance must not be a difference of large sums."""
    x, weight = torch.randn(4, 1024) + 1000.0, torch.ones(1024)
    assert_close(ops.layer_norm(x, weight), reference.layer_norm(x, weight), tolerance=2e-4)


@pytest.mark.parametrize("width", [64, 1024])
def test_layer_norm_of_misaligned_tensors(ops: Ops, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, width).to(dtype), torch.randn(width).to(dtype)
    expected = reference.layer_norm(x, weight)
    assert_close(ops.layer_norm(hostile.misaligned(x), weight), expected, tolerance=2e-6)
    assert_close(ops.layer_norm(x, hostile.misaligned(weight)), expected, tolerance=2e-6)


# --- rotary ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    "head_dim, rotary_dim", [(8, 2), (8, 8), (16, 8), (64, 32), (64, 64), (80, 64), (7, 4), (24, 12), (256, 64)]
)
def test_rotary(ops: Ops, head_dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 3, 4, head_dim).to(dtype), torch.randn(2, 3, 2, head_dim).to(dtype)
    positions, table = torch.randint(0, 50, (2, 3), dtype=torch.int32), rotary_table(50, rotary_dim)
    expected = reference.rotary(q, k, positions, table, interleaved=interleaved)
    results = ops.rotary(q, k, positions, table, interleaved=interleaved)
    for actual, value in zip(results, expected, strict=True):
        assert_close(actual, value, tolerance=1e-6)
    again = ops.rotary(q, k, positions, table, interleaved=interleaved, inplace=True)
    for actual, value in zip(again, results, strict=True):
        assert_equal_bits(actual, value)


def test_rotary_of_misaligned_tensors(ops: Ops, dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 3, 4, 64).to(dtype), torch.randn(1, 3, 2, 64).to(dtype)
    positions, table = torch.arange(3, dtype=torch.int32)[None], rotary_table(50, 32)
    for interleaved in (True, False):
        expected = ops.rotary(q, k, positions, table, interleaved=interleaved)
        for result, value in zip(
            ops.rotary(hostile.misaligned(q), k, positions, table, interleaved=interleaved), expected, strict=True
        ):
            assert_equal_bits(result, value)


def test_rotary_positions_outside_the_table_give_nan(ops: Ops, dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 3, 2, 16).to(dtype), torch.randn(1, 3, 1, 16).to(dtype)
    positions, table = torch.tensor([[3, -1, 5]], dtype=torch.int32), rotary_table(5, 8)
    turned, _ = ops.rotary(q, k, positions, table)
    assert turned[0, 0].isfinite().all()
    assert turned[0, 1:, :, :8].isnan().all()
    assert_equal_bits(turned[0, 1:, :, 8:], q[0, 1:, :, 8:])


def test_a_rotary_position_outside_the_table_is_noted(ops: Ops, dtype: torch.dtype) -> None:
    q, k, table = torch.randn(1, 3, 2, 16).to(dtype), torch.randn(1, 3, 1, 16).to(dtype), rotary_table(10, 8)
    for wrong in (10, -1):
        faults, positions = no_faults(), torch.tensor([[9, wrong, 0]], dtype=torch.int32)
        turned, _ = ops.rotary(q, k, positions, table, faults=faults)
        assert faults.tolist() == [[0, 0], [0, 0], [0, 0], [wrong, 10]]
        assert turned[0, 1, :, :8].isnan().all()
        assert turned[0, [0, 2]].isfinite().all()


# --- embedding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 8, 31, 64, 1025, 2048, 4096])
def test_embedding(ops: Ops, width: int, dtype: torch.dtype) -> None:
    table, places = torch.randn(37, width).to(dtype), torch.randn(11, width).to(dtype)
    ids, types = torch.randint(0, 37, (2, 5)), torch.randint(0, 37, (2, 5))
    assert_equal_bits(ops.embedding(ids, table), table[ids])
    for position_ids in (torch.randint(0, 11, (2, 5)), torch.arange(5)[None]):
        options = {"position_ids": position_ids, "position_table": places, "token_type_ids": types}
        expected = reference.embedding(ids, table, **options)
        assert_close(ops.embedding(ids, table, **options), expected, magnitude=3.0, tolerance=1e-6)


def test_embedding_with_token_types_of_their_own_and_a_scale(ops: Ops, dtype: torch.dtype) -> None:
    table, kinds, ids = torch.randn(37, 24).to(dtype), torch.randn(2, 24).to(dtype), torch.randint(0, 37, (2, 5))
    options = {"token_type_ids": torch.randint(0, 2, (2, 5)), "token_type_table": kinds, "scale": 1.5}
    expected = reference.embedding(ids, table, **options)
    assert_close(ops.embedding(ids, table, **options), expected, magnitude=3.0, tolerance=1e-6)
    options["token_type_ids"][0, 2] = 2
    faults = no_faults()
    assert ops.embedding(ids, table, **options, faults=faults)[0, 2].isnan().all()
    assert faults.tolist() == [[0, 0], [0, 0], [2, 2], [0, 0]]


def test_embedding_ids_outside_the_table_give_nan_and_are_noted(ops: Ops, dtype: torch.dtype) -> None:
    table, places = torch.randn(5, 24).to(dtype), torch.randn(3, 24).to(dtype)
    ids = torch.tensor([[0, 5, 4, -1]])
    faults = no_faults()
    out = ops.embedding(ids, table, faults=faults)
    assert faults[0].tolist() in ([5, 5], [-1, 5])
    assert not faults[1:].any()
    assert out[0, [1, 3]].isnan().all()
    assert_equal_bits(out[0, [0, 2]], table[[0, 4]])
    faults.zero_()
    out = ops.embedding(torch.zeros_like(ids), table, position_ids=ids, position_table=places, faults=faults)
    assert faults[1].tolist() in ([5, 3], [4, 3], [-1, 3])
    assert out[0, 1:].isnan().all()
    assert out[0, 0].isfinite().all()
