"""The CUDA kernels of linear and qkv_projection in the host executor: few rows, and what follows a library product."""

from collections.abc import Iterator

import pytest
import torch
from alula import ops as on_cpu
from alula.ops import rotary_table
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from simt_ops import MAX_FEW_ROWS, Ops, no_faults
from simt_process import ORDERS, Executor
from test_linear import everything, magnitude, operands
from torch import Tensor

ROWS = [1, 2, 5, 8, 9, 16]
WEIGHTS = [(1, 1), (7, 17), (31, 2), (33, 16), (65, 31), (24, 255), (24, 257), (3, 1031), (16, 2048)]  # (out, in)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


@pytest.fixture
def ops(executor: Executor) -> Ops:
    return Ops(executor)


def check_linear(ops: Ops, x: Tensor, weight: Tensor, **options: object) -> Tensor:
    actual = ops.linear(x, weight, **options)
    expected = reference.linear(x, weight, **options)
    budget = reference.same_dtype(reference.linear, x, weight, **options)
    if len(x) > MAX_FEW_ROWS:  # a library's product is rounded before anything is added, here as in PyTorch
        bias, activation = options.get("bias"), options.get("activation", "none")
        norm = {name: value for name, value in options.items() if name.startswith("norm")}
        product = reference.same_dtype(reference.linear, x, weight, **norm)
        budget = reference.ACTIVATIONS[activation](product if bias is None else product + bias)
        budget = budget if options.get("residual") is None else budget + options["residual"]
    size = magnitude(x, weight, expected, **options)
    assert_close(actual, expected, budget_from=budget, magnitude=size)
    return actual


@pytest.mark.parametrize("weight_shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_few_rows(ops: Ops, rows: int, weight_shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_linear(ops, *operands(rows, *weight_shape, dtype))


@pytest.mark.parametrize("weight_shape", [(7, 17), (33, 64), (24, 257), (16, 2048)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_few_rows_with_everything(ops: Ops, rows: int, weight_shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = operands(rows, *weight_shape, dtype)
    check_linear(ops, x, weight, activation="gelu_pytorch_tanh", **everything(x, weight))
    options = everything(x, weight)
    check_linear(ops, x, weight, **{**options, "norm_bias": None, "residual": None})


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations(ops: Ops, activation: str, rows: int, dtype: torch.dtype) -> None:
    x, weight = operands(rows, 77, 40, dtype)
    check_linear(ops, x, weight, bias=torch.randn(77).to(dtype), activation=activation)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations_over_their_range(ops: Ops, activation: str) -> None:
    """A product with 1 hands the activation any number."""
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-3e38, 3e38, -100.0, 100.0, -0.0, torch.nan])])
    y = ops.linear(torch.ones(1, 1), x[:, None], activation=activation)
    expected = reference.ACTIVATIONS[activation](x.double())
    assert_close(y[0], expected, magnitude=expected.abs().nan_to_num(1.0).clamp(min=1.0), tolerance=1e-6)


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations_of_infinities_are_those_of_the_cpu(ops: Ops, activation: str, rows: int) -> None:
    bias = torch.tensor([-torch.inf, torch.inf, torch.nan, -3e38, 3e38, -1e19, -105.0, -0.0, 0.0])
    x, weight = torch.zeros(rows, 16), torch.zeros(len(bias), 16)
    y = ops.linear(x, weight, bias, activation=activation)
    expected = on_cpu.linear(x, on_cpu.pack(weight), bias, activation=activation).double()
    assert_close(y, expected, magnitude=expected.abs().nan_to_num(1.0, 1.0).clamp(min=1e-30), tolerance=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", [1, 13])
def test_any_order_has_the_same_bits(executor: Executor, order: str, rows: int, dtype: torch.dtype) -> None:
    x, weight = operands(rows, 40, 600, dtype)
    options = everything(x, weight)
    assert_equal_bits(Ops(executor, order).linear(x, weight, **options), Ops(executor).linear(x, weight, **options))


def test_a_row_has_the_same_bits_in_any_company(ops: Ops, dtype: torch.dtype) -> None:
    x, weight = operands(16, 24, 300, dtype)
    options = {"norm_weight": torch.randn(300).to(dtype), "norm_bias": torch.randn(300).to(dtype)}
    whole = ops.linear(x, weight, **options)
    for count in (1, 3, 8, 9):
        assert_equal_bits(ops.linear(x[:count].clone(), weight, **options), whole[:count])


def test_misaligned_operands(ops: Ops, dtype: torch.dtype) -> None:
    x, weight = operands(3, 24, 64, dtype)
    options = everything(x, weight)
    expected = ops.linear(x, weight, **options)
    assert_equal_bits(ops.linear(hostile.misaligned(x), weight, **options), expected)
    awkward = {name: hostile.misaligned(value) for name, value in options.items()}
    assert_equal_bits(ops.linear(x, weight, **awkward), expected)


def test_a_bad_row_does_not_reach_the_others(ops: Ops, dtype: torch.dtype) -> None:
    x, weight = operands(5, 24, 100, dtype)
    clean = ops.linear(x, weight)
    x[2, 7] = torch.nan
    dirty = ops.linear(x, weight)
    assert dirty[2].isnan().all()
    dirty[2] = clean[2]
    assert_equal_bits(dirty, clean)


@pytest.mark.parametrize("weight_shape", [(7, 17), (33, 64), (30, 24), (40, 24), (264, 16)], ids=str)
def test_epilogue_of_many_rows(ops: Ops, weight_shape: tuple[int, int], dtype: torch.dtype) -> None:
    """By pairs, and by packs of 16 bytes where the features are whole packs."""
    x, weight = operands(29, *weight_shape, dtype)
    for options in ({}, {"activation": "gelu", **everything(x, weight)}):
        check_linear(ops, x, weight, **options)


# --- qkv_projection --------------------------------------------------------------------------------------------------


def check_qkv(
    ops: Ops,
    batch: int,
    tokens: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    past: int = 2,
    rotary_dim: int = 0,
    mlp_width: int = 0,
    mlp_activation: str = "gelu_pytorch_tanh",
    positions: Tensor | None = None,
    with_norm: bool = True,
) -> None:
    """Query, cache and mlp against the reference; what is not written keeps its bits."""
    heads, kv_heads, head_dim, width = shape
    features = (heads + 2 * kv_heads) * head_dim + mlp_width
    x, weight = torch.randn(batch, tokens, width).to(dtype), torch.randn(features, width).to(dtype)
    if positions is None:
        positions = torch.arange(past, past + tokens, dtype=torch.int32).repeat(batch, 1)
    cache = hostile.any_bits((batch, kv_heads, past + tokens + 3, 2 * head_dim), dtype)
    before = cache.clone()
    options = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "positions": positions,
        "bias": torch.randn(features).to(dtype),
        "norm_weight": torch.randn(width).to(dtype),
        "norm_bias": torch.randn(width).to(dtype),
    }
    if not with_norm:
        del options["norm_weight"], options["norm_bias"]
    if rotary_dim:
        options["rotary_table"] = rotary_table(50, rotary_dim)
        options["rotary_positions"] = torch.randint(0, 50, (batch, tokens), dtype=torch.int32)
    mlp = None
    extra: list[dict[str, Tensor]] = [{}, {}, {}]
    if mlp_width:
        mlp = torch.full((batch, tokens, mlp_width), torch.nan, dtype=dtype)
        options["mlp_activation"] = mlp_activation
        extra = [{"mlp": mlp}, {"mlp": mlp.double()}, {"mlp": mlp.clone()}]
    expected_cache, torch_cache = before.double(), before.clone()
    expected = reference.qkv_projection(x, weight, kv_cache=expected_cache, **options, **extra[1])
    budget = reference.same_dtype(reference.qkv_projection, x, weight, kv_cache=torch_cache, **options, **extra[2])
    q = ops.qkv_projection(x, weight, kv_cache=cache, **options, **extra[0])
    size = max(width**0.5, expected.abs().max().item())
    assert_close(q, expected, budget_from=budget, magnitude=size, name="query")
    written = torch.zeros(batch, before.shape[2], dtype=torch.bool)
    for b, row in enumerate(positions.tolist()):
        written[b, [slot for slot in row if 0 <= slot < before.shape[2]]] = True
    now, was = cache.transpose(1, 2), before.transpose(1, 2)
    assert_equal_bits(now[~written], was[~written], name="unwritten slots")
    assert_close(
        now[written],
        expected_cache.transpose(1, 2)[written],
        budget_from=torch_cache.transpose(1, 2)[written],
        magnitude=size,
        name="cache",
    )
    if mlp is not None:
        assert_close(mlp, extra[1]["mlp"], budget_from=extra[2]["mlp"], magnitude=size, name="mlp")


@pytest.mark.parametrize("shape", shapes.QKV, ids=str)
@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 5), (2, 11)])
def test_qkv_projection(
    ops: Ops, shape: tuple[int, int, int, int], batch: int, tokens: int, dtype: torch.dtype
) -> None:
    check_qkv(ops, batch, tokens, shape, dtype)


@pytest.mark.parametrize("width", [64, 31])
@pytest.mark.parametrize("batch, tokens", [(1, 1), (2, 4), (3, 5), (2, 11)])
def test_qkv_projection_without_a_layer_norm(ops: Ops, batch: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    """As BigBird's blocks have it."""
    check_qkv(ops, batch, tokens, (2, 2, 16, width), dtype, with_norm=False)


@pytest.mark.parametrize("tokens", [2, 20])
def test_a_rotary_position_outside_the_table_is_noted(ops: Ops, tokens: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, tokens, 24).to(dtype), torch.randn(32, 24).to(dtype)
    where = torch.arange(tokens, dtype=torch.int32).unsqueeze(0)
    faults, turns = no_faults(), where.clone()
    turns[0, 1] = 50
    options = {
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "positions": where,
        "rotary_table": rotary_table(50, 8),
    }
    cache = torch.zeros(1, 1, tokens, 16, dtype=dtype)
    q = ops.qkv_projection(x, weight, kv_cache=cache, rotary_positions=turns, faults=faults, **options)
    assert faults.tolist() == [[0, 0], [0, 0], [0, 0], [50, 50]]
    assert q[0, 1].isnan().all()
    assert q[0, [0]].isfinite().all()
    assert cache[0, 0, 1, 8:].isfinite().all(), "values are not turned"


@pytest.mark.parametrize("batch, tokens", [(1, 1), (2, 3), (4, 6)])
@pytest.mark.parametrize("head_dim, rotary_dim", [(8, 2), (16, 16), (24, 6), (80, 64)])
def test_qkv_projection_with_rotary_and_mlp(
    ops: Ops, head_dim: int, rotary_dim: int, batch: int, tokens: int, dtype: torch.dtype
) -> None:
    shape = (3, 1, head_dim, 40)
    check_qkv(ops, batch, tokens, shape, dtype, rotary_dim=rotary_dim)
    for mlp_width in (33, 40):
        check_qkv(ops, batch, tokens, shape, dtype, rotary_dim=rotary_dim, mlp_width=mlp_width)


@pytest.mark.parametrize("tokens", [4, 10])
def test_qkv_projection_of_padding_and_slots_beyond_the_cache(ops: Ops, tokens: int, dtype: torch.dtype) -> None:
    positions = torch.arange(tokens, dtype=torch.int32).repeat(2, 1)
    positions[0, 1], positions[1, 0] = -1, -7
    check_qkv(ops, 2, tokens, (3, 1, 16, 24), dtype, positions=positions)


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_qkv_projection_with_any_activation(ops: Ops, activation: str, tokens: int) -> None:
    check_qkv(ops, 2, tokens, (3, 1, 8, 24), torch.float32, mlp_width=33, mlp_activation=activation)
