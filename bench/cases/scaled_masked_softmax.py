"""Cases of `scaled_masked_softmax`: scores beyond the cache; the time of a copy is the limit."""

from __future__ import annotations

import torch
from alula import ops
from alula.bench.cases.case import Call, Case, Inputs, nbytes, randn
from alula.testing import reference
from torch import Tensor

SCALE = 0.125


def cases(quick: bool) -> list[Case]:
    """Scores [1, H, T, S]."""
    shape = (1, 2, 16, 64) if quick else (1, 16, 1024, 2048)
    return [
        _case(kind, dtype, shape)
        for dtype in (torch.float32, torch.bfloat16)
        for kind in ("scale", "scale + additive mask", "scale + causal")
    ]


def _case(kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    _, heads, tokens, keys = shape
    causal, masked = kind.endswith("causal"), kind.endswith("mask")

    def make(generator: torch.Generator) -> Inputs:
        inputs = {"scores": randn(generator, *shape, dtype=dtype, std=4.0)}
        if masked:
            hidden = torch.rand(1, 1, tokens, keys, generator=generator) < 0.25
            hidden[..., 0] = False
            inputs["mask"] = torch.zeros(1, 1, tokens, keys, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        return inputs

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> Tensor:
        return reference.scaled_masked_softmax(**inputs, scale=SCALE, causal=causal, compute_dtype=compute_dtype)

    def alula(inputs: Inputs) -> Call:
        return lambda: ops.scaled_masked_softmax(**inputs, scale=SCALE, causal=causal)

    def torch_ops(inputs: Inputs) -> Call:
        scores, mask = inputs["scores"], inputs.get("mask")
        if causal:
            visible = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
            mask = torch.zeros(tokens, keys, dtype=dtype).masked_fill_(~visible, -torch.inf)
        if mask is None:
            return lambda: (scores * SCALE).softmax(dim=-1, dtype=torch.float32).to(dtype)
        return lambda: (scores * SCALE + mask).softmax(dim=-1, dtype=torch.float32).to(dtype)

    size = nbytes((shape, dtype))
    read = heads * tokens * (2 * keys - tokens + 1) // 2 * dtype.itemsize if causal else size
    return Case(
        op="scaled_masked_softmax",
        name=f"{kind} H{heads} {tokens}x{keys}",
        dtype=dtype,
        bound="copy",
        work=read + size + (nbytes(((tokens, keys), dtype)) if masked else 0),
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch": torch_ops},
    )
