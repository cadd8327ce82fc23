"""The op library for a machine with a GPU, where building it takes too long or cannot be done.

    prebuilt.py pack    what `make prebuilt` does where alula was built: build/prebuilt/ (about 10 MB) is what to carry
    prebuilt.py use     what `make gpu GPU_PYTHON=...` begins with: puts the library and alula._C into python/alula

A library serves every Python and torch from 2.11 on; alula._C belongs to one Python and is compiled in seconds (CMake,
Ninja, pybind11 and a C++ compiler). Where nothing was carried, `use` builds everything, which needs nvcc and minutes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = ROOT / "python" / "alula" / "libalula.so"
CARRIED = ROOT / "build" / "prebuilt"


def sources() -> str:
    """What the library is made of, as one hash: a library of other sources would fail in strange ways."""
    files = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".h", ".cu", ".cuh")]
    digest = hashlib.sha256()
    for file in sorted([*files, ROOT / "CMakeLists.txt"]):
        digest.update(f"{file.relative_to(ROOT)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def pack(library: Path = LIBRARY, carried: Path = CARRIED) -> None:
    """Leaves debugging symbols out, compresses, and notes the sources."""
    if not library.exists():
        sys.exit(f"{library} is missing: run `make build` first")
    if b".nv_fatbin" not in library.read_bytes():  # the section that nvcc puts kernels into
        sys.exit(f"{library} has no CUDA kernels: run `make build` with nvcc (ALULA_CUDA=1 says why there are none)")
    carried.mkdir(parents=True, exist_ok=True)
    stripped = carried / "libalula.so"
    subprocess.run(["strip", "--strip-debug", "-o", str(stripped), str(library)], check=True)
    (carried / "libalula.so.xz").write_bytes(lzma.compress(stripped.read_bytes(), preset=6))
    stripped.unlink()
    (carried / "sources.sha256").write_text(sources() + "\n")
    print(f"{carried}: {sum(file.stat().st_size for file in carried.iterdir()) / 1e6:.1f} MB to carry")


def unpack(folder: Path, carried: Path = CARRIED) -> Path | None:
    """The carried library, in `folder`; None where nothing was carried."""
    archive = carried / "libalula.so.xz"
    if not archive.exists():
        return None
    note = carried / "sources.sha256"
    if not note.exists() or note.read_text().strip() != sources():
        sys.exit(f"{archive} is of other C++ sources than these: run `make prebuilt` again, or remove {carried}")
    library = folder / "libalula.so"
    if not library.exists() or library.stat().st_mtime < archive.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        library.write_bytes(lzma.decompress(archive.read_bytes()))
    return library


def use() -> None:
    """Builds for this Python, from what was carried or from the sources, and installs into python/alula."""
    build = ROOT / "build" / f"gpu-{sys.implementation.cache_tag}"
    library = unpack(build / "prebuilt")
    env = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
    missing = [name for name in ("cmake", "ninja") if shutil.which(name, path=env["PATH"]) is None]
    missing += [name for name in ("pybind11", "torch") if importlib.util.find_spec(name) is None]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing.append("a C++ compiler")
    if missing:
        sys.exit(f"to build alula for {sys.executable}, this is missing: {', '.join(missing)}")
    if library is None:
        import torch

        if not torch.cuda.is_available():
            why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
            sys.exit(f"make gpu needs a GPU; torch {torch.__version__} {why} ({sys.executable}). Nothing was built.")
        print(f"no {CARRIED} (make prebuilt): building everything here, which takes minutes", flush=True)
    version = runpy.run_path(str(ROOT / "python/alula/_version.py"))["__version__"]
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DALULA_PREBUILT={library or ''}",
        f"-DALULA_VERSION={version}",
    ]
    if library is None:
        archs = os.environ.get("ALULA_CUDA_ARCHS", "").replace(",", " ")
        options += ["-DALULA_CUDA=1", f"-DALULA_CUDA_ARCHS={archs}"]
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "--log-level=WARNING", *options],
        ["cmake", "--build", str(build)],
        ["cmake", "--install", str(build), "--prefix", str(LIBRARY.parent)],
    ):
        done = subprocess.run(command, env=env, check=False)
        if done.returncode:
            sys.exit(f"failed: {' '.join(command)}")
    check = "from alula import _library, _C; print('alula', _C.build_info())"
    path = os.pathsep.join([str(LIBRARY.parent.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    sys.exit(subprocess.run([sys.executable, "-c", check], env={**env, "PYTHONPATH": path}, check=False).returncode)


if __name__ == "__main__":
    actions = {"pack": pack, "use": use}
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        sys.exit(__doc__)
    actions[sys.argv[1]]()
