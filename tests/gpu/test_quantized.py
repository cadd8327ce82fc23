"""Quantized weights on a GPU: products, rows and whole weights against the dequantized weight, models against the CPU.

On CUDA activations are never rounded, so a model is compared with the CPU's `activations="full"`.
"""

from pathlib import Path
from typing import Any

import alula
import pytest
import torch
from alula import ops
from alula.ops import PackedWeight
from alula.testing import quantized, reference
from alula.testing.compare import assert_close, assert_equal_bits
from decoder_cases import LANGUAGE_MODELS, alula_model, hf_model, random_ids, worst
from quantized_cases import FORMATS
from test_linear import magnitude
from test_quantized_linear import everything
from test_simt_quantized import summed_weight
from torch import Tensor

each_format = pytest.mark.parametrize("format, group_size", FORMATS, ids=lambda value: str(value))
KINDS = ["int8", "int4", "int4_asymmetric", "nf4"]
# rows, out, in: tile +- 1, K over blocks, small tiles, large tiles, models' own.
SHAPES = [
    *((1, 33, 19), (9, 70, 257), (16, 31, 3101), (17, 33, 100), (200, 130, 515)),
    *((1, 768, 3072), (4, 2304, 2048), (16, 49280, 2048), (129, 2048, 8192), (1500, 8192, 2048)),
]


def on_gpu(packed: PackedWeight) -> PackedWeight:
    return packed._replace(data=packed.data.cuda())


def check_linear(x: Tensor, packed: PackedWeight, **options: Any) -> Tensor:
    """On the GPU, the reference too: in float64 a large one would take most of a test run on the CPU."""
    there = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    x, packed = x.cuda(), on_gpu(packed)
    actual, weight = ops.linear(x, packed, **there), quantized.dequantize(packed)
    expected = reference.linear(x, weight, **there)
    budget = reference.same_dtype(reference.linear, x, weight.to(x.dtype), **there)
    size = magnitude(x, summed_weight(packed), expected, **{"norm_bias": None, **there})
    assert_close(actual, expected, budget_from=budget, magnitude=size, tolerance=3e-6)
    return actual


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, int, int], format: str, dtype: torch.dtype) -> None:
    rows, n, k = shape
    x, packed = torch.randn(rows, k).to(dtype), ops.pack(torch.randn(n, k), format)
    check_linear(x, packed)
    check_linear(x, packed, activation="gelu_pytorch_tanh", **everything(x, n))


@each_format
def test_every_group_size(format: str, group_size: int | None, dtype: torch.dtype) -> None:
    for rows in (3, 40):
        check_linear(torch.randn(rows, 300).to(dtype), ops.pack(torch.randn(70, 300), format, group_size))


@pytest.mark.parametrize("format", KINDS)
def test_repetition_does_not_change_bits(format: str) -> None:
    """Which block of a split comes last differs from run to run; the result must not."""
    x, packed = torch.randn(3, 8192).bfloat16().cuda(), on_gpu(ops.pack(torch.randn(96, 8192), format))
    first = ops.linear(x, packed)
    for _ in range(50):
        assert_equal_bits(ops.linear(x, packed).cpu(), first.cpu())


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_qkv_projection(tokens: int, format: str, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, width, mlp_width = 16, 1, 64, 768, 200
    features = (heads + 2 * kv_heads) * head_dim + mlp_width
    x, packed = torch.randn(2, tokens, width).to(dtype), ops.pack(torch.randn(features, width), format)
    weight = quantized.dequantize(packed)
    positions = torch.arange(tokens, dtype=torch.int32).repeat(2, 1) + 1
    options = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_activation": "gelu",
        "positions": positions,
        "bias": torch.randn(features).to(dtype),
        "norm_weight": torch.randn(width).to(dtype),
        "rotary_table": ops.rotary_table(50, 32),
        "rotary_positions": positions,
    }
    cache = torch.zeros(2, kv_heads, tokens + 3, 2 * head_dim, dtype=dtype)
    mlp = torch.zeros(2, tokens, mlp_width, dtype=dtype)
    expected_cache, torch_cache, gpu_cache = cache.double(), cache.clone(), cache.cuda()
    expected_mlp, torch_mlp, gpu_mlp = mlp.double(), mlp.clone(), mlp.cuda()
    expected = reference.qkv_projection(x, weight, kv_cache=expected_cache, mlp=expected_mlp, **options)
    budget = reference.same_dtype(
        reference.qkv_projection, x, weight.to(dtype), kv_cache=torch_cache, mlp=torch_mlp, **options
    )
    there = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    q = ops.qkv_projection(x.cuda(), on_gpu(packed), kv_cache=gpu_cache, mlp=gpu_mlp, **there)
    size = max(width**0.5, expected.abs().max().item())
    assert_close(q.cpu(), expected, budget_from=budget, magnitude=size, name="query")
    assert_close(gpu_cache.cpu(), expected_cache, budget_from=torch_cache, magnitude=size, name="cache")
    assert_close(gpu_mlp.cpu(), expected_mlp, budget_from=torch_mlp, magnitude=size, name="mlp")


@each_format
@pytest.mark.parametrize("width", [1, 33, 768])
def test_bytes_and_values_are_those_of_the_cpu(
    width: int, format: str, group_size: int | None, dtype: torch.dtype
) -> None:
    weight, ids = torch.randn(70, width).to(dtype), torch.tensor([[0, 69, 31, 32, 15]])
    here, there = ops.pack(weight, format, group_size), ops.pack(weight.cuda(), format, group_size)
    assert there.data.is_cuda
    assert there.activations == "full"
    assert torch.equal(there.data.cpu(), here.data)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        assert_equal_bits(there.unpack(out).cpu(), here.unpack(out))
    assert_equal_bits(ops.embedding(ids.cuda(), there).cpu(), ops.embedding(ids, here))
    assert ops.embedding(torch.tensor([[0, 70]]).cuda(), there)[0, 1].isnan().all()


def test_weights_that_do_not_fit_are_refused() -> None:
    packed, x = on_gpu(ops.pack(torch.randn(40, 72), "int8")), torch.randn(2, 72).cuda()
    with pytest.raises(RuntimeError, match="truncated"):
        ops.linear(x, packed._replace(data=packed.data[:, :-64].contiguous()))
    with pytest.raises(RuntimeError, match="weight is on another device"):
        ops.linear(x, packed._replace(data=packed.data.cpu()))
    shifted = torch.empty(packed.data.numel() + 1, dtype=torch.uint8).cuda()[1:].view(packed.data.shape)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        ops.linear(x, packed._replace(data=shifted))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", KINDS)
@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_models_equal_the_cpu(cls: str, format: str, tmp_path: Path) -> None:
    ours = alula_model(hf_model(4, cls))
    ours.save_pretrained(tmp_path / "dense")
    ours.quantize(format, activations="full")
    ids = random_ids(ours, 2, 21)
    expected = ours(ids).logits
    whole = {name: slot.read() for name, slot in ours._stored_slots()[0].items()}
    ours.to("cuda")
    assert worst(ours(ids.cuda()).logits.cpu(), expected) <= 1e-3
    cache = ours.new_cache(2)
    steps = [ours(ids[:, i : i + 1].cuda(), past_key_values=cache).logits for i in range(ids.shape[1])]
    assert worst(torch.cat(steps, 1).cpu(), expected) <= 1e-3
    # The same bytes on the GPU, in the folder it writes, and quantized while loading.
    for name, slot in ours._stored_slots()[0].items():
        assert torch.equal(slot.read().cpu(), whole[name]), name
    ours.save_pretrained(tmp_path / "packed")
    for source, options in (("packed", {}), ("dense", {"quantize": format})):
        again = getattr(alula, cls).from_pretrained(tmp_path / source, device="cuda", **options)
        for name, slot in again._stored_slots()[0].items():
            assert torch.equal(slot.read().cpu(), whole[name]), name
    on_device = getattr(alula, cls).from_pretrained(tmp_path / "dense", device="cuda").quantize(format)
    assert worst(on_device(ids.cuda()).logits.cpu(), expected) <= 1e-3
    back = ours.to("cpu")
    assert_equal_bits(back(ids).logits, expected)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_generation_is_that_of_the_cpu(cls: str) -> None:
    """As a graph: four bits, whose products have K over blocks."""
    ours = alula_model(hf_model(5, cls)).quantize("int4", activations="full")
    ids = random_ids(ours, 1, 9)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    expected = ours.generate(ids, **options)
    assert torch.equal(ours.to("cuda").generate(ids.cuda(), **options).cpu(), expected)


def test_rounded_activations_are_refused(tmp_path: Path) -> None:
    ours = alula_model(hf_model(2, "GPTBigCodeForCausalLM"))
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="never round activations"):
        alula.AutoModelForCausalLM.from_pretrained(tmp_path, device="cuda", quantize="int8", activations="int8")
    ours.to("cuda").quantize("int8")
    with pytest.raises(ValueError, match="never round activations"):
        ours.set_activations("int8")
