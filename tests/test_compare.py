"""The comparisons themselves: what they let pass and what they must not."""

import pytest
import torch
from alula.testing.compare import assert_close, assert_equal_bits

INF, NAN = float("inf"), float("nan")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_correct_rounding_passes(dtype: torch.dtype) -> None:
    expected = torch.randn(100, 7, dtype=torch.float64)
    assert_close(expected.to(dtype), expected)


@pytest.mark.parametrize("actual, expected", [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF), (NAN, INF)])
def test_special_values_must_match(actual: float, expected: float) -> None:
    with pytest.raises(AssertionError, match=r"first at \(1,\)"):
        assert_close(torch.tensor([0.0, actual]), f64(0.0, expected))


def test_equal_special_values_pass_and_do_not_hide_their_neighbours() -> None:
    actual = torch.tensor([NAN, INF, -INF, 1.0])
    assert_close(actual, actual.double())
    with pytest.raises(AssertionError, match=r"1 of 4 .* worst at \(3,\)"):
        assert_close(actual, f64(NAN, INF, -INF, 1.1))


def test_overflow_of_the_dtype_counts_as_inf() -> None:
    assert_close(torch.tensor([INF], dtype=torch.float16), f64(1e6))


def test_float32_tolerance_is_relative_to_the_magnitude() -> None:
    assert_close(torch.tensor([1000.0, 0.005]), f64(1000.0, 0.0))
    with pytest.raises(AssertionError, match=r"error 0\.02"):
        assert_close(torch.tensor([1000.0, 0.02]), f64(1000.0, 0.0))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1000.0, 0.005]), f64(1000.0, 0.0), magnitude=1.0)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1000.0, 0.005]), f64(1000.0, 0.0049), magnitude=f64(1000.0, 0.0049))


def test_low_precision_budget_comes_from_the_other_result() -> None:
    expected = torch.linspace(1, 2, 50, dtype=torch.float64)
    off = (expected + 0.03).bfloat16()
    with pytest.raises(AssertionError, match="50 of 50 elements are wrong"):
        assert_close(off, expected)
    assert_close(off, expected, budget_from=(expected - 0.02).bfloat16())
    with pytest.raises(AssertionError):
        assert_close(off, expected, budget_from=expected.bfloat16())


def test_float32_ignores_the_budget() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.01]), f64(1.0), budget_from=torch.tensor([2.0]))


def test_shape_and_reference_dtype_must_match() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(2), f64(0.0))
    with pytest.raises(AssertionError, match="float64"):
        assert_close(torch.zeros(1), torch.zeros(1))


def test_the_report_names_position_values_and_share() -> None:
    expected = torch.zeros(4, 5, dtype=torch.float64)
    actual = torch.zeros(4, 5)
    actual[1, 2], actual[3, 4] = 0.25, -0.5
    report = r"2 of 20 elements are wrong \(10 %\); worst at \(3, 4\): -0.5, expected 0.0"
    with pytest.raises(AssertionError, match=report):
        assert_close(actual, expected)


def test_empty_tensors_are_equal() -> None:
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64))
    assert_equal_bits(torch.zeros(0, 3), torch.zeros(0, 3))


def test_equal_bits_sees_the_sign_of_zero_and_nan_payloads() -> None:
    nans = torch.tensor([0x7FC0, 0x7FC1], dtype=torch.int16).view(torch.bfloat16)
    assert_equal_bits(nans, nans.clone())
    with pytest.raises(AssertionError, match=r"1 of 2 .*\(1,\)"):
        assert_equal_bits(nans, nans[:1].expand(2))
    with pytest.raises(AssertionError, match=r"\(0,\): -0.0, expected 0.0"):
        assert_equal_bits(torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 1.0]))
    with pytest.raises(AssertionError, match="dtype"):
        assert_equal_bits(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
