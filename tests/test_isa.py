"""The choice of instruction set: detected, listed, forced, restored, refused."""

import os
import subprocess
import sys

import pytest
import torch
from alula import _C, ops
from alula.testing.compare import assert_close, assert_equal_bits

NAMES = ["generic", "avx2", "avx512", "avx512_bf16"]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ALULA_")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=120, check=False
    )


def test_generic_is_always_there_and_names_are_known() -> None:
    available = _C.available_isas()
    assert available[0] == "generic"
    assert available == [name for name in NAMES if name in available]
    assert _C.isa() in available


def test_what_the_cpu_has_is_listed() -> None:
    """Against the kernel's own list of CPU features, where there is one."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        flags = []
    if flags:
        assert ("avx2" in _C.available_isas()) == {"avx2", "fma", "f16c"}.issubset(flags)
        assert ("avx512" in _C.available_isas()) == {"avx512f", "avx512bw", "avx512dq", "avx512vl"}.issubset(flags)


def test_forced_isa_is_in_use_and_restored(isa: str) -> None:
    assert _C.isa() == isa


@pytest.mark.parametrize("name", ["", "sse9", "AVX2", "neon", "avx512_bf16 "])
def test_unknown_isa_is_refused_and_changes_nothing(name: str) -> None:
    before = _C.isa()
    with pytest.raises((ValueError, RuntimeError), match="generic"):  # the message lists what is accepted
        _C.force_isa(name)
    assert _C.isa() == before


def test_every_isa_gives_the_same_result_but_for_rounding() -> None:
    x, packed = torch.randn(13, 200), ops.pack(torch.randn(70, 200))
    before, results = _C.isa(), []
    try:
        for name in _C.available_isas():
            _C.force_isa(name)
            results.append(ops.linear(x, packed, activation="gelu"))
    finally:
        _C.force_isa(before)
    for result in results[1:]:
        assert_close(result, results[0].double())


def test_a_packed_weight_serves_every_isa(dtype: torch.dtype) -> None:
    weight, before = torch.randn(70, 53).to(dtype), _C.isa()
    try:
        packed = []
        for name in _C.available_isas():
            _C.force_isa(name)
            packed.append(ops.pack(weight))
        for name in _C.available_isas():
            _C.force_isa(name)
            for each in packed:
                assert_equal_bits(each.data, packed[0].data)
                assert_equal_bits(each.unpack(), weight)
    finally:
        _C.force_isa(before)


def test_environment_variable_forces_the_isa() -> None:
    for name in {"generic", _C.available_isas()[-1]}:
        result = python("import torch; from alula import _C; print(_C.isa())", ALULA_FORCE_ISA=name)
        assert result.stdout.strip() == name, result.stderr


def test_environment_variable_of_an_unknown_isa_is_an_error() -> None:
    result = python(
        "import torch; from alula import ops; ops.layer_norm(torch.ones(2, 8), torch.ones(8))", ALULA_FORCE_ISA="sse9"
    )
    assert result.returncode == 1  # a Python exception, not a signal
    assert "sse9" in result.stderr
    assert "generic" in result.stderr


def test_build_info_says_what_was_built() -> None:
    info = _C.build_info()
    for key in ("version", "compiler"):
        assert isinstance(info[key], str)
        assert info[key]
    assert info["cuda"] or info["cuda_reason"], "without CUDA there must be a reason"
