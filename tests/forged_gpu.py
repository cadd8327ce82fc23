"""Tensors that say they are on a GPU, where torch is built without CUDA: their memory is the CPU's, and nothing runs on
them. For what ops check before they would launch a kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

_CUDA = 2  # kDLCUDA


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("index", ctypes.c_int))


def forged(tensor: Tensor, index: int = 0) -> Tensor:
    """A tensor "on cuda:<index>" over the same memory, by way of DLPack."""
    capsule = torch.utils.dlpack.to_dlpack(tensor.detach())
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    device = ctypes.cast(pointer_of(capsule, b"dltensor") + 8, ctypes.POINTER(_Device)).contents
    device.type, device.index = _CUDA, index
    with mock.patch.object(torch.cuda, "_lazy_init", return_value=None):
        return torch._C._from_dlpack(capsule)


@contextmanager
def memory_of_the_gpu(ask: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Iterator[None]:
    """Lets `ask` answer where torch is asked for memory on a GPU."""
    library = torch.library.Library("aten", "IMPL")

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
        return ask(tuple(size), dtype or torch.get_default_dtype())

    library.impl("empty.memory_format", empty, "CUDA")
    try:
        yield
    finally:
        library._destroy()
