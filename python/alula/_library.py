"""Loads the compiled halves of alula: the op library (libalula.so) and the pybind11 module (alula._C)."""

from __future__ import annotations

from pathlib import Path

import torch

_path = Path(__file__).with_name("libalula.so")
if not _path.exists():
    raise ImportError(
        f"alula's compiled op library is missing ({_path.name} beside {Path(__file__).name}). "
        "Build it with `pip install .` or `make` in a checkout, or install a wheel."
    )
torch.ops.load_library(_path)
