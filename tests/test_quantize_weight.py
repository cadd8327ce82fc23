"""quantize_weight and dequantize_weight: the bytes of every format, what they mean, and what is refused."""

import pytest
import torch
from alula import ops
from alula.testing import hostile, quantized
from alula.testing.compare import assert_equal_bits
from quantized_cases import FORMATS

SHAPES = [(1, 1), (1, 17), (31, 2), (32, 32), (33, 65), (65, 127), (64, 128), (3, 1031), (97, 257)]
each_format = pytest.mark.parametrize("format, group_size", FORMATS, ids=lambda value: str(value))


@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_reads_the_bytes_as_the_reference_does(format, group_size, shape, dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = ops.pack(weight, format, group_size)
    assert (packed.format, packed.dtype, packed.activations) == (format, dtype, "int8")
    assert packed.group_size == (group_size or (64 if format == "nf4" else 0))
    exact = quantized.dequantize(packed)
    assert exact.shape == shape
    assert_equal_bits(packed.unpack(torch.float32), exact.float())
    assert packed.unpack().dtype == dtype
    assert_equal_bits(packed.unpack(), exact.float().to(dtype))


@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_every_code_is_the_nearest(format, group_size, shape, scale) -> None:
    weight = torch.randn(shape) * scale
    packed = ops.pack(weight, format, group_size)
    _, scales, least = (t[: shape[0], : shape[1]] for t in quantized.codes_and_scales(packed))
    found, best = quantized.dequantize(packed), quantized.nearest(weight, scales, least, format)
    # Two codes as near as float32 can tell: the larger distance is larger by its rounding.
    slack = 1e-5 * scales.abs() + 2.0**-22 * (weight.abs() + least.abs())
    assert ((found - weight.double()).abs() <= (best - weight.double()).abs() + slack).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_int8_is_within_half_a_step(shape, scale) -> None:
    weight = torch.randn(shape) * scale
    step = weight.abs().amax(1, keepdim=True) / 127
    error = (quantized.dequantize(ops.pack(weight, "int8")) - weight.double()).abs()
    assert (error <= step * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("format, group_size", [case for case in FORMATS if case[0] != "int8"], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (33, 65), (3, 1031), (97, 257)], ids=str)
def test_no_group_is_worse_than_with_the_scale_everything_fits_in(format, group_size, shape) -> None:
    weight = torch.randn(shape) * torch.rand(shape).exp()
    packed = ops.pack(weight, format, group_size)

    def group_errors(value: torch.Tensor) -> torch.Tensor:
        off = (value - weight.double()).square()
        return (
            torch.nn.functional.pad(off, (0, -shape[1] % packed.group_size))
            .unflatten(1, (-1, packed.group_size))
            .sum(-1)
        )

    found, plain = (group_errors(v) for v in (quantized.dequantize(packed), quantized.full_range(weight, packed)))
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() < plain.sum()


@pytest.mark.parametrize("format, most", [("int8", 0.01), ("int4", 0.11), ("int4_asymmetric", 0.11), ("nf4", 0.1)])
def test_relative_error_of_normal_weights(format: str, most: float) -> None:
    weight = torch.randn(96, 768)
    error = quantized.dequantize(ops.pack(weight, format)) - weight
    assert error.norm() / weight.norm() < most


def test_a_finer_group_and_a_least_value_help() -> None:
    weight = torch.randn(64, 1024) * torch.rand(1, 1024).exp() + 0.5

    def error(format: str, group_size: int) -> float:
        return float((quantized.dequantize(ops.pack(weight, format, group_size)) - weight).norm())

    assert error("int4", 32) < error("int4", 64) < error("int4", 128)
    assert error("int4_asymmetric", 64) < error("int4", 64)


@each_format
def test_quantizing_twice_changes_little(format, group_size) -> None:
    once = ops.pack(torch.randn(70, 200), format, group_size).unpack()
    twice = ops.pack(once, format, group_size).unpack()
    torch.testing.assert_close(twice, once, rtol=2e-3, atol=2e-3)


def test_zeros_stay_zeros(dtype) -> None:
    for format, group_size in FORMATS:
        packed = ops.pack(torch.zeros(40, 70, dtype=dtype), format, group_size)
        assert (packed.unpack() == 0).all(), format
    spread = torch.randn(40, 256)
    spread[:, ::3] = 0
    for format in ("int8", "int4", "nf4"):
        assert (ops.pack(spread, format).unpack()[:, ::3] == 0).all(), format


def test_a_row_1000_times_larger_does_not_reach_its_neighbours() -> None:
    weight = torch.randn(64, 300)
    loud = weight.clone()
    loud[7] *= 1000
    rest = torch.arange(64) != 7
    for format, group_size in FORMATS:
        clean, dirty = (ops.pack(w, format, group_size).unpack() for w in (weight, loud))
        assert_equal_bits(dirty[rest], clean[rest], name=format)


def test_a_column_1000_times_larger_stays_in_its_group() -> None:
    weight = torch.randn(40, 256)
    loud = weight.clone()
    loud[:, 100] *= 1000  # group 1 of 64
    rest = torch.arange(256) // 64 != 1
    for format in ("int4", "int4_asymmetric", "nf4"):
        clean, dirty = (ops.pack(w, format, 64).unpack() for w in (weight, loud))
        assert_equal_bits(dirty[:, rest], clean[:, rest], name=format)


@each_format
@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_of_the_weight_does_not_matter(layout, format, group_size, dtype) -> None:
    weight = torch.randn(45, 67).to(dtype)
    viewed = hostile.LAYOUTS[layout](weight)
    assert_equal_bits(ops.pack(viewed, format, group_size).data, ops.pack(weight, format, group_size).data)


@each_format
def test_bytes_do_not_depend_on_isa_or_threads(format, group_size, isa, threads) -> None:
    weight = torch.linspace(-1, 1, 300 * 77).view(300, 77)
    torch.set_num_threads(1)
    one = ops.pack(weight, format, group_size).data
    torch.set_num_threads(2)
    assert_equal_bits(ops.pack(weight, format, group_size).data, one)


@each_format
def test_size(format, group_size) -> None:
    packed = ops.pack(torch.randn(64, 512), format, group_size)
    bits = {"int8": 8, "int4": 4 + 16 / (group_size or 1), "int4_asymmetric": 4 + 32 / (group_size or 1), "nf4": 4.25}
    header = 2 * 128 if format == "int8" else 0
    assert packed.nbytes == 64 * 512 * bits[format] / 8 + header


@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(bad, format, group_size, dtype) -> None:
    weight = torch.randn(40, 70).to(dtype)
    weight[33, 69] = bad
    with pytest.raises(RuntimeError, match=r"row 33 .*cannot be quantized"):
        ops.pack(weight, format, group_size)


@pytest.mark.parametrize("format", ["int4", "int4_asymmetric", "nf4"])
def test_values_beyond_fp16_scales_are_refused(format: str) -> None:
    with pytest.raises(RuntimeError, match=r"too large.*fp16"):
        ops.pack(torch.full((3, 8), 2e6) * torch.tensor([1.0, -1] * 4), format)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "int3"}, "unknown weight format 'int3'; accepted: dense, int8, int4"),
        ({"format": "int4", "group_size": 48}, "group_size 48 .*accepted: 32, 64, 128"),
        ({"format": "nf4", "group_size": 32}, "group_size 32 .*accepted: 64"),
        ({"format": "int8", "group_size": 64}, "group_size 64 .*it has no groups"),
        ({"format": "dense", "group_size": 64}, "it has no groups"),
        ({"format": "int8", "activations": "int4"}, "unknown activations 'int4'; accepted: int8, full"),
    ],
)
def test_bad_formats(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        ops.pack(torch.randn(4, 64), **options)


def test_bad_tensors() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        ops.pack(torch.randn(4), "int8")
    with pytest.raises(RuntimeError, match="dtype Double"):
        ops.pack(torch.randn(4, 4).double(), "int8")
    with pytest.raises(RuntimeError, match=r"quantized|dtype Byte"):
        ops.pack(ops.pack(torch.randn(4, 4), "int8").data, "int8")
    packed = ops.pack(torch.randn(40, 64), "int4")
    for change in (
        {"data": packed.data[:1]},
        {"data": packed.data[:, :-1]},
        {"data": packed.data.float()},
        {"out_features": 80},
        {"in_features": 200},
        {"code": ops.pack(torch.randn(40, 64), "int4_asymmetric").code},
    ):
        with pytest.raises(RuntimeError, match=r"(?i)quantize_weight|quantized weight"):
            packed._replace(**change).unpack()
    with pytest.raises(RuntimeError, match="format code"):
        packed._replace(code=15).unpack()
    with pytest.raises(RuntimeError, match="dtype is Long"):
        packed.unpack(torch.int64)


def test_activation_modes() -> None:
    packed = ops.pack(torch.randn(4, 4), "int4")
    full = packed.with_activations("full")
    assert (packed.activations, full.activations) == ("int8", "full")
    assert full.data is packed.data
    assert full == ops.PackedWeight(packed.data, 4, 4, packed.code + 16, torch.float32)
    with pytest.raises(ValueError, match="dense"):
        ops.pack(torch.randn(4, 4)).with_activations("int8")


@each_format
def test_opcheck(format, group_size, dtype) -> None:
    weight = torch.randn(33, 130).to(dtype)
    packed = ops.pack(weight, format, group_size)
    torch.library.opcheck(torch.ops.alula.quantize_weight, (weight, packed.code))
    torch.library.opcheck(torch.ops.alula.dequantize_weight, (packed.data, 33, 130, packed.code, dtype))
