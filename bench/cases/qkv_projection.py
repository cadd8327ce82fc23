"""Cases of `qkv_projection`: layer norm, GEMM, bias, split, and the write of key and value into the cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from alula import ops
from alula.bench.cases.case import PEAKS, Call, Case, Inputs, nbytes, randn
from alula.bench.cases.linear import BANDWIDTH_ROWS
from alula.testing import reference
from torch import Tensor


def cases(quick: bool) -> list[Case]:
    """E width, H query heads, G key/value heads."""
    if quick:
        return [_case(torch.float32, 1, 256, 4, 1), _case(torch.bfloat16, 16, 256, 4, 4)]
    return [
        _case(dtype, tokens, width, heads, kv_heads)
        for dtype in (torch.float32, torch.bfloat16)
        for width, heads, kv_heads in ((2048, 16, 1), (768, 12, 1), (768, 12, 12))
        for tokens in (1, 512)
    ]


def _case(dtype: torch.dtype, tokens: int, width: int, heads: int, kv_heads: int) -> Case:
    dim = width // heads
    rows_out = (heads + 2 * kv_heads) * dim
    head_counts = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}

    def make(generator: torch.Generator) -> Inputs:
        return {
            "x": randn(generator, 1, tokens, width, dtype=dtype),
            "weight": randn(generator, rows_out, width, dtype=dtype, std=width**-0.5),
            "bias": randn(generator, rows_out, dtype=dtype),
            "norm_weight": 1 + randn(generator, width, dtype=dtype, std=0.1),
            "norm_bias": randn(generator, width, dtype=dtype, std=0.1),
            "positions": torch.arange(tokens, dtype=torch.int32)[None],
        }

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(1, kv_heads, tokens, 2 * dim, dtype=compute_dtype)
        q = reference.qkv_projection(**inputs, **head_counts, kv_cache=cache, compute_dtype=compute_dtype)
        return q, cache

    def alula(inputs: Inputs) -> Call:
        cache = torch.zeros(1, kv_heads, tokens, 2 * dim, dtype=dtype)
        weight = ops.pack(inputs["weight"])
        others = {name: tensor for name, tensor in inputs.items() if name != "weight"}
        return lambda: (ops.qkv_projection(weight=weight, kv_cache=cache, **others, **head_counts), cache)

    def torch_ops(inputs: Inputs) -> Call:
        cache = torch.zeros(1, kv_heads, tokens, 2 * dim, dtype=dtype)
        x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
        scale, shift = inputs["norm_weight"], inputs["norm_bias"]

        def call() -> tuple[Tensor, Tensor]:
            qkv = F.linear(F.layer_norm(x, (width,), scale, shift), weight, bias)
            q, k, v = qkv.view(1, tokens, -1, dim).split([heads, kv_heads, kv_heads], dim=2)
            cache[..., :dim] = k.transpose(1, 2)
            cache[..., dim:] = v.transpose(1, 2)
            return q, cache

        return call

    memory = tokens <= BANDWIDTH_ROWS
    return Case(
        op="qkv_projection",
        name=f"{tokens} tokens E{width} H{heads} G{kv_heads}",
        dtype=dtype,
        bound="read" if memory else PEAKS[dtype],
        work=nbytes(((rows_out, width), dtype)) if memory else 2 * tokens * width * rows_out,
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch": torch_ops},
    )
