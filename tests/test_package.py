"""The source distribution: whoever installs from it has every file that the build, the tests and the docs read."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = "CMakeLists.txt LICENSE Makefile README.md pyproject.toml requirements.txt requirements-test.txt setup.py"


def test_the_source_distribution_has_what_the_build_and_the_tests_read(tmp_path: Path) -> None:
    """Built from a copy: setuptools writes beside the sources, and takes up what an earlier build wrote there."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "alula"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "results", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    wanted = {str(path.relative_to(copy)) for part in ("bench", "csrc", "examples", "python", "tests")
              for path in (copy / part).rglob("*") if path.is_file()}  # fmt: skip
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("alula-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    assert wanted | set(TOP.split()) <= packed, sorted((wanted | set(TOP.split())) - packed)
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]
