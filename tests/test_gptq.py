"""GPTQ: second moments, the factor of their inverse, and packed weights whose products are nearer."""

from __future__ import annotations

import pytest
import torch
from alula import ops
from alula.gptq import SecondMoment, inverse_factor, pack_calibrated
from alula.testing import quantized
from alula.testing.compare import assert_equal_bits
from quantized_cases import FORMATS
from torch import Tensor

FOUR_BITS = [case for case in FORMATS if case[0] != "int8"]


def inputs(rows: int, width: int) -> Tensor:
    """Correlated, with channels of very different sizes, as those of a language model are."""
    mixed = torch.randn(rows, width // 2) @ torch.randn(width // 2, width) + 0.3 * torch.randn(rows, width)
    return mixed * torch.rand(width).mul(2).exp()


def moment(x: Tensor) -> Tensor:
    sums = SecondMoment(x.shape[-1])
    for part in x.split(100):
        sums.add(part.unsqueeze(0))
    return sums.whole()


@pytest.mark.parametrize("width", [1, 40, 1024, 1500, 2100])
def test_second_moment(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(350, width).to(dtype)
    exact = x.double().T @ x.double()
    found = moment(x)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.randn(50, 30)
    x[7, 11] = bad
    with pytest.raises(ValueError, match="inputs are not finite"):
        moment(x)


@pytest.mark.parametrize("width", [1, 90, 1025, 2500])
def test_factor_of_the_inverse(width: int) -> None:
    h = moment(inputs(2 * width, width) if width > 1 else torch.randn(5, 1))
    damped = h.double() / h.diagonal().double().mean() + 0.01 * torch.eye(width)
    factor = inverse_factor(h.clone())
    assert torch.equal(factor, factor.triu())
    unit = torch.eye(width).double()
    torch.testing.assert_close(factor.double().T @ factor.double() @ damped, unit, rtol=0, atol=2e-4)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e13])
def test_degenerate_moments_have_a_factor(scale: float) -> None:
    few = torch.randn(5, 64) * scale  # rank 5
    dead = torch.randn(200, 64) * scale
    dead[:, 10:30] = 0
    same = torch.randn(200, 1).expand(200, 64) * scale
    loud = torch.randn(200, 64) * scale
    loud[:, 3] *= 1e4
    for x in (few, dead, same, loud, torch.zeros(20, 64)):
        factor = inverse_factor(moment(x))
        assert torch.isfinite(factor).all()
        assert (factor.diagonal() > 0).all()


@pytest.mark.parametrize(("format", "group_size"), FOUR_BITS)
@pytest.mark.parametrize("shape", [(96, 256), (45, 200), (33, 37)], ids=str)
def test_products_are_nearer(format: str, group_size: int | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = inputs(600, shape[1]), (torch.randn(shape) * 0.05).to(dtype)
    plain = ops.pack(weight, format, group_size)
    found = pack_calibrated(weight, format, plain.group_size, "full", moment(x))
    assert (found.format, found.group_size, found.activations) == (format, plain.group_size, "full")
    assert found[1:3] == plain[1:3]
    assert found.data.shape == plain.data.shape
    assert found.dtype == dtype

    def error(packed: ops.PackedWeight) -> float:
        return float((x.double() @ (quantized.dequantize(packed) - weight.double()).T).norm())

    assert error(found) < 0.8 * error(plain)
    again = pack_calibrated(weight, format, plain.group_size, "full", moment(x))
    assert_equal_bits(again.data, found.data)


@pytest.mark.parametrize(("format", "group_size"), FOUR_BITS)
def test_every_column_is_rounded_for_what_all_before_it_left(format: str, group_size: int | None) -> None:
    """Over groups and within them, retraced in float64: each value is the nearest one that the group's scales have."""
    n, k = 45, 200
    weight, h = torch.randn(n, k) * 0.05, moment(inputs(600, k))
    group_size = ops.pack(weight, format, group_size).group_size
    packed = pack_calibrated(weight, format, group_size, "full", h.clone())
    factor, found = inverse_factor(h).double(), quantized.dequantize(packed)
    _, scales, least = (t[:n, :k] for t in quantized.codes_and_scales(packed))
    left = weight.double()
    for i in range(k):
        column = slice(i, i + 1)
        best = quantized.nearest(left[:, column], scales[:, column], least[:, column], format)
        off, slack = (found - left)[:, column].abs(), 1e-5 * (1 + scales[:, column])
        assert (off <= (best - left[:, column]).abs() + slack).all()
        left[:, i + 1 :] -= (left - found)[:, column] / factor[i, i] * factor[column, i + 1 :]


@pytest.mark.parametrize(("format", "group_size"), FOUR_BITS)
def test_inputs_that_know_nothing_of_each_other_give_plain_rounding(format: str, group_size: int | None) -> None:
    weight = torch.randn(40, 150)
    plain = ops.pack(weight, format, group_size)
    for h in (torch.eye(150), 3e5 * torch.eye(150), torch.zeros(150, 150)):
        assert_equal_bits(pack_calibrated(weight, format, plain.group_size, "int8", h).data, plain.data)


def test_dead_inputs_keep_their_weights() -> None:
    x = inputs(400, 128)
    x[:, 20:50] = 0
    weight = torch.randn(64, 128)
    found = quantized.dequantize(pack_calibrated(weight, "int4", 32, "full", moment(x)))
    plain = quantized.dequantize(ops.pack(weight, "int4", 32))
    off = (found - weight)[:, 20:50].norm()
    assert off < 1.5 * (plain - weight)[:, 20:50].norm()


def test_a_weight_that_no_format_holds() -> None:
    weight = torch.randn(40, 64)
    weight[33, 5] = torch.nan
    with pytest.raises(RuntimeError, match=r"row 33 .*cannot be quantized"):
        pack_calibrated(weight, "int4", 64, "int8", torch.eye(64))
