"""Cases of `layer_norm`, with and without residual: tensors beyond the cache; the time of a copy is the limit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from alula import ops
from alula.bench.cases.case import Call, Case, Inputs, nbytes, randn
from alula.testing import reference
from torch import Tensor


def cases(quick: bool) -> list[Case]:
    """x [rows, E]."""
    shapes = [(64, 256)] if quick else [(16384, 2048), (43690, 768)]
    return [
        _case(dtype, rows, width, residual)
        for dtype in (torch.float32, torch.bfloat16)
        for rows, width in shapes
        for residual in (False, True)
    ]


def _case(dtype: torch.dtype, rows: int, width: int, residual: bool) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        inputs = {
            "x": randn(generator, rows, width, dtype=dtype),
            "weight": 1 + randn(generator, width, dtype=dtype, std=0.1),
            "bias": randn(generator, width, dtype=dtype, std=0.1),
        }
        if residual:
            inputs["residual"] = randn(generator, rows, width, dtype=dtype)
        return inputs

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> Tensor:
        return reference.layer_norm(**inputs, compute_dtype=compute_dtype)

    def alula(inputs: Inputs) -> Call:
        return lambda: ops.layer_norm(**inputs)

    def torch_ops(inputs: Inputs) -> Call:
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        if residual:
            return lambda: F.layer_norm(x + inputs["residual"], (width,), weight, bias)
        return lambda: F.layer_norm(x, (width,), weight, bias)

    return Case(
        op="layer_norm",
        name=f"{rows}x{width}{' + residual' if residual else ''}",
        dtype=dtype,
        bound="copy",
        work=(3 if residual else 2) * nbytes(((rows, width), dtype)),
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch": torch_ops},
    )
