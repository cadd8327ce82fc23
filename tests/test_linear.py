"""linear: layer norm, product with a packed weight, bias, activation and residual in one call."""

from typing import Any

import pytest
import torch
from alula import ops
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor

ACTIVATIONS = list(reference.ACTIVATIONS)


def operands(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)


def everything(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Bias, layer norm and residual to go with x [..., K] and weight [N, K]."""
    out_features, in_features = weight.shape
    return {
        "bias": torch.randn(out_features).to(x.dtype),
        "norm_weight": torch.randn(in_features).to(x.dtype),
        "norm_bias": torch.randn(in_features).to(x.dtype),
        "residual": torch.randn(*x.shape[:-1], out_features).to(x.dtype),
    }


def magnitude(x: Tensor, weight: Tensor, expected: Tensor, **options: Any) -> Tensor:
    """The larger of the results and the norm of the products that were summed: sums that cancel keep that error."""
    x = x.double()
    if options.get("norm_weight") is not None:
        x = reference.layer_norm(x, options["norm_weight"], options["norm_bias"], options.get("norm_eps", 1e-5))
    terms = (x.square() @ weight.double().square().T).sqrt()
    return torch.maximum(terms.max(), expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if terms.numel() else terms.sum()


def check(x: Tensor, weight: Tensor, size: Tensor | float | None = None, **options: Any) -> None:
    actual = ops.linear(x, ops.pack(weight), **options)
    expected = reference.linear(x, weight, **options)
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    assert_close(
        actual,
        expected,
        budget_from=reference.same_dtype(reference.linear, x, weight, **options),
        magnitude=magnitude(x, weight, expected, **options) if size is None else size,
    )


@pytest.mark.parametrize("shape", shapes.LINEAR, ids=str)
def test_product(shape: shapes.Linear, dtype: torch.dtype, isa: str) -> None:
    check(*operands(*shape, dtype))


@pytest.mark.parametrize("shape", shapes.LINEAR[::3], ids=str)
def test_everything_fused(shape: shapes.Linear, dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(*shape, dtype)
    check(x, weight, activation="gelu_pytorch_tanh", **everything(x, weight))


@pytest.mark.parametrize("shape", shapes.LINEAR_REAL, ids=str)
def test_shapes_of_real_models(shape: shapes.Linear, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and shape.out_features * shape.in_features > 1 << 22:
        dtype = torch.bfloat16  # PyTorch's own float16 product, which the budget needs, takes seconds here
    x, weight = operands(*shape, dtype)
    check(x, weight, size=shape.in_features**0.5, bias=torch.randn(shape.out_features).to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 7, 26])
def test_activations(activation: str, rows: int, dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(rows, 77, 40, dtype)
    check(x, weight, bias=torch.randn(77).to(dtype), activation=activation)


@pytest.mark.parametrize("name, same", [("gelu_new", "gelu_pytorch_tanh"), ("gelu_fast", "gelu_pytorch_tanh")])
def test_other_names_of_an_activation(name: str, same: str, dtype: torch.dtype) -> None:
    x, weight = operands(2, 9, 8, dtype)
    packed = ops.pack(weight)
    assert_equal_bits(ops.linear(x, packed, activation=name), ops.linear(x, packed, activation=same))


@pytest.mark.parametrize("leave_out", ["bias", "norm_bias", "residual"])
def test_options_one_by_one(leave_out: str, dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(9, 45, 67, dtype)
    check(x, weight, **{**everything(x, weight), leave_out: None})


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_norm_eps(eps: float, dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(3, 20, 30, dtype)
    options = everything(x, weight)
    check(x * 0.1, weight, norm_eps=eps, **options)


def test_norm_of_a_row_far_from_zero(isa: str) -> None:
    """A variance from the difference of two large sums would have no digits left here."""
    x, weight = operands(5, 16, 96, torch.float32)
    x = (x * 64).round() / 64 + 4096.0
    options = everything(x, weight)
    actual = ops.linear(x, ops.pack(weight), **options)
    assert_close(actual, reference.linear(x, weight, **options), tolerance=1e-3)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 4), (0,), (2, 0)])
def test_leading_dimensions(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(*leading, 24).to(dtype), torch.randn(18, 24).to(dtype)
    y = ops.linear(x, ops.pack(weight), **everything(x, weight))
    assert y.shape == (*leading, 18)
    assert y.dtype == dtype
    check(x, weight)


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_in_memory_does_not_matter(layout: str, dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(14, 50, 37, dtype)
    options = everything(x, weight)
    packed = ops.pack(weight)
    expected = ops.linear(x, packed, activation="silu", **options)
    place = hostile.LAYOUTS[layout]
    placed = {name: place(tensor) for name, tensor in options.items()}
    assert_equal_bits(ops.linear(place(x), packed, activation="silu", **placed), expected)


def test_expanded_input_and_residual(dtype: torch.dtype) -> None:
    x, weight = torch.randn(1, 24).to(dtype).expand(5, 24), torch.randn(18, 24).to(dtype)
    check(x, weight, residual=torch.randn(18).to(dtype).expand(5, 18))


@pytest.mark.parametrize("activation", ["none", "gelu", "mish"])
@pytest.mark.parametrize("in_features", [64, 513, 1100])
def test_a_row_has_the_same_bits_in_any_batch(in_features: int, activation: str, dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(37, 70, in_features, dtype)
    options = everything(x, weight)
    packed = ops.pack(weight)
    residual = options.pop("residual")
    whole = ops.linear(x, packed, activation=activation, residual=residual, **options)
    for rows in (1, 2, 3, 4, 5, 8, 12, 13, 25):
        for first in (0, 37 - rows):
            part = slice(first, first + rows)
            alone = ops.linear(x[part], packed, activation=activation, residual=residual[part], **options)
            assert_equal_bits(alone, whole[part], name=f"rows {first}..{first + rows - 1}")


def test_a_row_has_the_same_bits_in_a_very_large_batch(dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(1700, 64, 72, dtype)
    packed = ops.pack(weight)
    whole = ops.linear(x, packed)
    for row in (0, 1, 767, 768, 769, 1535, 1536, 1699):
        assert_equal_bits(ops.linear(x[row], packed), whole[row], name=f"row {row}")


@pytest.mark.parametrize("rows", [1, 5, 150])
def test_threads_and_repetition_do_not_change_bits(rows: int, dtype: torch.dtype, isa: str, threads: None) -> None:
    x, weight = operands(rows, 1000, 400, dtype)
    options = everything(x, weight)
    packed = ops.pack(weight)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.linear(x, packed, activation="gelu_pytorch_tanh", **options))
    for result in results[1:]:
        assert_equal_bits(result, results[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm", [False, True])
def test_a_bad_row_does_not_reach_the_others(bad: float, norm: bool, dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(14, 33, 29, dtype)
    options = everything(x, weight) if norm else {}
    packed = ops.pack(weight)
    clean = ops.linear(x, packed, **options)
    x[5, 3] = bad
    dirty = ops.linear(x, packed, **options)
    keep = torch.arange(14) != 5
    assert_equal_bits(dirty[keep], clean[keep])
    assert not dirty[5].isfinite().any()


def test_a_bad_weight_row_does_not_reach_the_other_columns(dtype: torch.dtype, isa: str) -> None:
    x, weight = operands(5, 45, 29, dtype)
    clean = ops.linear(x, ops.pack(weight))
    weight[44] = torch.nan
    dirty = ops.linear(x, ops.pack(weight))
    assert_equal_bits(dirty[:, :44], clean[:, :44])
    assert dirty[:, 44].isnan().all()


def test_large_values_overflow_only_where_they_must(isa: str) -> None:
    x, weight = torch.full((3, 20), 1e18), torch.full((7, 20), 1e18)
    check(x, weight)
    assert ops.linear(x * 10, ops.pack(weight * 100)).isposinf().all()


def test_float16_sums_are_kept_in_float32(isa: str) -> None:
    """The partial sums pass 65504 on the way to a result that float16 can hold."""
    x, weight = torch.full((3, 64), 100.0).half(), torch.full((5, 64), 100.0).half()
    weight[:, 32:] *= -1
    assert (ops.linear(x, ops.pack(weight)) == 0).all()


WIDE = torch.cat(
    [
        torch.linspace(-100, 100, 20011),
        torch.linspace(-2, 2, 20011),
        torch.logspace(-45, 38, 4001),
        -torch.logspace(-45, 38, 4001),
        torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38]),
    ]
)
EXACT = {  # the same functions, written so that float64 does not cancel where they are small
    **reference.ACTIVATIONS,
    "gelu_pytorch_tanh": lambda x: x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3)),
    "gelu": lambda x: x * torch.special.erfc(-x * 0.5**0.5) / 2,
    "gelu_10": lambda x: (x * torch.special.erfc(-x * 0.5**0.5) / 2).clamp(max=10),
    "silu": lambda x: x * torch.sigmoid(x),
    "laplace": lambda x: torch.special.erfc((0.707107 - x) / 0.282095 * 0.5**0.5) / 2,
}
AMPLIFICATION = {  # how much larger the relative error of exp's argument is than that of x
    **dict.fromkeys(("gelu", "gelu_10", "gelu_pytorch_tanh"), torch.square),
    **dict.fromkeys(("silu", "quick_gelu", "mish", "sigmoid"), torch.abs),
    "laplace": lambda x: ((x - 0.707107) / 0.282095).square(),
}


@pytest.mark.parametrize("activation", EXACT)
def test_activations_are_accurate_to_float32_everywhere(activation: str, isa: str) -> None:
    """Relative error, element by element. exp(-x^2) amplifies the rounding of its argument, hence the factor."""
    actual = ops.linear(torch.ones(1, 1), ops.pack(WIDE[:, None]), activation=activation)[0]
    x = WIDE.double()
    expected = EXACT[activation](x)
    amplification = AMPLIFICATION.get(activation, torch.zeros_like)(x)
    size = expected.abs() * (1 + amplification.clamp(max=200) / 4) + 1e-30
    assert_close(actual, expected, magnitude=size, tolerance=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_special_values(activation: str, isa: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    actual = ops.linear(torch.ones(1, 1), ops.pack(x[:, None]), activation=activation)[0]
    expected = reference.ACTIVATIONS[activation](x.double())
    assert actual[0].isnan()
    known = ~expected.isnan()  # at -inf those that are x times a share are 0 * inf
    assert known[[1, 3, 4]].all()
    assert_close(actual[known], expected[known], tolerance=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 24).to(dtype), torch.randn(40, 24).to(dtype)
    o = everything(x, weight) if full else {}
    args = (x, ops.pack(weight).data, 40, o.get("bias"), o.get("norm_weight"), o.get("norm_bias"), 1e-5, 1)
    torch.library.opcheck(torch.ops.alula.linear, (*args, o.get("residual")))


def test_meta_device_gives_the_shape() -> None:
    x, packed = torch.empty(2, 3, 24, device="meta"), torch.empty(2, 24, 32, device="meta")
    y = torch.ops.alula.linear(x, packed, 40, None, None, None, 1e-5, 0, None)
    assert y.shape == (2, 3, 40)
    assert y.device.type == "meta"


@pytest.mark.parametrize("which", ["x", "bias", "norm_weight", "norm_bias", "residual"])
def test_gradients_are_refused(which: str) -> None:
    x, weight = operands(2, 6, 8, torch.float32)
    arguments = {"x": x, **everything(x, weight)}
    arguments[which].requires_grad_()
    packed = ops.pack(weight)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        ops.linear(weight=packed, **arguments)
    assert not ops.linear(weight=packed, **arguments).requires_grad


def test_packing_a_parameter_is_refused_while_gradients_are_on() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        ops.pack(weight)
    assert_equal_bits(ops.pack(weight).unpack(), weight.detach())
