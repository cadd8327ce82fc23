"""What ops say of tensors on a GPU before a kernel would run: another device, sizes that there is no kernel for, a
build without CUDA, no memory. With tensors that only say so (forged_gpu.py); tests/gpu has real ones."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_bad_ops as bad
import torch
from alula import _C, BlockPlan, KVCache, ops
from decoder_cases import alula_model, hf_model
from forged_gpu import forged, memory_of_the_gpu
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA does not take forged tensors")
ROOT = Path(__file__).resolve().parent.parent
alula = torch.ops.alula


@pytest.fixture
def memory() -> Iterator[None]:
    """There is enough."""
    with memory_of_the_gpu(lambda size, dtype: forged(torch.empty(size, dtype=dtype))):
        yield


def linear() -> dict[str, Any]:
    given = bad.linear_arguments()
    given["weight"] = torch.zeros(40, 8)  # as on a GPU: rows padded to 16 bytes
    return {**given, "out_features": 40, "norm_eps": 1e-5, "activation": 1}


def qkv_projection() -> dict[str, Any]:
    given = {**bad.qkv_arguments(), **bad.qkv_parallel_arguments()}
    features = given["weight"].out_features
    return {
        **given,
        "weight": torch.zeros(features, 8),
        "norm_eps": 1e-5,
        "mlp_activation": 1,
        "bias": torch.zeros(features),
    }


def attention() -> dict[str, Any]:
    return {**bad.attention_arguments(), "scale": 1.0, "causal": True}


def block_sparse_attention() -> dict[str, Any]:
    plan = BlockPlan.pattern(40, 16, global_tokens=(3,))
    starts, entries, flags = plan.tensors
    schedule = torch.zeros(4, 6, dtype=torch.int32)
    given = {"q": torch.zeros(2, 40, 3, 8), "k": torch.zeros(2, 1, 48, 8), "v": torch.zeros(2, 1, 48, 8)}
    columns = {"first": torch.zeros(2, dtype=torch.int32), "lengths": torch.full((2,), 40, dtype=torch.int32)}
    masks = {"mask": torch.ones(2, 40, dtype=torch.bool), "head_mask": torch.zeros(3)}
    lists = {"starts": starts, "entries": entries, "global_tokens": flags, "block_size": 16, "schedule": schedule}
    return {**given, **lists, **columns, **masks, "scale": 1.0, "causal": False, "num_partials": 0}


def embedding() -> dict[str, Any]:
    given = bad.embedding_arguments()
    del given["table"]
    types = {"token_type_table": torch.zeros(10, 8)}
    return {**given, **types, "packed": torch.zeros(10, 8), "num_embeddings": 10, "embedding_dim": 8}


def choose_token() -> dict[str, Any]:
    state = {
        "tokens": torch.zeros(3, 1, dtype=torch.int64),
        "running": torch.ones(3, dtype=torch.bool),
        "out": torch.zeros(3, 4, dtype=torch.int64),
        "step": torch.zeros(1, dtype=torch.int64),
        "report": torch.zeros(2, 3),
        "lengths": torch.zeros(3, dtype=torch.int32),
        "positions": torch.zeros(3, 1, dtype=torch.int64),
        "slots": torch.zeros(3, 1, dtype=torch.int32),
        "seen": torch.zeros(3, dtype=torch.int32),
    }
    ids = torch.zeros(1, dtype=torch.int64)
    given = {"drawn": torch.zeros(3, dtype=torch.int64), "pad_id": ids, "eos_ids": ids.clone()}
    return {"scores": torch.zeros(3, 9), **given, "advances": True, **state}


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "linear": (alula.linear, linear),
    "qkv_projection": (alula.qkv_projection, qkv_projection),
    "attention": (alula.attention, attention),
    "attention_into": (alula.attention_into, lambda: {**attention(), "out": torch.zeros(2, 3, 32)}),
    "block_sparse_attention": (alula.block_sparse_attention, block_sparse_attention),
    "embedding": (alula.embedding, embedding),
    "rotary": (alula.rotary, lambda: {**bad.rotary_arguments(), "is_interleaved": True}),
    "rotary_": (alula.rotary_, lambda: {**bad.rotary_arguments(), "is_interleaved": True}),
    "layer_norm": (alula.layer_norm, lambda: {**bad.norm_arguments(), "eps": 1e-5}),
    "scaled_masked_softmax": (
        alula.scaled_masked_softmax,
        lambda: {**bad.softmax_arguments(), "scale": 1.0, "dtype": None},
    ),
    "choose_token": (alula.choose_token, choose_token),
}
FIRST = {"embedding": "packed", "scaled_masked_softmax": "scores", "choose_token": "scores"}  # decides the device
OPERANDS = [
    (op, name)
    for op, (_, arguments) in CALLS.items()
    for name, value in arguments().items()
    if isinstance(value, Tensor) and name not in (FIRST.get(op, ""), "x", "q")
]


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: forged(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


# --- another device --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("op, name", OPERANDS)
def test_an_operand_on_another_device_is_named(op: str, name: str) -> None:
    call, arguments = CALLS[op]
    for elsewhere in (arguments()[name], forged(arguments()[name], 1)):
        with pytest.raises(RuntimeError) as caught:
            call(**{**on_gpu(arguments()), name: elsewhere})
        said = {"packed": "weight", "table": "rotary_table|table", "rotary_positions": "positions"}.get(name, name)
        assert re.search(rf"\b({said}) is on another device; this op has tensors on cuda:0", str(caught.value))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("op, name", [operand for operand in OPERANDS if operand[1] != "schedule"])
def test_an_operand_on_a_gpu_beside_those_of_the_cpu_is_named(op: str, name: str) -> None:
    call, arguments = CALLS[op]
    given = arguments()
    if op in ("linear", "qkv_projection"):
        given["weight"] = ops.pack(given["weight"]).data
    if op == "embedding":
        given["packed"] = ops.pack(given["packed"]).data
    with pytest.raises(RuntimeError, match="is on another device; this op has CPU tensors"):
        call(**{**given, name: forged(given[name])})


# --- no kernel for this ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("head_dim", [4, 12, 264])
def test_head_sizes_without_a_kernel(head_dim: int) -> None:
    given = {**attention(), "q": torch.zeros(2, 3, 4, head_dim), "kv_cache": torch.zeros(2, 2, 6, 2 * head_dim)}
    with pytest.raises(RuntimeError, match=rf"head_dim is {head_dim}; accepted: .*8.*256"):
        alula.attention(**on_gpu(given))
    given = block_sparse_attention()
    given |= {"q": torch.zeros(2, 40, 3, head_dim), "k": torch.zeros(2, 1, 48, head_dim)}
    with pytest.raises(RuntimeError, match=rf"head_dim is {head_dim}; accepted: .*8.*256"):
        alula.block_sparse_attention(**on_gpu({**given, "v": given["k"].clone()}))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("block_size", [0, 8, 48, 256])
def test_block_sizes_without_a_kernel(block_size: int) -> None:
    given = {**block_sparse_attention(), "block_size": block_size}
    with pytest.raises(RuntimeError, match=f"block_size is {block_size}; accepted: 16, 32, 64, 128"):
        alula.block_sparse_attention(**on_gpu(given))


@pytest.mark.usefixtures("memory")
def test_a_plan_without_its_schedule() -> None:
    with pytest.raises(RuntimeError, match="schedule is missing"):
        alula.block_sparse_attention(**on_gpu({**block_sparse_attention(), "schedule": None}))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("op", [op for op in CALLS if op != "choose_token"])
def test_dtypes_without_a_kernel(op: str) -> None:
    call, arguments = CALLS[op]
    first = FIRST.get(op, "q" if "q" in arguments() else "x")
    doubles = {name: arguments()[name].double() for name in ((first, "k") if op.startswith("rotary") else (first,))}
    with pytest.raises(
        RuntimeError, match=r"has dtype Double; (accepted: float32, bfloat16, float16|the weight asks for Float)"
    ):
        call(**on_gpu({**arguments(), **doubles}))


# --- no GPU for this -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("op", CALLS)
def test_right_operands_come_as_far_as_the_gpu(op: str) -> None:
    """A build without CUDA kernels says so; with them, torch says that it cannot change to the GPU."""
    call, arguments = CALLS[op]
    with pytest.raises(RuntimeError) as caught:
        call(**on_gpu(arguments()))
    if _C.build_info()["cuda"] is None:
        assert "this build of alula has no CUDA kernels (" in str(caught.value)
        assert "the tensors are on a GPU" in str(caught.value)
    else:
        assert "device_guard" in str(caught.value)


def test_a_build_without_cuda_says_so_and_why(tmp_path: Path) -> None:
    """csrc/core/cuda.cpp as such a build has it, whatever this one has."""
    library, folder = tmp_path / "without_cuda.so", Path(torch.__file__).parent
    sources = [ROOT / "tests" / "cuda_runtime" / "without_cuda.cpp", ROOT / "csrc" / "core" / "cuda.cpp"]
    flags = ["-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-ffunction-sections", "-Wl,--gc-sections"]
    includes = [f"-I{ROOT / 'csrc'}", f"-isystem{folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    names = ["-DALULA_WITH_CUDA=0", '-DALULA_CUDA_ARCHS=""', '-DALULA_CUDA_REASON="for such a reason"']
    command = [os.environ.get("CXX", "c++"), *flags, *includes, *names, *map(str, sources), f"-L{folder / 'lib'}"]
    done = subprocess.run(
        [*command, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.ops.load_library(str(library))
    with pytest.raises(RuntimeError, match=r"this build of alula has no CUDA kernels \(for such a reason\), and"):
        torch.ops.alula_without_cuda.take_stream(forged(torch.zeros(2)))


# --- no memory -------------------------------------------------------------------------------------------------------


def no_memory(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}.")


def test_torch_says_itself_that_there_is_no_memory() -> None:
    x, weight = forged(torch.zeros(2, 8)), forged(torch.ones(8))
    with memory_of_the_gpu(no_memory):
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate \(64,\)"):
            ops.layer_norm(x, weight)
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate \(1152,\)"):
            ops.cache_layers(x, 3, (2, 1, 9, 16))
        with pytest.raises(RuntimeError, match="there is no memory for 64 bytes on cuda:0, or"):
            alula.layer_norm(x, weight, None, 1e-5, None)


def test_memory_that_is_there_when_torch_is_asked_again() -> None:
    answers = iter([no_memory])

    def ask(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return next(answers, lambda size, dtype: forged(torch.empty(size, dtype=dtype)))(size, dtype)

    with memory_of_the_gpu(ask), pytest.raises(RuntimeError, match="there is no memory for 64 bytes"):
        ops.layer_norm(forged(torch.zeros(2, 8)), forged(torch.ones(8)))


def test_a_model_is_as_before_where_there_was_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which can be short of memory just as well."""
    model = alula_model(hf_model(1, "GPTBigCodeForCausalLM"))
    cache: KVCache = model.new_cache(1, max_length=20)
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    model(ids[:, :1], past_key_values=cache)
    monkeypatch.setattr(type(model.transformer), "run", short_of_memory)
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory"):
        model(ids[:, 1:], past_key_values=cache)
    monkeypatch.undo()
    assert cache.get_seq_length() == 1
    assert torch.equal(model(ids[:, 1:], past_key_values=cache).logits, expected[:, 1:])


def short_of_memory(*args: object, **kwargs: object) -> None:
    raise RuntimeError(f"there is no memory for {2**46} bytes on cpu, or torch cannot use it")
