"""Launching and asking for GPUs, against a CUDA runtime that is played: what is launched how, what an error says."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alula import devices

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def cuda_headers() -> Path | None:
    """Where the toolkit's headers are, if there is one."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r"TOP=(\S+)", said)
    folder = Path(found[1]) / "include" if found else Path("/usr/local/cuda/include")
    return folder if (folder / "cuda_runtime.h").exists() else None


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What `played SCENARIO [MAJOR MINOR]` prints."""
    headers = cuda_headers()
    if headers is None:
        pytest.skip("no CUDA toolkit: its headers are needed")
    program = tmp_path_factory.mktemp("played") / "played"
    sources = [ROOT / "tests" / "cuda_runtime" / "played.cpp", CSRC / "cuda" / "device.cpp"]
    flags = ["-std=c++20", "-O0", f"-I{CSRC}", f"-isystem{headers}", "-DALULA_WITH_CUDA=1"]
    flags.append('-DALULA_CUDA_ARCHS="80 90a"')
    kernels = ["-xc++", str(CSRC / "cuda" / "device_cuda.cu")]
    command = [os.environ.get("CXX", "c++"), *flags, *map(str, sources), *kernels, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def play(scenario: str, *capability: int, **environment: str) -> str:
        command = [str(program), scenario, *map(str, capability)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=True)
        return done.stdout

    return play


def test_kernels_start_before_the_previous_one_ends_in_graphs_where_the_gpu_can(played: Callable[..., str]) -> None:
    """Elsewhere the kernel before may have written the weights that they read at once. In a graph they follow a kernel,
    and not a memset, a copy, nothing or several."""
    assert played("dependent", 9, 0) == "0 0 1 0 " + "0 0 1 " + "0 0 "
    assert played("dependent", 8, 0) == "0 0 0 0 " + "0 0 0 " + "0 0 "


def test_a_gpu_without_code_is_refused_by_name(played: Callable[..., str]) -> None:
    old, other = played("dependent", 7, 5), played("dependent", 10, 0)
    assert "this GPU is sm_75" in old
    assert "need sm_80 or newer" in old
    assert "this GPU is sm_100" in other
    assert "has code for 80 90a" in other


def test_a_launch_that_fails_names_the_kernel(played: Callable[..., str]) -> None:
    error = "error: some_kernel: CUDA says: an illegal memory access was encountered (cudaErrorIllegalAddress)"
    assert played("launch fails") == error
    assert played("kernel fails") == "nobody waited"
    assert played("kernel fails", ALULA_SYNC="1") == error


def test_a_kernel_runs_on_the_callers_stream_with_its_grid(played: Callable[..., str]) -> None:
    launched = "5 4 3, 96 1 1, 1000 bytes, 1, "
    assert played("where and how much") == launched + "waited 0 0"
    assert played("where and how much", ALULA_SYNC="1") == launched + "waited 1 1"


def test_what_a_gpu_cannot_launch(played: Callable[..., str]) -> None:
    assert played("much shared memory") == (
        "error: some_kernel needs 102400 bytes of shared memory a block; this GPU has 101376"
    )
    assert played("nothing to do") == "0"
    assert "some_kernel: a grid of 1 x 65536 x 1 blocks is more than CUDA takes" in played("many blocks")


def test_wrong_ids_are_told_once(played: Callable[..., str]) -> None:
    late = "(found on cuda:0 in a call before this one, whose result is NaN; ALULA_SYNC=1 raises at the call)"
    text = "input_ids holds 50257; accepted: 0 to 50256; position_ids holds -3; accepted: 0 to 1023"
    assert played("wrong ids") == f"1 1 [] [{text} {late}] [] [] "


# --- models and devices ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets torch tell of GPUs, and the build of code for some."""

    def pretend(*capabilities: tuple[int, int], archs: str = "80 90a") -> None:
        build = {"cuda": "13.0" if archs else None, "cuda_archs": archs, "cuda_reason": "ALULA_CUDA=0"}
        monkeypatch.setattr(devices._C, "build_info", lambda: build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    return pretend


def test_devices_that_a_model_can_live_on(gpus: Callable[..., None]) -> None:
    gpus((8, 0), (9, 0))
    assert devices.checked_device("cuda") == torch.device("cuda", 0)
    assert devices.checked_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    "capabilities, archs, device, parts",
    [
        ([(7, 5)], "80 90a", "cuda", ["sm_75", "sm_80 or newer"]),
        ([(8, 0), (10, 0)], "80 90a", "cuda:1", ["sm_100", "80 90a", "ALULA_CUDA_ARCHS"]),
        ([(8, 0)], "80 90a", "cuda:1", ["does not exist", "1 CUDA devices"]),
        ([(8, 0)], "", "cuda", ["not supported by this build", "accepted: cpu", "ALULA_CUDA=0"]),
        ([], "80 90a", "cuda", ["cannot be used", "accepted: cpu"]),
        ([(8, 0)], "80 90a", "mps", ["not supported by this build", "accepted: cpu, cuda"]),
    ],
)
def test_devices_that_cannot_be_used(
    gpus: Callable[..., None], capabilities: list[tuple[int, int]], archs: str, device: str, parts: list[str]
) -> None:
    gpus(*capabilities, archs=archs)
    with pytest.raises(ValueError, match="device") as error:
        devices.checked_device(device)
    for part in parts:
        assert part in str(error.value)


def test_a_wrong_id_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(devices._C, "take_cuda_id_fault", lambda index: asked.append(index) or "input_ids holds 9")
    devices.raise_id_fault(torch.device("cpu"))
    with pytest.raises(ValueError, match="input_ids holds 9"):
        devices.raise_id_fault(torch.device("cuda", 1))
    assert asked == [1]
