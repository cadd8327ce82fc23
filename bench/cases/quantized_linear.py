"""Cases of `linear` with quantized weights: one row (memory) and many (arithmetic), beside dense ones.

x holds values that 8-bit activations represent exactly, so that every format is held to the rounding of fp32 sums.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from alula import ops
from alula.bench.cases.case import PEAKS, Call, Case, Inputs, nbytes, randn
from alula.packed_weight import PackedWeight, panel_bytes
from alula.testing import quantized
from torch import Tensor

FORMATS = (("int8", None), ("int4", 32), ("int4", 64), ("int4", 128), ("int4_asymmetric", 64), ("nf4", None))


def cases(quick: bool) -> list[Case]:
    """rows x K x N: K input features, N output features."""
    if quick:
        return [_case(*f, dtype, rows, 256, 512) for f in FORMATS for dtype in PEAKS for rows in (1, 64)]
    one_row = [(1, 8192, 8192), (1, 768, 3072), (1, 3072, 768), (1, 2048, 8192)]
    many = [(128, 768, 3072), (128, 3072, 768), (512, 2048, 8192)]
    return [_case(*f, dtype, *shape) for shape in one_row + many for f in FORMATS for dtype in PEAKS]


@functools.lru_cache(maxsize=1)
def _weight(format: str, group_size: int | None, n: int, k: int) -> tuple[PackedWeight, Tensor]:
    """A random weight, quantized, and the values it then has, [N, K] in fp32. Kept for the next dtype: choosing codes
    and reading them one by one takes longer than the case."""
    weight = randn(torch.Generator().manual_seed(1), n, k, dtype=torch.float32, std=k**-0.5)
    packed = ops.pack(weight, format, group_size)
    return packed, quantized.stored_table(packed)


def _case(format: str, group_size: int | None, dtype: torch.dtype, rows: int, k: int, n: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        x = torch.randint(-127, 128, (rows, k), generator=generator)
        x[:, ::32] = 127  # the largest of every block: scales are 1 / 64, and nothing is rounded
        return {"x": (x / 64).to(dtype), "codes": _weight(format, group_size, n, k)[0].data}

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> Tensor:
        return inputs["x"].to(compute_dtype) @ _weight(format, group_size, n, k)[1].to(compute_dtype).T

    def alula(inputs: Inputs) -> Call:
        packed = _weight(format, group_size, n, k)[0]._replace(data=inputs["codes"])
        return lambda: ops.linear(inputs["x"], packed)

    def torch_dense(inputs: Inputs) -> Call:
        weight = _weight(format, group_size, n, k)[1].to(dtype, copy=True)
        return lambda: F.linear(inputs["x"], weight)

    groups = f" g{group_size}" if group_size else ""
    memory = rows <= 8
    code = ops.pack(torch.zeros(1, 1), format, group_size).code
    packed_bytes = (n + 31) // 32 * panel_bytes(code, k)
    return Case(
        op="quantized_linear",
        name=f"{format}{groups} {rows}x{k}x{n}",
        dtype=dtype,
        bound="read" if memory else "int8_dot",
        work=packed_bytes + nbytes(((rows, k), dtype), ((rows, n), dtype)) if memory else 2 * rows * k * n,
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch dense": torch_dense},
        bytes_read=packed_bytes,
    )
