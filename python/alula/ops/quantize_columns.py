"""A group of a weight's columns to 4-bit codes, with rounding errors made up for."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.ops.arguments import same_device
from alula.packed_weight import format_code, panel_bytes, refuse_grad


def quantize_columns(
    weight: Tensor, factor: Tensor, format: str, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """One step of GPTQ (Frantar et al. 2022): the columns of one group, one after another, each rounded to its nearest
    code and its error taken out of the columns of the group that follow.

    Args:
        weight: float32 [N, c], c from 1 to the group size, on the CPU; what the groups before left of them.
        factor: float32 [c, c], these columns' block of the upper triangular U with U^T U = H^-1, H the second moment of
            the inputs; its diagonal is positive, what lies below is not read.
        format: "int4", "int4_asymmetric" or "nf4". group_size: as :func:`alula.ops.pack` takes it.

    Returns: the group's bytes, uint8 [ceil(N / 32), bytes of a group], as they stand in a packed weight, and the errors
    E, float32 [N, c]: the columns that follow the group are to become ``w - E @ U[group, following]``.
    Scales are those that :func:`alula.ops.pack` chooses for ``weight``. RuntimeError for other dtypes, shapes, formats,
    for a factor that is none, and for weights that are not finite or too large for fp16 scales.
    """
    refuse_grad(weight, factor)
    return torch.ops.alula.quantize_columns(weight, factor, format_code(format, group_size))


@torch.library.register_fake("alula::quantize_columns")
def _(weight, factor, format):
    same_device(weight=weight, factor=factor)
    n, count = weight.shape
    packed = weight.new_empty([(n + 31) // 32, panel_bytes(format, count)], dtype=torch.uint8)
    return packed, weight.new_empty([n, count])
