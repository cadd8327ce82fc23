"""The CUDA kernels of quantized weights in the host executor: products of few and of many rows with every epilogue,
embedding, dequantize_weight. Weight-only: x is never rounded to 8 bits."""

from collections.abc import Iterator

import pytest
import torch
from alula import ops
from alula.ops import PackedWeight
from alula.testing import hostile, quantized, reference
from alula.testing.compare import assert_close, assert_equal_bits
from quantized_cases import FORMATS
from simt_ops import MAX_FEW_ROWS, Ops
from simt_process import ORDERS, Executor
from test_linear import magnitude
from test_quantized_linear import everything
from torch import Tensor

each_format = pytest.mark.parametrize("format, group_size", FORMATS, ids=lambda value: str(value))
ONE, MANY = 1, 1000  # multiprocessors: large tiles and no split; small tiles and K over blocks
KINDS = ["int8", "int4", "int4_asymmetric", "nf4"]


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


@pytest.fixture
def game(executor: Executor) -> Ops:
    return Ops(executor)


def pack(n: int, k: int, format: str, group_size: int | None = None) -> PackedWeight:
    return ops.pack(torch.randn(n, k), format, group_size)


def summed_weight(packed: PackedWeight) -> Tensor:
    """[N, K], what x meets in the sums: an asymmetric group's codes less 8 and its middle, which may both be larger
    than the weight that they make."""
    if packed.format != "int4_asymmetric":
        return quantized.dequantize(packed)
    codes, scale, least = quantized.codes_and_scales(packed)
    sizes = ((codes - 8) * scale).abs() + (least + 8 * scale).abs()
    return sizes[: packed.out_features, : packed.in_features]


def check_linear(game: Ops, x: Tensor, packed: PackedWeight, **options: object) -> Tensor:
    """Against the product with the dequantized weight. A weight is not rounded, except nf4's table; PyTorch's own
    product in the dtype, which is the budget, rounds it."""
    weight = quantized.dequantize(packed)
    actual = game.linear(x, packed, **options)
    expected = reference.linear(x, weight, **options)
    budget = reference.same_dtype(reference.linear, x, weight.to(x.dtype), **options)
    size = magnitude(x, summed_weight(packed), expected, **{"norm_bias": None, **options})
    assert_close(actual, expected, budget_from=budget, magnitude=size, tolerance=3e-6)
    return actual


# --- linear ----------------------------------------------------------------------------------------------------------


@each_format
def test_few_rows(game: Ops, format: str, group_size: int | None, dtype: torch.dtype) -> None:
    for rows, n, k in [(1, 33, 19), (5, 7, 1), (8, 32, 64), (9, 31, 257)]:
        check_linear(game, torch.randn(rows, k).to(dtype), pack(n, k, format, group_size))
        assert game.plan == (1, 0, 1)


@pytest.mark.parametrize("format", KINDS)
def test_few_rows_of_a_wide_weight(game: Ops, format: str) -> None:
    """More K than a block's warps take at once."""
    check_linear(game, torch.randn(2, 2100).bfloat16(), pack(10, 2100, format))


@each_format
@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (10, torch.bfloat16)], ids=str)
def test_few_rows_with_k_over_blocks(
    executor: Executor, rows: int, format: str, group_size: int | None, dtype: torch.dtype
) -> None:
    """Which block comes last differs from order to order; the bits do not."""
    n, k = 33, 2050 if format != "int8" else 1030
    x, packed = torch.randn(rows, k).to(dtype), pack(n, k, format, group_size)
    options = everything(x, n)
    forward, reverse = (Ops(executor, order, MANY) for order in ("forward", "reverse"))
    result = check_linear(forward, x, packed, **options)
    assert forward.plan == (1, 0, 2)
    assert_equal_bits(reverse.linear(x, packed, **options), result)


@each_format
@pytest.mark.parametrize("multiprocessors", [ONE, MANY])
def test_many_rows(
    executor: Executor, multiprocessors: int, format: str, group_size: int | None, dtype: torch.dtype
) -> None:
    game = Ops(executor, num_multiprocessors=multiprocessors)
    for rows, n, k in [(17, 33, 19), (65, 31, 150)]:
        check_linear(game, torch.randn(rows, k).to(dtype), pack(n, k, format, group_size))
        assert game.plan == (0, multiprocessors == ONE and dtype != torch.float32, 1)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("multiprocessors", [ONE, MANY])
def test_many_rows_over_several_blocks(executor: Executor, multiprocessors: int, format: str) -> None:
    game = Ops(executor, num_multiprocessors=multiprocessors)
    check_linear(game, torch.randn(135, 72).bfloat16(), pack(131, 72, format))


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("rows, multiprocessors", [(2, ONE), (16, ONE), (20, ONE), (20, MANY)])
def test_everything_fused(executor: Executor, rows: int, multiprocessors: int, format: str, dtype: torch.dtype) -> None:
    x, packed = torch.randn(rows, 75).to(dtype), pack(45, 75, format)
    game, options = Ops(executor, num_multiprocessors=multiprocessors), everything(x, 45)
    check_linear(game, x, packed, activation="gelu_pytorch_tanh", **options)
    check_linear(game, x, packed, **{**options, "norm_bias": None, "residual": None})


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("rows", [3, 18])
def test_activations(game: Ops, rows: int, activation: str) -> None:
    x = torch.randn(rows, 50).bfloat16()
    check_linear(game, x, pack(40, 50, "int4"), bias=torch.randn(40).bfloat16(), activation=activation)


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("order", [order for order in ORDERS if order != "forward"])
@pytest.mark.parametrize("rows, multiprocessors", [(13, ONE), (20, ONE), (20, MANY)])
def test_any_order_has_the_same_bits(
    executor: Executor, order: str, rows: int, multiprocessors: int, format: str
) -> None:
    x, packed = torch.randn(rows, 330).bfloat16(), pack(40, 330, format)
    options = everything(x, 40)
    expected = Ops(executor, num_multiprocessors=multiprocessors).linear(x, packed, **options)
    assert_equal_bits(Ops(executor, order, multiprocessors).linear(x, packed, **options), expected)


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_company(game: Ops, format: str, dtype: torch.dtype) -> None:
    x, packed = torch.randn(16, 140).to(dtype), pack(24, 140, format)
    options = {"norm_weight": torch.randn(140).to(dtype), "norm_bias": torch.randn(140).to(dtype)}
    whole = game.linear(x, packed, **options)
    for count in (1, 8, 9):
        assert_equal_bits(game.linear(x[:count].clone(), packed, **options), whole[:count])
    many = torch.cat([x, torch.randn(20, 140).to(dtype)])
    assert_equal_bits(game.linear(many[:17].clone(), packed), game.linear(many, packed)[:17])


@pytest.mark.parametrize("rows", [3, 19])
def test_misaligned_operands(game: Ops, rows: int, dtype: torch.dtype) -> None:
    x, packed = torch.randn(rows, 64).to(dtype), pack(24, 64, "int4")
    options = everything(x, 24)
    if rows > MAX_FEW_ROWS:
        del options["norm_weight"], options["norm_bias"]
    expected = game.linear(x, packed, **options)
    awkward = {name: hostile.misaligned(value) for name, value in options.items()}
    assert_equal_bits(game.linear(hostile.misaligned(x), packed, **awkward), expected)


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("rows, multiprocessors", [(5, ONE), (20, ONE), (20, MANY)])
@pytest.mark.parametrize("bad, dtype", [(torch.nan, torch.bfloat16), (torch.inf, torch.float32)], ids=str)
def test_a_bad_row_is_bad_and_does_not_reach_the_others(
    executor: Executor, bad: float, rows: int, multiprocessors: int, format: str, dtype: torch.dtype
) -> None:
    game = Ops(executor, num_multiprocessors=multiprocessors)
    x, packed = torch.randn(rows, 40).to(dtype), pack(24, 40, format)
    clean = game.linear(x, packed)
    x[2, 37] = bad
    dirty = game.linear(x, packed)
    assert not dirty[2].isfinite().any()
    dirty[2] = clean[2]
    assert_equal_bits(dirty, clean)


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("rows", [4, 20])
def test_outliers_stay_where_they_are(game: Ops, rows: int, format: str, dtype: torch.dtype) -> None:
    """One row of the weight and one column of x 1000 times as large: other rows keep their bits and accuracy."""
    x, weight = torch.randn(rows, 140).to(dtype), torch.randn(40, 140)
    weight[7] *= 1000
    x[:, 5] *= 1000
    loud = check_linear(game, x, ops.pack(weight, format))
    weight[7] /= 1000
    quiet = check_linear(game, x, ops.pack(weight, format))
    rest = torch.arange(40) != 7
    assert_equal_bits(loud[:, rest], quiet[:, rest])


def test_scales_at_the_ends_of_fp16(game: Ops) -> None:
    """Subnormal scales, and the largest there are."""
    x = torch.randn(3, 64)
    for size in (1e-6, 3e-5, 3e5):
        packed = ops.pack(torch.rand(33, 64) * size, "int4")
        expected = x.double() @ quantized.dequantize(packed).T
        assert_close(game.linear(x, packed), expected, magnitude=size * 64, tolerance=1e-6)


# --- qkv_projection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("batch, tokens, multiprocessors", [(1, 1, ONE), (2, 5, MANY), (2, 9, ONE), (2, 9, MANY)])
@pytest.mark.parametrize("shape, mlp_width", [((3, 1, 24, 40), 33), ((2, 2, 16, 70), 0)])
def test_qkv_projection(
    executor: Executor,
    shape: tuple[int, int, int, int],
    mlp_width: int,
    batch: int,
    tokens: int,
    multiprocessors: int,
    format: str,
    dtype: torch.dtype,
) -> None:
    """Everything at once: layer norm, bias, rotary, cache, the MLP of a parallel block, padding."""
    game = Ops(executor, num_multiprocessors=multiprocessors)
    heads, kv_heads, head_dim, width = shape
    features = (heads + 2 * kv_heads) * head_dim + mlp_width
    x, packed = torch.randn(batch, tokens, width).to(dtype), pack(features, width, format)
    weight, slots = quantized.dequantize(packed), tokens + 3
    positions = torch.arange(tokens, dtype=torch.int32).repeat(batch, 1) + 1
    positions[0, 0] = -1
    options = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "positions": positions,
        "bias": torch.randn(features).to(dtype),
        "norm_weight": torch.randn(width).to(dtype),
        "norm_bias": torch.randn(width).to(dtype),
        "rotary_table": ops.rotary_table(50, 8),
        "rotary_positions": torch.randint(0, 50, (batch, tokens), dtype=torch.int32),
    }
    cache = torch.full((batch, kv_heads, slots, 2 * head_dim), torch.nan, dtype=dtype)
    caches = [cache, cache.double(), cache.clone()]
    extra: list[dict[str, Tensor]] = [{}, {}, {}]
    if mlp_width:
        options["mlp_activation"] = "gelu_pytorch_tanh"
        mlp = torch.full((batch, tokens, mlp_width), torch.nan, dtype=dtype)
        extra = [{"mlp": mlp}, {"mlp": mlp.double()}, {"mlp": mlp.clone()}]
    q = game.qkv_projection(x, packed, kv_cache=caches[0], **options, **extra[0])
    expected = reference.qkv_projection(x, weight, kv_cache=caches[1], **options, **extra[1])
    rounded = weight.to(dtype)
    budget = reference.same_dtype(reference.qkv_projection, x, rounded, kv_cache=caches[2], **options, **extra[2])
    size = max(width**0.5, expected.abs().max().item())
    assert_close(q, expected, budget_from=budget, magnitude=size, name="query")
    assert_close(caches[0], caches[1], budget_from=caches[2], magnitude=size, name="cache")
    if mlp_width:
        assert_close(mlp, extra[1]["mlp"], budget_from=extra[2]["mlp"], magnitude=size, name="mlp")


# --- rows and whole weights ------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("width", [1, 33, 130])
def test_embedding_reads_rows(game: Ops, width: int, format: str, group_size: int, dtype: torch.dtype) -> None:
    table = ops.pack(torch.randn(70, width).to(dtype), format, group_size)
    ids = torch.tensor([[0, 69, 31, 32], [7, 7, 15, 16]])
    rows = quantized.dequantize(table)
    assert_equal_bits(game.embedding(ids, table), rows[ids].float().to(dtype))
    positions, where = torch.randn(5, width).to(dtype), torch.tensor([[0, 4, 2, 1]])
    words = {"position_ids": where, "position_table": positions, "token_type_ids": ids.flip(0)}
    assert_close(game.embedding(ids, table, **words), reference.embedding(ids, rows, **words), tolerance=1e-6)
    types = {"token_type_ids": ids % 2, "token_type_table": torch.randn(2, width).to(dtype), "scale": 3.0}
    assert_close(game.embedding(ids, table, **types), reference.embedding(ids, rows, **types), tolerance=1e-6)


def test_ids_outside_a_quantized_table_give_nan(game: Ops, dtype: torch.dtype) -> None:
    table = ops.pack(torch.randn(70, 40).to(dtype), "int4")
    faults = torch.zeros(3, 2, dtype=torch.int64)
    out = game.embedding(torch.tensor([[0, 70, -1, 69]]), table, faults=faults)
    assert out.isnan().all(-1).tolist() == [[False, True, True, False]]
    assert faults[0].tolist() in ([70, 70], [-1, 70])


@each_format
@pytest.mark.parametrize("shape", [(1, 1), (33, 19), (64, 130), (31, 257)], ids=str)
def test_dequantize_weight(
    game: Ops, shape: tuple[int, int], format: str, group_size: int | None, dtype: torch.dtype
) -> None:
    """The bits of the CPU."""
    packed = pack(*shape, format, group_size)
    assert_equal_bits(game.dequantize_weight(packed, dtype), packed.unpack(dtype))
