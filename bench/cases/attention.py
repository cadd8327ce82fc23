"""Cases of `attention`: decode (memory) and causal prefill (arithmetic), multi-query and multi-head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from alula import ops
from alula.bench.cases.case import PEAKS, Call, Case, Inputs, nbytes, randn
from alula.testing import reference
from torch import Tensor


def cases(quick: bool) -> list[Case]:
    """B batch, T query tokens, S keys, H query heads, G key/value heads, D head size."""
    if quick:
        return [_case(torch.float32, 1, 1, 96, 4, 1, 64), _case(torch.bfloat16, 1, 32, 32, 4, 4, 64)]
    decode = [
        (1, 1, 128, 16, 1, 128),
        (1, 1, 2048, 16, 1, 128),
        (1, 1, 1024, 12, 1, 64),
        (8, 1, 256, 12, 1, 64),
        (1, 1, 1024, 12, 12, 64),
        (1, 1, 2048, 16, 16, 128),
    ]
    prefill = [
        (1, 128, 128, 16, 1, 128),
        (1, 1024, 1024, 16, 1, 128),
        (1, 512, 512, 12, 1, 64),
        (1, 1024, 1024, 12, 12, 64),
    ]
    return [_case(dtype, *shape) for dtype in (torch.float32, torch.bfloat16) for shape in decode + prefill]


def _case(dtype: torch.dtype, batch: int, tokens: int, keys: int, heads: int, kv_heads: int, dim: int) -> Case:
    decode = tokens == 1

    def make(generator: torch.Generator) -> Inputs:
        return {
            "q": randn(generator, batch, tokens, heads, dim, dtype=dtype),
            "kv_cache": randn(generator, batch, kv_heads, keys, 2 * dim, dtype=dtype),
            "positions": torch.arange(keys - tokens, keys, dtype=torch.int32).expand(batch, -1).contiguous(),
            "lengths": torch.full((batch,), keys, dtype=torch.int32),
        }

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> Tensor:
        return reference.attention(**inputs, compute_dtype=compute_dtype)

    def alula(inputs: Inputs) -> Call:
        return lambda: ops.attention(**inputs)

    def sdpa(inputs: Inputs) -> Call:
        q = inputs["q"].transpose(1, 2).contiguous()
        k, v = (part.contiguous() for part in inputs["kv_cache"].split(dim, dim=-1))
        gqa = heads != kv_heads

        def call() -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=not decode, enable_gqa=gqa)
            return out.transpose(1, 2).reshape(batch, tokens, heads * dim)

        return call

    cache_bytes = nbytes(((batch, kv_heads, keys, 2 * dim), dtype), ((batch, 2, heads, dim), dtype))
    pairs = batch * tokens * (2 * keys - tokens + 1) // 2  # query-key pairs under the causal limit
    kind = "MQA" if kv_heads == 1 else "MHA"
    return Case(
        op="attention",
        name=f"{'decode' if decode else 'prefill'} {kind} B{batch} T{tokens} S{keys} H{heads} D{dim}",
        dtype=dtype,
        bound="read" if decode else PEAKS[dtype],
        work=cache_bytes if decode else 4 * pairs * heads * dim,
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch sdpa": sdpa},
    )
