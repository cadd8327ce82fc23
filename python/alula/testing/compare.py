"""Comparisons that know how much error a dtype is allowed, and say where and how much when it is exceeded.

float32 and float64: a fixed small multiple of the magnitude involved.
bfloat16 and float16: the error budget, `factor` times the largest error of PyTorch computing the same formula in the
same dtype, plus the one rounding that storing the exact result would cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the magnitude involved. 1e-5 is some 80 roundings of float32: long sums reach 30, an exp that lost
# its last bits, or a bfloat16 rounding on the way, is far beyond.
TOLERANCE = 1e-5


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    budget_from: Tensor | None = None,
    factor: float = 2.0,
    magnitude: Tensor | float | None = None,
    tolerance: float = TOLERANCE,
    floor: float | None = None,
    name: str = "",
) -> None:
    """Fails unless `actual` is as near to `expected` as its dtype allows. NaN and inf positions are compared first.

    actual: the result under test, any floating dtype; expected: the reference in float64, same shape.
    budget_from: PyTorch's result in the same dtype; used when `actual` is bfloat16 or float16.
    magnitude: what `tolerance` is relative to, a number or a tensor broadcastable to `expected`; the largest finite
    |expected| when None. `expected.abs()` makes the comparison relative element by element.
    floor: an absolute error always allowed; when None, `tolerance * magnitude` plus, for bfloat16 and float16,
    half a unit in the last place of each expected value.
    """
    assert actual.shape == expected.shape, f"{name} shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert expected.dtype == torch.float64, f"{name} the reference must be float64, not {expected.dtype}"
    _assert_same_specials(actual, expected.to(actual.dtype), name)
    if actual.numel() == 0:
        return
    finite = actual.isfinite()
    error = torch.where(finite, (actual.double() - expected).abs(), 0.0)
    allowed = torch.full_like(error, floor) if floor is not None else _floor(actual, expected, magnitude, tolerance)
    if actual.dtype in (torch.bfloat16, torch.float16) and budget_from is not None:
        assert budget_from.dtype == actual.dtype, f"{name} budget from {budget_from.dtype}, result {actual.dtype}"
        torch_error = torch.where(budget_from.isfinite() & finite, (budget_from.double() - expected).abs(), 0.0)
        allowed = allowed + factor * torch_error.max()
    bad = finite & (error > allowed)
    if bad.any():
        raise AssertionError(_report(actual, expected, error, allowed, bad, name))


def assert_equal_bits(actual: Tensor, expected: Tensor, *, name: str = "") -> None:
    """Fails unless both hold the same bits: NaN payloads and the sign of zero count."""
    assert actual.dtype == expected.dtype, f"{name} dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name} shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    bad = actual.contiguous().view(integers) != expected.contiguous().view(integers)
    if bad.any():
        error = (actual.double() - expected.double()).abs().nan_to_num(nan=torch.inf).masked_fill(~bad, -1.0)
        raise AssertionError(_report(actual, expected, error, torch.zeros_like(error), bad, name))


def _assert_same_specials(actual: Tensor, expected: Tensor, name: str) -> None:
    for what, is_special in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        bad = is_special(actual) != is_special(expected)
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            raise AssertionError(
                f"{name} {what} on one side only in {int(bad.sum())} of {bad.numel()} places ({_share(bad)}); "
                f"first at {index}: {actual[index].item()} and expected {expected[index].item()}"
            )


def _floor(actual: Tensor, expected: Tensor, magnitude: Tensor | float | None, tolerance: float) -> Tensor:
    size = torch.where(actual.isfinite(), expected.abs(), 0.0)
    if magnitude is None:
        magnitude = size.max()
    floor = tolerance * torch.as_tensor(magnitude, dtype=torch.float64).expand_as(size)
    info = torch.finfo(actual.dtype)
    subnormal_step = info.smallest_normal * info.eps  # also keeps an element-by-element tolerance alive at 0
    if actual.dtype in (torch.bfloat16, torch.float16):
        floor = floor + size * (info.eps / 2)
    return floor + subnormal_step


def _report(actual: Tensor, expected: Tensor, error: Tensor, allowed: Tensor, bad: Tensor, name: str) -> str:
    excess = torch.where(bad, error - allowed, -torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    return (
        f"{name} {int(bad.sum())} of {bad.numel()} elements are wrong ({_share(bad)}); worst at {index}: "
        f"{actual[index].item()!r}, expected {expected[index].item()!r}, error {error[index].item():.3g}, "
        f"allowed {allowed[index].item():.3g}; shape {tuple(actual.shape)}, {actual.dtype}"
    )


def _share(bad: Tensor) -> str:
    return f"{100.0 * bad.sum().item() / max(bad.numel(), 1):.3g} %"
