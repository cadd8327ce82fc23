"""tests/gpu/prebuilt.py: a packed library comes back, is refused beside other sources, and serves alula._C."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import alula
import pytest
from alula import _C

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(alula.__file__).with_name("libalula.so")


@pytest.fixture
def prebuilt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prebuilt", ROOT / "tests" / "gpu" / "prebuilt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_packed_library_comes_back(tmp_path: Path, prebuilt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("strip") is None:
        pytest.skip("strip (binutils) is not installed")
    # Any ELF file will do, with the name of the section of kernels behind it: the library takes long to compress.
    something, carried = tmp_path / "something.so", tmp_path / "carried"
    something.write_bytes(Path(shutil.which("strip")).resolve().read_bytes())
    with pytest.raises(SystemExit, match="has no CUDA kernels"):
        prebuilt.pack(something, carried)
    assert not carried.exists()
    something.write_bytes(something.read_bytes() + b".nv_fatbin")
    prebuilt.pack(something, carried)
    assert sorted(file.name for file in carried.iterdir()) == ["libalula.so.xz", "sources.sha256"]
    library = prebuilt.unpack(tmp_path / "unpacked", carried)
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert library.stat().st_size <= something.stat().st_size
    monkeypatch.setattr(prebuilt, "sources", lambda: "another hash")
    with pytest.raises(SystemExit, match="other C\\+\\+ sources"):
        prebuilt.unpack(tmp_path / "unpacked", carried)


def test_nothing_carried_and_nothing_built(tmp_path: Path, prebuilt: ModuleType) -> None:
    assert prebuilt.unpack(tmp_path / "unpacked", tmp_path / "carried") is None
    with pytest.raises(SystemExit, match="make build"):
        prebuilt.pack(tmp_path / "libalula.so", tmp_path / "carried")


def test_the_module_is_built_over_a_library(tmp_path: Path) -> None:
    """With -DALULA_PREBUILT only alula._C is compiled, and it finds the library beside it."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not on PATH")
    pytest.importorskip("pybind11")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DALULA_PREBUILT={LIBRARY}"]
    build, package = tmp_path / "build", tmp_path / "package"
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options],
        ["cmake", "--build", str(build)],
        ["cmake", "--install", str(build), "--prefix", str(package)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (package / "libalula.so").exists()
    code = f"import torch, sys; sys.path.insert(0, {str(package)!r}); import _C; print(_C.build_info()['version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == _C.build_info()["version"], done.stderr
