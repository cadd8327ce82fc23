"""What torch says where there is no memory: its own error, also from inside an op.

Torch's stable C++ interface tells a library that a call has failed, but not why; the op then throws a RuntimeError that
says how many bytes it asked for (csrc/core/tensor.h). Asked again from Python, torch raises what it has to say:
torch.OutOfMemoryError on a GPU.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["raises_torch_errors"]

_ASKED = re.compile(r"there is no memory for (\d+) bytes on (cpu|cuda:\d+), or")
P, R = ParamSpec("P"), TypeVar("R")


def raises_torch_errors(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which calls ops; where one found no memory, torch's own error is raised."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            asked = _ASKED.search(str(error))
            if asked is None:
                raise
            own = _torch_error(int(asked[1]), asked[2])
            if own is None:  # there is memory by now
                raise
            raise own from None

    return wrapped


def _torch_error(nbytes: int, device: str) -> RuntimeError | None:
    """Of asking for that much; None where there is none."""
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        return error
    return None
