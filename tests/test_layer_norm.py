"""layer_norm: LN(x + residual) over the last dimension, float32 inside."""

import pytest
import torch
from alula import ops
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor


def operands(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, residual"""
    x, residual = torch.randn(2, rows, width).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype)
    return x, weight, bias, residual


def check(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor:
    """Within 1e-6 of the largest element of a row counted in deviations of that row: the mean is rounded like that."""
    actual = ops.layer_norm(x, weight, bias, eps, residual=residual)
    expected = reference.layer_norm(x, weight, bias, eps, residual=residual)
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    z = x.double() if residual is None else x.double() + residual.double()
    largest = z.abs().amax(-1, keepdim=True) / (z.var(-1, correction=0, keepdim=True) + eps).sqrt()
    size = largest * weight.double().abs().max() + (0.0 if bias is None else bias.double().abs().max())
    assert_close(actual, expected, magnitude=size, tolerance=1e-6)
    return actual


@pytest.mark.parametrize("width", shapes.NORM_WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_against_the_reference(rows: int, width: int, dtype: torch.dtype, isa: str) -> None:
    x, weight, bias, residual = operands(rows, width, dtype)
    check(x, weight)
    check(x, weight, bias)
    check(x, weight, bias, residual=residual)
    check(x, weight, residual=residual)


@pytest.mark.parametrize("width", shapes.NORM_WIDTHS_REAL)
def test_shapes_of_real_models(width: int, dtype: torch.dtype) -> None:
    x, weight, bias, residual = operands(9, width, dtype)
    check(x, weight, bias, residual=residual)


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1.0])
def test_eps(eps: float, dtype: torch.dtype, isa: str) -> None:
    x, weight, bias, _ = operands(5, 40, dtype)
    check(x * 0.01, weight, bias, eps)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 4)])
def test_leading_dimensions(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(*leading, 24).to(dtype), torch.randn(24).to(dtype)
    assert check(x, weight, residual=x).shape == x.shape


@pytest.mark.parametrize("offset", [100.0, 4096.0, -30000.0])
def test_rows_far_from_zero(offset: float, isa: str) -> None:
    """The mean is much larger than the deviation. One pass (E[x^2] - E[x]^2) would have no digits left."""
    x, weight, bias, _ = operands(4, 1031, torch.float32)
    x = (x * 64).round() / 64 + offset
    check(x, weight, bias)


def test_large_and_small_rows(isa: str) -> None:
    x, weight, bias, _ = operands(4, 97, torch.float32)
    check(x * 1e15, weight, bias)
    check(x * 1e-15, weight, bias, 1e-35)


def test_constant_rows_give_the_bias(dtype: torch.dtype, isa: str) -> None:
    """No deviation at all: the quotient is 0 / sqrt(eps), neither NaN nor a rounding error blown up."""
    _, weight, bias, _ = operands(1, 96, dtype)
    x = torch.tensor([0.0, 3.0, -0.5, 1024.0])[:, None].expand(4, 96).to(dtype)
    assert_equal_bits(ops.layer_norm(x, weight, bias), bias.expand(4, 96).contiguous())


def test_residual_is_added_in_float32(isa: str) -> None:
    """256 + 1 is 256 in bfloat16: the sum must not be rounded before it is normed."""
    x = torch.full((2, 64), 256.0).bfloat16()
    residual = torch.ones(2, 64).bfloat16() * torch.arange(64).remainder(2)
    check(x, torch.ones(64).bfloat16(), torch.zeros(64).bfloat16(), residual=residual)


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_in_memory_does_not_matter(layout: str, dtype: torch.dtype, isa: str) -> None:
    x, weight, bias, residual = operands(9, 37, dtype)
    expected = ops.layer_norm(x, weight, bias, residual=residual)
    place = hostile.LAYOUTS[layout]
    actual = ops.layer_norm(place(x), place(weight), place(bias), residual=place(residual))
    assert_equal_bits(actual, expected)
    three = x.view(3, 3, 37).transpose(0, 1)
    assert_equal_bits(ops.layer_norm(three, weight), ops.layer_norm(three.contiguous(), weight))


def test_expanded_input(dtype: torch.dtype) -> None:
    x, weight, bias, _ = operands(1, 40, dtype)
    check(x.expand(6, 40), weight, bias, residual=bias.expand(6, 40))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_does_not_reach_the_others(bad: float, dtype: torch.dtype, isa: str) -> None:
    x, weight, bias, residual = operands(9, 37, dtype)
    clean = ops.layer_norm(x, weight, bias, residual=residual)
    x[4, 36] = bad
    dirty = ops.layer_norm(x, weight, bias, residual=residual)
    keep = torch.arange(9) != 4
    assert_equal_bits(dirty[keep], clean[keep])
    assert dirty[4].isnan().all()


def test_rows_threads_and_repetition_do_not_change_bits(dtype: torch.dtype, isa: str, threads: None) -> None:
    x, weight, bias, residual = operands(300, 515, dtype)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.layer_norm(x, weight, bias, residual=residual))
    for result in results[1:]:
        assert_equal_bits(result, results[0])
    assert_equal_bits(ops.layer_norm(x[7], weight, bias, residual=residual[7]), results[0][7])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = ops.layer_norm(torch.zeros(shape, dtype=dtype), torch.ones(8, dtype=dtype))
    assert out.shape == shape
    assert out.dtype == dtype


def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias, residual = operands(6, 24, dtype)
    torch.library.opcheck(torch.ops.alula.layer_norm, (x, weight, None, 1e-5, None))
    torch.library.opcheck(torch.ops.alula.layer_norm, (x.view(2, 3, 24), weight, bias, 1e-5, residual.view(2, 3, 24)))
    torch.library.opcheck(torch.ops.alula.layer_norm, (torch.randn(24, 5).to(dtype).T, weight, bias, 1e-5, None))


@pytest.mark.parametrize("which", ["x", "weight", "bias", "residual"])
def test_gradients_are_refused(which: str) -> None:
    arguments = dict(zip(("x", "weight", "bias", "residual"), operands(3, 8, torch.float32), strict=True))
    arguments[which].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        ops.layer_norm(**arguments)
    assert not ops.layer_norm(**arguments).requires_grad
