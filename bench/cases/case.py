"""What a case is: inputs, the reference, the contestants, and the work that a rate is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]  # tensors by the names of the op's arguments
Call = Callable[[], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    prepare: for each contestant (alula first), a function from inputs to the call that is timed; what it does before
    it returns (packing weights, making views) is not timed. Every call returns what `reference` returns.
    bound: the limit that the case is measured by. For read and copy `work` is in bytes and the buffers rotate so that
    each call finds cold caches; for fp32_fma, bf16_dot and int8_dot it is in operations.
    """

    op: str
    name: str
    dtype: torch.dtype
    bound: str
    work: int
    make: Callable[[torch.Generator], Inputs]
    reference: Callable[[Inputs, torch.dtype], Tensor | tuple[Tensor, ...]]
    prepare: dict[str, Callable[[Inputs], Call]]
    bytes_read: int | None = None  # by a call, where that is not the size of the inputs (a packed weight)

    @property
    def dtype_name(self) -> str:
        """fp32 or bf16."""
        return DTYPE_NAMES[self.dtype]


DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PEAKS = {torch.float32: "fp32_fma", torch.bfloat16: "bf16_dot"}


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    """Normal values, drawn in fp32 and rounded to `dtype`."""
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def nbytes(*tensors: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of tensors given as (shape, dtype)."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors)
