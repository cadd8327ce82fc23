"""Cases of layer norm, softmax, rotary and products, bf16; the peer is PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from alula import ops
from torch import Tensor

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


def rotary_cases(bench: Bench) -> list[Case]:
    """Tokens x heads x head size (values turned), of CodeGen: queries, and as many keys."""
    cases = []
    shapes = [(8192, 16, 64, 32), (4096, 16, 256, 64)]
    for tokens, heads, head_dim, turned in bench.choose(shapes, [(40, 2, 16, 8)]):
        nbytes = 8.0 * tokens * heads * head_dim
        qs = [bench.rand(1, tokens, heads, head_dim) for _ in range(bench.copies_of(nbytes))]
        ks = [bench.rand(1, tokens, heads, head_dim) for _ in qs]
        positions = torch.arange(tokens, dtype=torch.int32, device=bench.device).unsqueeze(0)
        table = ops.rotary_table(tokens, turned, device=bench.device.type)
        angles = table.view(1, tokens, 1, turned).to(torch.bfloat16)

        def peer(i: int, qs=qs, ks=ks, angles=angles) -> tuple[Tensor, Tensor]:
            return _turned(qs[i], angles), _turned(ks[i], angles)

        contestants = {
            "alula": lambda i, qs=qs, ks=ks, p=positions, t=table: ops.rotary(qs[i], ks[i], p, t),
            "torch": peer,
        }
        cases.append(Case(f"rotary {tokens}x{heads}x{head_dim} ({turned}) bf16", contestants, len(qs), nbytes))
    return cases


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbouring pairs (a, b) of the first values of a head become (a cos - b sin, b cos + a sin)."""
    cosine, sine = angles.chunk(2, dim=-1)
    a, b = x[..., 0 : 2 * cosine.shape[-1] : 2], x[..., 1 : 2 * cosine.shape[-1] : 2]
    turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 2 * cosine.shape[-1] :]], dim=-1)


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
