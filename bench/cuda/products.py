"""Cases of layer norm, softmax and products, bf16; the peer is PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from alula import ops

from .timing import Bench, Case


def norm_cases(bench: Bench) -> list[Case]:
    """[rows, width]."""
    cases = []
    for rows, width in bench.choose([(16384, 768), (16384, 2048), (4096, 6144)], [(64, 96)]):
        nbytes = 4.0 * rows * width
        xs = [bench.rand(rows, width) for _ in range(bench.copies_of(nbytes))]
        w, b = bench.rand(width), bench.rand(width)
        contestants = {
            "alula": lambda i, xs=xs, w=w, b=b: ops.layer_norm(xs[i], w, b),
            "torch": lambda i, xs=xs, w=w, b=b, n=width: F.layer_norm(xs[i], (n,), w, b),
        }
        cases.append(Case(f"layer_norm {rows}x{width} bf16", contestants, len(xs), nbytes))
    return cases


def softmax_cases(bench: Bench) -> list[Case]:
    """[rows, keys]."""
    cases = []
    for rows, keys in bench.choose([(65536, 1024), (16384, 4096), (4096, 16384)], [(64, 80)]):
        nbytes = 4.0 * rows * keys
        xs = [bench.rand(rows, keys) for _ in range(bench.copies_of(nbytes))]
        contestants = {
            "alula": lambda i, xs=xs: ops.scaled_masked_softmax(xs[i], scale=0.125),
            "torch": lambda i, xs=xs: (xs[i] * 0.125).softmax(-1),
        }
        cases.append(Case(f"scaled_masked_softmax {rows}x{keys} bf16", contestants, len(xs), nbytes))
    return cases


def linear_cases(bench: Bench) -> list[Case]:
    """Rows x output x input features of SantaCoder; the last is its head."""
    cases = []
    shapes = [(2304, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (49280, 2048)]
    for rows in (1,) if bench.quick else (1, 4, 16):
        for n, k in bench.choose(shapes, [(96, 64)]):
            nbytes = 2.0 * n * k
            weights = [bench.rand(n, k) / k**0.5 for _ in range(bench.copies_of(nbytes))]
            packed = [ops.pack(weight) for weight in weights]
            x, bias = bench.rand(rows, k), bench.rand(n)
            contestants = {
                "alula": lambda i, x=x, p=packed, b=bias: ops.linear(x, p[i], b),
                "torch": lambda i, x=x, w=weights, b=bias: F.linear(x, w[i], b),
            }
            cases.append(Case(f"linear {rows}x{n}x{k} bf16", contestants, len(weights), nbytes))
    return cases
