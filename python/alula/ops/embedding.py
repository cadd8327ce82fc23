"""The sum of token, position and token type embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors
from alula.ops.arguments import same_device
from alula.packed_weight import PackedWeight, refuse_grad


@raises_torch_errors
def embedding(
    input_ids: Tensor,
    table: PackedWeight,
    *,
    position_ids: Tensor | None = None,
    position_table: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_table: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum of embeddings, added in float32 and rounded once.

    Args:
        input_ids: int64 [B, T], each in [0, V).
        table: packed [V, E]; may be the same object as the packed output matrix of a tied model.
        position_ids: int64 [B, T] or [1, T], each in [0, P); needs ``position_table`` [P, E] (not packed).
        token_type_ids: int64 [B, T]; rows of ``table`` added on top, as GPT-2 and GPTBigCode do, or rows of
            ``token_type_table`` [types, E] (not packed), as BigBird does.
        scale: multiplies the row of ``table`` that ``input_ids`` names.

    Returns: [B, T, E] in the table's dtype. Raises RuntimeError for an id out of range, naming it.
    """
    refuse_grad(table.data, position_table, token_type_table)
    return torch.ops.alula.embedding(
        input_ids,
        table.data,
        table.out_features,
        table.in_features,
        position_ids,
        position_table,
        token_type_ids,
        token_type_table,
        scale,
        table.code,
        table.value_dtype,
    )


@torch.library.register_fake("alula::embedding")
def _(
    input_ids,
    packed,
    num_embeddings,
    embedding_dim,
    position_ids,
    position_table,
    token_type_ids,
    token_type_table=None,
    scale=1.0,
    format=0,
    dtype=None,
):
    same_device(
        input_ids=input_ids,
        packed=packed,
        position_ids=position_ids,
        position_table=position_table,
        token_type_ids=token_type_ids,
        token_type_table=token_type_table,
    )
    return packed.new_empty([*input_ids.shape, embedding_dim], dtype=dtype)
