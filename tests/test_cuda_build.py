"""What a build says of its CUDA half, and which GPUs it has code for. No GPU is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
from alula import _C

RESOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "resources.py"


def test_a_build_has_cuda_or_says_why_not() -> None:
    info = _C.build_info()
    if info["cuda"] is None:
        assert info["cuda_reason"]
        assert not info["cuda_archs"]
    else:
        assert float(info["cuda"]) >= 12
        assert all(int(arch.rstrip("af+")) >= 80 for arch in info["cuda_archs"].split())
        assert not info["cuda_reason"]


@pytest.mark.parametrize(
    "gpu, archs",
    [
        ((8, 0), "80 90a"),
        ((9, 0), "80 90a"),
        ((8, 6), "80"),
        ((8, 9), "80 90a"),
        ((12, 0), "80 120+"),
        ((10, 0), "90+"),
    ],
)
def test_gpus_that_a_build_has_code_for(gpu: tuple[int, int], archs: str) -> None:
    assert _C.missing_cuda_code(*gpu, archs) == ""


@pytest.mark.parametrize(
    "gpu, archs, parts",
    [
        ((7, 5), "80 90a", ("sm_75", "sm_80 or newer")),
        ((8, 0), "86 90a", ("sm_80", "86 90a", "ALULA_CUDA_ARCHS")),
        ((10, 0), "80 90a", ("sm_100", "80 90a", "ALULA_CUDA_ARCHS")),
        ((9, 0), "80 86", ("sm_90", "80 86")),
        ((12, 1), "80 120a", ("sm_121",)),
        ((12, 0), "80 90a", ("sm_120",)),
    ],
)
def test_gpus_that_a_build_has_no_code_for(gpu: tuple[int, int], archs: str, parts: tuple[str, ...]) -> None:
    message = _C.missing_cuda_code(*gpu, archs)
    for part in parts:
        assert part in message


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z6kernelPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 360 bytes cmem[0]
"""


@pytest.mark.parametrize("spills", [0, 8])
def test_a_spill_fails_the_table_of_resources(tmp_path: Path, spills: int) -> None:
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "kernel.o").touch()
    report = REPORT.format(stack=2 * spills, stores=spills, loads=spills)
    (tmp_path / "cuda" / "kernel.o.resources").write_text(report)
    done = subprocess.run(
        [sys.executable, str(RESOURCES), "report", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == (1 if spills else 0), done.stdout + done.stderr
    assert ["kernel", "sm_80", "40", "0", str(2 * spills), str(2 * spills)] == done.stdout.splitlines()[1].split()
    assert ("SPILL: kernel (sm_80)" in done.stderr) == bool(spills)
