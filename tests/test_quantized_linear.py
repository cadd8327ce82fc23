"""linear, qkv_projection and embedding with quantized weights: every format, instruction set, dtype and epilogue."""

import pytest
import torch
from alula import ops
from alula.testing import hostile, quantized, reference
from alula.testing.compare import assert_close, assert_equal_bits
from quantized_cases import FORMATS
from torch import Tensor

each_format = pytest.mark.parametrize("format, group_size", FORMATS, ids=lambda value: str(value))
each_mode = pytest.mark.parametrize("activations", ["int8", "full"])
SHAPES = [(1, 33, 19), (2, 64, 64), (5, 31, 255), (12, 70, 256), (13, 65, 257), (37, 97, 515), (3, 32, 1031)]
OPTIONS = ["bias", "norm_weight", "norm_bias", "residual"]


def everything(x: Tensor, out_features: int) -> dict[str, Tensor]:
    k = x.shape[-1]
    return {
        "bias": torch.randn(out_features).to(x.dtype),
        "norm_weight": torch.randn(k).to(x.dtype),
        "norm_bias": torch.randn(k).to(x.dtype),
        "residual": torch.randn(*x.shape[:-1], out_features).to(x.dtype),
    }


def check_budget(x: Tensor, packed: ops.PackedWeight, activation: str = "none", **options: Tensor) -> None:
    """Against the product with the dequantized weight: within the rounding of the activations, of a float32 sum, and
    of storing the result."""
    actual = ops.linear(x, packed, activation=activation, **options)
    weight = quantized.dequantize(packed)
    expected = reference.linear(x, weight, activation=activation, **options)
    normed = x.double()
    if options.get("norm_weight") is not None:
        normed = reference.layer_norm(x, options["norm_weight"], options.get("norm_bias"), 1e-5)
    terms = normed.abs() @ weight.abs().T
    linear = {name: value for name, value in options.items() if name != "residual"}
    allowed = quantized.through_activation(
        quantized.activation_budget(normed, packed) + 2e-6 * terms,
        reference.linear(x, weight, **linear),
        activation,
    )
    rounding = expected.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).smallest_normal
    assert actual.dtype == x.dtype
    error = (actual.double() - expected).abs()
    assert (error <= allowed + rounding).all(), f"{float((error - allowed - rounding).max())} beyond the budget"


@each_mode
@each_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(shape, format, group_size, activations, isa) -> None:
    """Without a layer norm the integers are known: what is left is the rounding of float32 sums."""
    rows, n, k = shape
    x = torch.randn(rows, k)
    packed = ops.pack(torch.randn(n, k), format, group_size, activations=activations)
    if activations == "full":
        expected = x.double() @ quantized.dequantize(packed).T
    else:
        expected = quantized.round_activations(x, packed) @ quantized.stored_table(packed).T
    assert_close(ops.linear(x, packed), expected, tolerance=3e-6)


@each_mode
@each_format
@pytest.mark.parametrize("rows", [1, 14])
def test_everything_fused(rows, format, group_size, activations, dtype, isa) -> None:
    x = torch.randn(rows, 195).to(dtype)
    packed = ops.pack(torch.randn(77, 195).to(dtype), format, group_size, activations=activations)
    check_budget(x, packed, "gelu_pytorch_tanh", **everything(x, 77))


@pytest.mark.parametrize("leave_out", OPTIONS)
@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_options_one_by_one(leave_out, format, dtype, isa) -> None:
    x = torch.randn(9, 130).to(dtype)
    options = everything(x, 45)
    options[leave_out] = None
    if leave_out == "norm_weight":
        options["norm_bias"] = None
    check_budget(x, ops.pack(torch.randn(45, 130), format), **options)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations(activation, dtype, isa) -> None:
    x = torch.randn(7, 100).to(dtype)
    check_budget(x, ops.pack(torch.randn(40, 100), "int8"), activation, bias=torch.randn(40).to(dtype))


@each_mode
@each_format
def test_a_weight_takes_activations_of_any_dtype(format, group_size, activations, dtype) -> None:
    packed = ops.pack(torch.randn(40, 64), format, group_size, activations=activations)
    x = torch.randn(3, 64).to(dtype)
    y = ops.linear(x, packed)
    assert y.dtype == dtype
    assert_equal_bits(y, ops.linear(x.float(), packed).to(dtype))


@each_mode
@each_format
@pytest.mark.parametrize("in_features", [64, 700])
def test_a_row_has_the_same_bits_in_any_batch(in_features, format, group_size, activations, isa) -> None:
    x = torch.randn(30, in_features)
    options = everything(x, 70)
    residual = options.pop("residual")
    packed = ops.pack(torch.randn(70, in_features), format, group_size, activations=activations)
    whole = ops.linear(x, packed, activation="gelu", residual=residual, **options)
    for rows in (1, 2, 4, 5, 7, 12, 13):
        for first in (0, 30 - rows):
            part = slice(first, first + rows)
            alone = ops.linear(x[part], packed, activation="gelu", residual=residual[part], **options)
            assert_equal_bits(alone, whole[part], name=f"rows {first}..{first + rows - 1}")


@each_mode
@each_format
def test_a_row_has_the_same_bits_in_a_very_large_batch(format, group_size, activations, isa) -> None:
    x = torch.randn(1600, 72)
    packed = ops.pack(torch.randn(40, 72), format, group_size, activations=activations)
    whole = ops.linear(x, packed)
    for row in (0, 767, 768, 1535, 1599):
        assert_equal_bits(ops.linear(x[row], packed), whole[row], name=f"row {row}")


@each_mode
@each_format
@pytest.mark.parametrize("rows", [1, 5, 60])
def test_threads_and_repetition_do_not_change_bits(rows, format, group_size, activations, isa, threads) -> None:
    x = torch.randn(rows, 400)
    options = everything(x, 500)
    packed = ops.pack(torch.randn(500, 400), format, group_size, activations=activations)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.linear(x, packed, **options))
    for result in results[1:]:
        assert_equal_bits(result, results[0])


@each_format
def test_integer_products_are_the_same_on_every_isa(format, group_size, isa) -> None:
    """Sums of integers are exact and the few float32 steps are the same: no instruction set rounds differently."""
    x = torch.sin(torch.arange(14 * 300).view(14, 300).float())
    packed = ops.pack(torch.cos(torch.arange(50 * 300).view(50, 300).float()), format, group_size)
    rounded, weight = quantized.round_activations(x, packed), quantized.stored_table(packed)
    assert_close(ops.linear(x, packed), rounded @ weight.T, tolerance=1e-6)


@each_mode
@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("norm", [False, True])
def test_a_bad_row_is_bad_and_does_not_reach_the_others(bad, norm, format, group_size, activations, isa) -> None:
    x = torch.randn(14, 290)
    packed = ops.pack(torch.randn(33, 290), format, group_size, activations=activations)
    options = everything(x, 33) if norm else {}
    clean = ops.linear(x, packed, **options)
    x[5, 288] = bad
    dirty = ops.linear(x, packed, **options)
    keep = torch.arange(14) != 5
    assert_equal_bits(dirty[keep], clean[keep])
    if activations == "int8":
        assert dirty[5].isnan().all()
    else:  # a weight of zero turns infinity into NaN, others keep it
        assert not dirty[5].isfinite().any()


@each_format
def test_a_loud_weight_row_does_not_reach_the_others(format, group_size, isa) -> None:
    x, weight = torch.randn(5, 300), torch.randn(64, 300)
    clean = ops.linear(x, ops.pack(weight, format, group_size))
    weight[7] *= 1000
    dirty = ops.linear(x, ops.pack(weight, format, group_size))
    rest = torch.arange(64) != 7
    assert_equal_bits(dirty[:, rest], clean[:, rest])


@each_format
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 1e36])
def test_activations_of_extreme_size(size, format, group_size, isa) -> None:
    x = torch.randn(3, 70).clamp(-4, 4) * size
    packed = ops.pack(torch.randn(40, 70) * 0.1, format, group_size)
    actual = ops.linear(x, packed)
    assert actual.isfinite().all()
    expected = quantized.round_activations(x, packed) @ quantized.stored_table(packed).T
    assert_close(actual, expected, magnitude=70 * float(x.abs().max()), tolerance=1e-6, floor=None if size else 0.0)


def test_an_activation_1000_times_larger_stays_in_its_block(isa) -> None:
    """The block's other activations lose digits, as said; other blocks and other rows do not."""
    packed = ops.pack(torch.randn(40, 512), "int8")
    x = torch.randn(3, 512)
    clean = ops.linear(x, packed)
    first, second = x.clone(), x.clone()
    first[:, 256:], second[:, :256] = 0, 0
    x[1, 300] = second[1, 300] = 1000.0
    dirty = ops.linear(x, packed)
    assert_equal_bits(dirty[[0, 2]], clean[[0, 2]])
    assert_close(dirty, ops.linear(first, packed).double() + ops.linear(second, packed), tolerance=1e-6)


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_in_memory_does_not_matter(layout, dtype, isa) -> None:
    x = torch.randn(14, 37).to(dtype)
    options = everything(x, 50)
    packed = ops.pack(torch.randn(50, 37), "int4")
    place = hostile.LAYOUTS[layout]
    placed = {name: place(tensor) for name, tensor in options.items()}
    assert_equal_bits(ops.linear(place(x), packed, **placed), ops.linear(x, packed, **options))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions(leading, dtype) -> None:
    packed = ops.pack(torch.randn(18, 24), "int8")
    assert ops.linear(torch.randn(*leading, 24).to(dtype), packed).shape == (*leading, 18)


@each_mode
@each_format
@pytest.mark.parametrize("tokens", [1, 13])
def test_qkv_projection_is_linear_and_a_split(tokens, format, group_size, activations, dtype, isa) -> None:
    batch, heads, kv_heads, head_dim, width, mlp_width = 2, 3, 1, 24, 80, 50
    features = (heads + 2 * kv_heads) * head_dim
    x = torch.randn(batch, tokens, width).to(dtype)
    packed = ops.pack(torch.randn(features + mlp_width, width).to(dtype), format, group_size, activations=activations)
    options = everything(x, features + mlp_width)
    del options["residual"]
    cache = torch.full((batch, kv_heads, tokens + 2, 2 * head_dim), torch.nan, dtype=dtype)
    positions = torch.arange(tokens, dtype=torch.int32).expand(batch, tokens).contiguous() + 1
    mlp = torch.empty(batch, tokens, mlp_width, dtype=dtype)
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    q = ops.qkv_projection(
        x, packed, kv_cache=cache, positions=positions, mlp=mlp, mlp_activation="relu", **shape, **options
    )
    y = ops.linear(x, packed, **options)
    assert_equal_bits(q, y[..., : heads * head_dim].reshape(q.shape))
    assert_equal_bits(cache[:, 0, 1:-1], y[..., heads * head_dim : features].contiguous())
    assert cache[:, :, [0, -1]].isnan().all()
    assert_equal_bits(mlp, y[..., features:].relu())


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_qkv_projection_turns(format, isa) -> None:
    heads, head_dim, tokens, width = 4, 16, 5, 96
    x = torch.randn(1, tokens, width)
    packed = ops.pack(torch.randn(3 * heads * head_dim, width), format)
    cache = torch.zeros(1, heads, tokens, 2 * head_dim)
    positions = torch.arange(tokens, dtype=torch.int32)[None]
    table = ops.rotary_table(64, 8)
    shape = {"num_heads": heads, "num_kv_heads": heads, "head_dim": head_dim}
    q = ops.qkv_projection(
        x, packed, kv_cache=cache, positions=positions, rotary_table=table, rotary_positions=positions + 7, **shape
    )
    plain_q, plain_k, _ = ops.linear(x, packed).view(1, tokens, 3, heads, head_dim).unbind(2)
    turned_q, turned_k = reference.rotary(plain_q, plain_k, positions + 7, table)
    assert_close(q, turned_q, tolerance=1e-6)
    assert_close(cache[..., :head_dim].transpose(1, 2), turned_k, tolerance=1e-6)


@each_format
@pytest.mark.parametrize("width", [1, 33, 130, 1100])
def test_embedding_reads_rows(width, format, group_size, dtype, isa) -> None:
    table = ops.pack(torch.randn(70, width).to(dtype), format, group_size)
    ids = torch.tensor([[0, 69, 31, 32], [7, 7, 15, 16]])
    rows = quantized.dequantize(table)
    assert_equal_bits(ops.embedding(ids, table), rows[ids].float().to(dtype))
    positions = torch.randn(5, width).to(dtype)
    where = torch.tensor([[0, 4, 2, 1]])
    actual = ops.embedding(ids, table, position_ids=where, position_table=positions, token_type_ids=ids.flip(0))
    expected = reference.embedding(ids, rows, position_ids=where, position_table=positions, token_type_ids=ids.flip(0))
    assert_close(actual, expected, tolerance=1e-6)
    types = {"token_type_ids": ids % 2, "token_type_table": torch.randn(2, width).to(dtype), "scale": 3.0}
    assert_close(ops.embedding(ids, table, **types), reference.embedding(ids, rows, **types), tolerance=1e-6)


@each_mode
@each_format
def test_opcheck(format, group_size, activations, dtype) -> None:
    x = torch.randn(2, 3, 72).to(dtype)
    packed = ops.pack(torch.randn(40, 72), format, group_size, activations=activations)
    o = everything(x, 40)
    args = (x, packed.data, 40, o["bias"], o["norm_weight"], o["norm_bias"], 1e-5, 1, o["residual"], packed.code)
    torch.library.opcheck(torch.ops.alula.linear, args)
    cache = torch.zeros(2, 1, 3, 16).to(dtype)
    positions = torch.arange(3, dtype=torch.int32).expand(2, 3).contiguous()
    args = (x, packed.data, o["bias"], None, None, 1e-5, 3, 1, 8, cache, positions, None, None, None, 0, packed.code)
    torch.library.opcheck(torch.ops.alula.qkv_projection, args)
    ids = torch.tensor([[1, 39]])
    args = (ids, packed.data, 40, 72, None, None, None, None, 1.0, packed.code, dtype)
    torch.library.opcheck(torch.ops.alula.embedding, args)


BAD = {
    "truncated": (lambda p: p._replace(data=p.data[:, :-64].contiguous()), "truncated|quantize_weight"),
    "another number of rows": (lambda p: p._replace(out_features=80), "quantize_weight"),
    "dense code": (lambda p: p._replace(code=0), "quantized"),
    "another format": (lambda p: p._replace(code=ops.pack(torch.randn(40, 72), "nf4").code), "quantize_weight"),
    "unknown kind": (lambda p: p._replace(code=9), "format code 9 is unknown"),
    "unknown bits": (lambda p: p._replace(code=p.code + 32), "is unknown"),
    "negative code": (lambda p: p._replace(code=-1), "is unknown"),
    "group size": (lambda p: p._replace(code=2 + 256 * 48), "group_size 48"),
    "not bytes": (lambda p: p._replace(data=p.data.float()), "Byte"),
    "not contiguous": (lambda p: p._replace(data=p.data.repeat(1, 2)[:, ::2]), "quantize_weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused(name: str) -> None:
    change, words = BAD[name]
    bad = change(ops.pack(torch.randn(40, 72), "int8"))
    x = torch.randn(2, 3, 72)
    with pytest.raises(RuntimeError, match=words):
        ops.linear(x, bad)
    with pytest.raises(RuntimeError, match=words):
        ops.embedding(torch.tensor([[1]]), bad)
    cache = torch.zeros(2, 1, 3, 16)
    positions = torch.zeros(2, 3, dtype=torch.int32)
    if bad.out_features == 40:
        with pytest.raises(RuntimeError, match=words):
            ops.qkv_projection(x, bad, num_heads=3, num_kv_heads=1, head_dim=8, kv_cache=cache, positions=positions)


def test_bad_arguments_beside_a_quantized_weight() -> None:
    packed = ops.pack(torch.randn(40, 72), "int8")
    with pytest.raises(ValueError, match="72"):
        ops.linear(torch.randn(2, 71), packed)
    with pytest.raises(RuntimeError, match="x has dtype Double"):
        ops.linear(torch.randn(2, 72).double(), packed)
    with pytest.raises(RuntimeError, match="bias has dtype Float; x asks for BFloat16"):
        ops.linear(torch.randn(2, 72).bfloat16(), packed, torch.randn(40))
    with pytest.raises(RuntimeError, match="dtype is missing"):
        ops.embedding(torch.tensor([[1]]), packed._replace(value_dtype=None))
    with pytest.raises(RuntimeError, match="position_table has dtype BFloat16"):
        ops.embedding(
            torch.tensor([[1]]),
            packed,
            position_ids=torch.tensor([[1]]),
            position_table=torch.randn(3, 72).bfloat16(),
        )
