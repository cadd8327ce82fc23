"""Cases of attention, bf16: decoding and prefill. Peers: the dispatcher's dense scaled_dot_product_attention, and
flex_attention, compiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from alula import ops
from torch import Tensor

from .timing import Bench, Case


def _last_tokens(bench: Bench, batch: int, tokens: int, context: int) -> tuple[Tensor, Tensor]:
    """positions int32 [B, T] and lengths int32 [B] of the last T of `context` tokens."""
    positions = torch.arange(context - tokens, context, dtype=torch.int32, device=bench.device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
    return positions.repeat(batch, 1), lengths


def _flex() -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention


def decode_cases(bench: Bench) -> list[Case]:
    """One query token a row; context tokens in the cache."""
    cases = []
    shapes = [
        (1, 16, 1, 128, 512),
        (1, 16, 1, 128, 2048),
        (1, 16, 1, 128, 8192),
        (8, 16, 1, 128, 8192),
        (64, 16, 1, 128, 8192),
        (8, 48, 1, 128, 8192),
        (8, 12, 12, 64, 1024),
    ]
    for batch, heads, kv_heads, head_dim, context in bench.choose(shapes, [(2, 4, 1, 16, 40)]):
        nbytes = 4.0 * batch * kv_heads * context * head_dim
        caches = [bench.rand(batch, kv_heads, context, 2 * head_dim) for _ in range(bench.copies_of(nbytes))]
        q = bench.rand(batch, 1, heads, head_dim)
        positions, lengths = _last_tokens(bench, batch, 1, context)

        def peer(i: int, caches=caches, q=q, d=head_dim) -> Tensor:
            key, value = caches[i].split(d, dim=-1)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)

        contestants = {
            "alula": lambda i, q=q, c=caches, p=positions, n=lengths: ops.attention(q, c[i], p, n),
            "torch sdpa": peer,
        }
        name = f"attention decode B{batch} H{heads} G{kv_heads} D{head_dim} S{context} bf16"
        cases.append(Case(name, contestants, len(caches), nbytes))
    return cases


def prefill_cases(bench: Bench) -> list[Case]:
    """T tokens at once, causal."""
    cases = []
    shapes = [(16, 1, 128, 2048), (48, 1, 128, 8192), (12, 12, 64, 1024)]
    for heads, kv_heads, head_dim, tokens in bench.choose(shapes, [(4, 1, 16, 40)]):
        flops = 2.0 * heads * tokens * tokens * head_dim  # half of the square, two products
        caches = [bench.rand(1, kv_heads, tokens, 2 * head_dim) for _ in range(2)]
        q = bench.rand(1, tokens, heads, head_dim)
        positions, lengths = _last_tokens(bench, 1, tokens, tokens)

        def peer(i: int, caches=caches, q=q, d=head_dim) -> Tensor:
            key, value = caches[i].split(d, dim=-1)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), key, value, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)

        flex = _flex()
        mask = flex.create_block_mask(_is_causal, None, None, tokens, tokens, device=bench.device.type)
        call = bench.compiled(flex.flex_attention, dynamic=False)

        def flex_peer(i: int, caches=caches, q=q, d=head_dim, call=call, mask=mask) -> Tensor:
            key, value = caches[i].split(d, dim=-1)
            return call(q.transpose(1, 2), key, value, block_mask=mask, enable_gqa=True).transpose(1, 2).flatten(2)

        contestants = {
            "alula": lambda i, q=q, c=caches, p=positions, n=lengths: ops.attention(q, c[i], p, n),
            "torch sdpa": peer,
            "torch flex": flex_peer,
        }
        name = f"attention prefill H{heads} G{kv_heads} D{head_dim} T{tokens} bf16"
        cases.append(Case(name, contestants, len(caches), flops=flops))
    return cases


def _is_causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
