"""quantize_columns: each column is rounded as it should be given those before it, and what is refused."""

import pytest
import torch
from alula import ops
from alula.packed_weight import PackedWeight, format_code
from alula.testing import hostile, quantized
from alula.testing.compare import assert_equal_bits
from quantized_cases import FORMATS
from torch import Tensor

FOUR_BITS = [case for case in FORMATS if case[0] != "int8"]
each_format = pytest.mark.parametrize("format, group_size", FOUR_BITS, ids=lambda value: str(value))
SIZES = [(1, 1), (31, 7), (33, 32), (70, 29), (97, 31)]


def factor_of(columns: int) -> Tensor:
    """Upper triangular, with entries beside the diagonal as large as on it."""
    return torch.randn(columns, columns).triu(1) + torch.diag(0.5 + torch.rand(columns))


def as_packed(data: Tensor, n: int, columns: int, format: str, group_size: int | None) -> PackedWeight:
    return PackedWeight(data, n, columns, format_code(format, group_size), torch.float32)


@each_format
@pytest.mark.parametrize("size", [*SIZES, "whole"], ids=str)
def test_every_column_is_rounded_for_what_those_before_it_left(format, group_size, size) -> None:
    n, columns = (64, group_size or 64) if size == "whole" else size
    weight, factor = torch.randn(n, columns) * 0.1, factor_of(columns)
    data, errors = ops.quantize_columns(weight, factor, format, group_size)
    packed = as_packed(data, n, columns, format, group_size)
    found = quantized.dequantize(packed)
    left = quantized.compensated(weight, factor, errors)
    diagonal = factor.diagonal().double()
    slack = 1e-5 * (1 + errors.double().abs() @ factor.double().abs())  # sums of up to 128 terms in float32
    assert ((errors * diagonal - (left - found)).abs() <= slack).all()
    _, scales, least = (t[:n, :columns] for t in quantized.codes_and_scales(packed))
    best = quantized.nearest(left, scales, least, format)
    assert ((found - left).abs() <= (best - left).abs() + slack).all()
    # Scales are those of the group as it came.
    plain = quantized.codes_and_scales(ops.pack(weight, format, group_size))
    assert torch.equal(scales, plain[1][:n, :columns])
    assert torch.equal(least, plain[2][:n, :columns])


@each_format
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nothing_to_make_up_for_is_plain_rounding(format, group_size, size) -> None:
    weight = torch.randn(size)
    data, errors = ops.quantize_columns(weight, torch.eye(size[1]), format, group_size)
    plain = ops.pack(weight, format, group_size)
    assert_equal_bits(data, plain.data)
    torch.testing.assert_close(errors.double(), weight.double() - quantized.dequantize(plain), rtol=1e-5, atol=1e-6)


@each_format
def test_bytes_do_not_depend_on_isa_threads_or_layout(format, group_size, isa, threads) -> None:
    weight, factor = torch.linspace(-1, 1, 300 * 32).sin().view(300, 32), torch.eye(32) + 0.1
    torch.set_num_threads(1)
    one = ops.quantize_columns(weight, factor, format, group_size)
    torch.set_num_threads(2)
    for layout in hostile.LAYOUTS.values():
        for a, b in zip(ops.quantize_columns(layout(weight), layout(factor), format, group_size), one, strict=True):
            assert_equal_bits(a, b)


@each_format
def test_zeros(format, group_size) -> None:
    data, errors = ops.quantize_columns(torch.zeros(40, 32), factor_of(32), format, group_size)
    assert (as_packed(data, 40, 32, format, group_size).unpack() == 0).all()
    assert (errors == 0).all()
    data, errors = ops.quantize_columns(torch.zeros(0, 32), factor_of(32), format, group_size)
    assert len(data) == 0
    assert errors.shape == (0, 32)


@each_format
def test_below_the_diagonal_nothing_is_read(format, group_size) -> None:
    weight, factor = torch.randn(40, 32), factor_of(32)
    poisoned = torch.where(torch.ones(32, 32).tril(-1) > 0, torch.nan, factor)
    for a, b in zip(*(ops.quantize_columns(weight, f, format, group_size) for f in (factor, poisoned)), strict=True):
        assert_equal_bits(a, b)


def test_refusals() -> None:
    weight, factor = torch.randn(40, 32), torch.eye(32)
    for arguments, words in (
        ((weight, factor, "int8"), "format is int8; accepted: int4, int4_asymmetric, nf4"),
        ((weight, factor, "dense"), "format is dense; accepted"),
        ((weight.double(), factor, "int4"), "weight has dtype Double"),
        ((weight, factor.bfloat16(), "int4"), "factor has dtype BFloat16"),
        ((weight[0], factor, "int4"), r"weight has shape \[32\]"),
        ((weight, factor[:31], "int4"), r"factor has shape \[31, 32\]; expected \[columns, columns\] = \[32, 32\]"),
        ((weight[:, :0], factor[:0, :0], "int4"), "weight has 0 columns; a group has 1 to 64"),
        ((torch.randn(4, 65), torch.eye(65), "int4"), "weight has 65 columns; a group has 1 to 64"),
        ((weight, factor - torch.eye(32), "int4"), r"factor\[0\]\[0\] is 0; it must be positive"),
        ((weight, factor * torch.nan, "int4"), r"factor\[0\]\[0\] is -?nan"),
        ((weight * torch.inf, factor, "nf4"), "holds NaN, an infinity, or values too large for nf4"),
        ((torch.full((3, 8), 1e7), torch.eye(8), "int4"), "row . of the columns .* fp16"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.quantize_columns(*arguments)
    with pytest.raises(ValueError, match="unknown weight format 'int3'"):
        ops.quantize_columns(weight, factor, "int3")
    with pytest.raises(RuntimeError, match=r"on the CPU|meta|on device"):
        ops.quantize_columns(weight, factor.to("meta"), "int4")


@each_format
def test_opcheck(format, group_size) -> None:
    torch.library.opcheck(
        torch.ops.alula.quantize_columns, (torch.randn(33, 30), torch.eye(30), format_code(format, group_size))
    )
