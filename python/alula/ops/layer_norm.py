"""Layer norm with an optional residual."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors
from alula.ops.arguments import same_device
from alula.packed_weight import refuse_grad


@raises_torch_errors
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer norm of ``x + residual`` over the last dimension, float32 inside (Ba et al. 2016).

    Args:
        x: [..., E]. weight, bias: [E]. residual: the shape of ``x``. All of one dtype.

    Returns: the shape and dtype of ``x``.
    """
    refuse_grad(x, weight, bias, residual)
    return torch.ops.alula.layer_norm(x, weight, bias, eps, residual)


@torch.library.register_fake("alula::layer_norm")
def _(x, weight, bias, eps, residual):
    same_device(x=x, weight=weight, bias=bias, residual=residual)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
