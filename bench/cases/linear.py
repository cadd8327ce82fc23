"""Cases of `linear`: many rows (arithmetic), one row and eight rows (memory), and the shapes of real models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from alula import ops
from alula.bench.cases.case import PEAKS, Call, Case, Inputs, nbytes, randn
from alula.testing import reference
from torch import Tensor

# Up to this many rows the time is that of reading the weight once.
BANDWIDTH_ROWS = 8


def cases(quick: bool) -> list[Case]:
    """rows x K x N: K input features, N output features."""
    if quick:
        return [
            _plain("many rows", dtype, rows, 256, 512) for dtype in (torch.float32, torch.bfloat16) for rows in (1, 64)
        ] + [_mlp_in(torch.float32, 1, 256), _mlp_out(torch.bfloat16, 16, 256)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        found += [
            _plain("many rows", dtype, 512, 2048, 8192),
            _plain("many rows", dtype, 512, 8192, 2048),
            _plain("one row", dtype, 1, 8192, 8192),
            _plain("8 rows", dtype, 8, 8192, 8192),
        ]
        for width in (768, 1024, 2048):
            for rows in (1, 128):
                found += [_mlp_in(dtype, rows, width), _mlp_out(dtype, rows, width)]
    return found


def _plain(label: str, dtype: torch.dtype, rows: int, k: int, n: int) -> Case:
    """y = x @ W.T + bias."""
    return _case(f"{label if rows > 1 else 'one row'} {rows}x{k}x{n}", dtype, rows, k, n)


def _mlp_in(dtype: torch.dtype, rows: int, width: int) -> Case:
    """Layer norm, GEMM to 4 x the width, bias, gelu."""
    return _case(f"mlp in, LN + gelu {rows}x{width}x{4 * width}", dtype, rows, width, 4 * width, norm=True)


def _mlp_out(dtype: torch.dtype, rows: int, width: int) -> Case:
    """GEMM from 4 x the width, bias, residual add."""
    return _case(f"mlp out, residual {rows}x{4 * width}x{width}", dtype, rows, 4 * width, width, residual=True)


def _case(
    name: str, dtype: torch.dtype, rows: int, k: int, n: int, *, norm: bool = False, residual: bool = False
) -> Case:
    activation = "gelu_pytorch_tanh" if norm else "none"

    def make(generator: torch.Generator) -> Inputs:
        inputs = {
            "x": randn(generator, rows, k, dtype=dtype),
            "weight": randn(generator, n, k, dtype=dtype, std=k**-0.5),
            "bias": randn(generator, n, dtype=dtype),
        }
        if norm:
            inputs["norm_weight"] = 1 + randn(generator, k, dtype=dtype, std=0.1)
            inputs["norm_bias"] = randn(generator, k, dtype=dtype, std=0.1)
        if residual:
            inputs["residual"] = randn(generator, rows, n, dtype=dtype)
        return inputs

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> Tensor:
        return reference.linear(**inputs, activation=activation, compute_dtype=compute_dtype)

    def alula(inputs: Inputs) -> Call:
        weight = ops.pack(inputs["weight"])
        others = {name: tensor for name, tensor in inputs.items() if name != "weight"}
        return lambda: ops.linear(weight=weight, activation=activation, **others)

    def torch_linear(inputs: Inputs) -> Call:
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        if norm:
            scale, shift = inputs["norm_weight"], inputs["norm_bias"]
            return lambda: F.gelu(F.linear(F.layer_norm(x, (k,), scale, shift), weight, bias), approximate="tanh")
        if residual:
            return lambda: F.linear(x, weight, bias) + inputs["residual"]
        return lambda: F.linear(x, weight, bias)

    memory = rows <= BANDWIDTH_ROWS
    return Case(
        op="linear",
        name=name,
        dtype=dtype,
        bound="read" if memory else PEAKS[dtype],
        work=nbytes(((n, k), dtype), ((rows, k), dtype), ((rows, n), dtype)) if memory else 2 * rows * k * n,
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch": torch_linear},
    )
