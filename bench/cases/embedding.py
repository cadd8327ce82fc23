"""Cases of `embedding`: word rows plus position rows, from a table beyond the cache; each call takes other rows."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from alula import ops
from alula.bench.cases.case import Call, Case, Inputs, nbytes, randn
from alula.testing import reference
from torch import Tensor

DRAWS = 64  # sets of ids that the calls go through


def cases(quick: bool) -> list[Case]:
    """Tokens of a call, vocabulary V, width E."""
    shapes = [(16, 512, 64)] if quick else [(512, 49280, 2048), (512, 49152, 768)]
    return [_case(dtype, *shape) for dtype in (torch.float32, torch.bfloat16) for shape in shapes]


def _case(dtype: torch.dtype, tokens: int, vocabulary: int, width: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {
            "input_ids": torch.randint(vocabulary, (DRAWS, tokens), generator=generator),
            "table": randn(generator, vocabulary, width, dtype=dtype),
            "position_ids": torch.arange(tokens)[None],
            "position_table": randn(generator, max(tokens, 16), width, dtype=dtype),
        }

    def expected(inputs: Inputs, compute_dtype: torch.dtype) -> Tensor:
        return reference.embedding(**{**inputs, "input_ids": inputs["input_ids"][:1]}, compute_dtype=compute_dtype)

    def alula(inputs: Inputs) -> Call:
        table = ops.pack(inputs["table"])
        draws = itertools.cycle(inputs["input_ids"].split(1))
        positions, position_table = inputs["position_ids"], inputs["position_table"]
        return lambda: ops.embedding(next(draws), table, position_ids=positions, position_table=position_table)

    def torch_ops(inputs: Inputs) -> Call:
        draws, positions = itertools.cycle(inputs["input_ids"].split(1)), inputs["position_ids"]
        table, position_table = inputs["table"], inputs["position_table"]
        return lambda: F.embedding(next(draws), table) + F.embedding(positions, position_table)

    return Case(
        op="embedding",
        name=f"{tokens} tokens V{vocabulary} E{width}",
        dtype=dtype,
        bound="copy",
        work=3 * nbytes(((tokens, width), dtype)),
        make=make,
        reference=expected,
        prepare={"alula": alula, "torch": torch_ops},
    )
