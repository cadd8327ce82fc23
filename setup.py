"""Builds the compiled halves of alula with CMake and Ninja.

Metadata is in pyproject.toml, compiler flags are in CMakeLists.txt.
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "python/alula/_version.py"))["__version__"]


class CMakeBuild(build_ext):
    """One CMake build makes libalula.so (the ops) and _C (pybind11); both are put beside the package."""

    def build_extension(self, ext: Extension) -> None:
        # CMake and Ninja of this Python first: the PATH of an environment that is not activated does not have them.
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        if shutil.which("cmake") is None or shutil.which("ninja") is None:
            sys.exit("alula needs CMake 3.25 or newer and Ninja to build: pip install cmake ninja")
        targets = [Path(self.get_ext_fullpath(ext.name)).resolve().parent]
        if self.editable_mode:  # the package is used from the checkout, so the compiled files belong there too
            targets.append(ROOT / "python" / "alula")
        build = ROOT / "build" / f"{sys.implementation.cache_tag}"
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DALULA_VERSION={VERSION}",
            f"-DALULA_WERROR={'ON' if os.environ.get('ALULA_WERROR') == '1' else 'OFF'}",
            f"-DALULA_CUDA={os.environ.get('ALULA_CUDA', '')}",
            f"-DALULA_CUDA_ARCHS={os.environ.get('ALULA_CUDA_ARCHS', '').replace(',', ' ')}",
        ]
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        for target in targets:
            subprocess.run(["cmake", "--install", str(build), "--prefix", str(target)], check=True)


setup(ext_modules=[Extension("alula._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
