"""Calibrated quantization of a decoder: a text goes through the blocks, and each matrix is quantized (gptq.py) for what
it multiplies there, which the matrices before it, quantized already, have made.

The stream of every row of the text is kept between two products; one second moment is kept at a time.

B batch (1), T tokens of a row, E model width, F MLP width, H query heads, D head size, N rows of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alula.gptq import SecondMoment
from alula.models.blocks import BlockShape, attention_op, embedding_op, product, qkv_op
from alula.models.layers import WeightModule
from alula.models.matrix import Matrix, in_turn
from alula.ops import PackedWeight

__all__ = ["calibrate", "check_calibration", "rows_of"]

LONGEST_ROW = 2048  # tokens of text that go through the blocks at once
FAMILIES = ("gpt_bigcode", "gpt2", "codegen")


class Stage(NamedTuple):
    """One product. ``inputs``: the stream [1, T, E] -> what is multiplied, [1, T, K]; ``output``: the stream -> what it
    is once the product was added to it; None for a product that makes the inputs of the next."""

    layer: WeightModule
    inputs: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor] | None = None


def check_calibration(model: Any, format: str) -> None:
    """ValueError for a model or a format that is not calibrated."""
    if format == "int8":
        raise ValueError("calibration is for int4, int4_asymmetric and nf4; int8 weights lose next to nothing without")
    config = model.config
    if config.model_type not in FAMILIES or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"calibration is for GPTBigCode, GPT-2 and CodeGen without cross-attention, not for this "
            f"{type(model).__name__}; quantize it without"
        )
    if model.device.type != "cpu":
        raise ValueError(f"calibration runs on the CPU, and the model is on {model.device}; move it there afterwards")


def rows_of(model: Any, ids: Tensor | Sequence[int]) -> list[Tensor]:
    """Token ids [n], or [rows, n], as rows int64 [1, T] that fit the model. ValueError for what is no text for it."""
    accepted = "accepted: token ids of a text, int64 [n] or [rows, n]"
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"calibration is a {type(ids).__name__} that is no tensor ({error}); {accepted}") from None
    if given.dim() not in (1, 2) or given.dtype not in (torch.int64, torch.int32) or not given.numel():
        raise ValueError(f"calibration is {given.dtype} {list(given.shape)}; {accepted}")
    low, high, vocab = int(given.min()), int(given.max()), model.base_model.wte.num_embeddings
    if low < 0 or high >= vocab:
        raise ValueError(f"calibration holds token {low if low < 0 else high}; accepted: 0 to {vocab - 1}")
    length = min(LONGEST_ROW, model.config.max_position_embeddings)
    texts = given.to("cpu", torch.int64).reshape(-1, given.shape[-1])
    return [row.unsqueeze(0).contiguous() for text in texts for row in text.split(length)]


def calibrate(
    model: Any,
    matrices: Sequence[Matrix],
    rows: Sequence[Tensor],
    dtype: torch.dtype,
    progress: Callable[[list[Matrix]], Iterable[Matrix]],
) -> None:
    """Quantizes ``matrices`` of a dense model, whose layers' formats are set.

    Args:
        rows: of :func:`rows_of`. dtype: of what is read out of a matrix. progress: wraps the list of matrices, in the
            order in which they are quantized.

    Raises ValueError, before anything is changed, for rows with fewer tokens than the widest product has inputs.
    """
    base, head = model.base_model, model.get_output_embeddings()
    tokens = sum(row.shape[1] for row in rows)
    widest = max((matrix.shape[1] for matrix in matrices), default=0)
    if tokens < widest:
        raise ValueError(
            f"the calibration text has {tokens} tokens, and the widest matrix multiplies {widest} values: give at "
            f"least {widest} tokens"
        )
    matrix_of = {id(layer): matrix for matrix in matrices for layer in matrix.layers}
    blocks = [stages_of(base, index) for index in range(len(base.h))]
    in_blocks = [matrix_of.pop(id(s.layer)) for stages in blocks for s in stages if id(s.layer) in matrix_of]
    matrix_of = {key: m for key, m in matrix_of.items() if m not in in_blocks}
    table = matrix_of.pop(id(base.wte), None)
    order = [m for m in [table, *in_blocks, *matrix_of.values()] if m is not None]
    steps = in_turn(order, progress)

    def quantize(matrix: Matrix, inputs: Iterable[Tensor] | None) -> None:
        next(steps)
        moment = None
        if inputs is not None:
            moment = SecondMoment(matrix.shape[1])
            for x in inputs:
                moment.add(x)
        matrix.write([layer.read("weight") for layer in matrix.layers], dtype, moment)

    if table is not None:
        # Read as a table it has no inputs; as the tied output projection it has those of the dense model.
        is_tied = head is not None and getattr(head, "is_tied", False)
        quantize(table, (base(row, use_cache=False)[0] for row in rows) if is_tied else None)
    stream = [_embed(base, row) for row in rows]
    for stages in blocks:
        for stage in stages:
            matrix = next((m for m in in_blocks if stage.layer in m.layers), None)
            if matrix is not None:
                quantize(matrix, map(stage.inputs, stream))
            if stage.output is not None:
                for i, x in enumerate(stream):
                    stream[i] = stage.output(x)
    for matrix in matrix_of.values():  # of heads
        quantize(matrix, map(base.ln_f, stream))
    for _ in steps:  # so that a bar ends
        pass


def _embed(base: Any, row: Tensor) -> Tensor:
    """int64 [1, T] -> [1, T, E]."""
    bound = base._bind()
    table, positions = bound.table, bound.position_table
    places = None if positions is None else torch.arange(row.shape[1]).unsqueeze(0)
    return embedding_op(
        row,
        table.data,
        bound.vocab_size,
        base._shape.width,
        places,
        positions,
        None,
        format=table.code,
        dtype=table.value_dtype,
    )


def stages_of(base: Any, index: int) -> list[Stage]:
    """The products of a block in their order; merged matrices by the first of their layers."""
    return _parallel_stages(base, index) if hasattr(base.h[index], "merged_layers") else _sequential_stages(base, index)


def _sequential_stages(base: Any, index: int) -> list[Stage]:
    block, shape = base.h[index], base._shape

    def attended(x: Tensor) -> Tensor:
        w = block.bind()
        return _attention(shape, index, x, w.qkv_weight, w.qkv_bias, w.norm1_weight, w.norm1_bias)

    def add_attention(x: Tensor) -> Tensor:
        w = block.bind()
        return product(attended(x), w.out_weight, w.out_bias, residual=x)

    def inner(x: Tensor) -> Tensor:
        w = block.bind()
        return product(x, w.fc_weight, w.fc_bias, w.norm2_weight, w.norm2_bias, shape.norm_eps, shape.activation)

    def add_mlp(x: Tensor) -> Tensor:
        w = block.bind()
        return product(inner(x), w.proj_weight, w.proj_bias, residual=x)

    return [
        Stage(block.attn.c_attn, block.ln_1),
        Stage(block.attn.c_proj, attended, add_attention),
        Stage(block.mlp.c_fc, block.ln_2),
        Stage(block.mlp.c_proj, inner, add_mlp),
    ]


def _parallel_stages(base: Any, index: int) -> list[Stage]:
    block, shape = base.h[index], base._shape

    def inner(x: Tensor) -> Tensor:
        """Attention's output beside the activated MLP, [1, T, E + F]."""
        w = block.bind()
        both = x.new_empty(*x.shape[:2], shape.width + shape.mlp_width)
        mlp = both[..., shape.width :]
        attended = _attention(
            shape, index, x, w.in_weight, w.in_bias, w.norm_weight, w.norm_bias, (base._rotary_table, mlp)
        )
        both[..., : shape.width] = attended
        return both

    def add(x: Tensor) -> Tensor:
        w = block.bind()
        return product(inner(x), w.out_weight, w.out_bias, residual=x)

    return [Stage(block.attn.qkv_proj, block.ln_1), Stage(block.attn.out_proj, inner, add)]


def _attention(
    shape: BlockShape,
    layer: int,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    parallel: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of x [1, T, E] within itself, before the output projection: [1, T, H * D].

    parallel: of CodeGen, the rotary table, and the view [1, T, F] that the activated MLP is written into.
    """
    tokens = x.shape[1]
    kv = x.new_zeros(1, shape.num_kv_heads, tokens, 2 * shape.head_dim)
    positions = torch.arange(tokens, dtype=torch.int32).unsqueeze(0)
    rotary, mlp = parallel or (None, None)
    q = qkv_op(
        x,
        weight.data,
        bias,
        norm_weight,
        norm_bias,
        shape.norm_eps,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        kv,
        positions,
        rotary,
        None if rotary is None else positions,
        mlp,
        shape.activation if mlp is not None else 0,
        weight.code,
    )
    lengths = torch.tensor([tokens], dtype=torch.int32)
    return attention_op(q, kv, positions, lengths, None, None, shape.scales[layer], True)
