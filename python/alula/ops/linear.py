"""A product with a packed weight, with everything around it fused."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.activations import activation_code
from alula.memory import raises_torch_errors
from alula.ops.arguments import refuse_width, same_device
from alula.packed_weight import PackedWeight, refuse_grad


@raises_torch_errors
def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(layer_norm(x) @ weight.T + bias) + residual`` in one call; layer norm iff ``norm_weight`` is given.

    Args:
        x: [..., K] in the weight's dtype (float32, bfloat16, float16), any strides.
        weight: packed [N, K], dense or quantized; a quantized one takes x of any of the dtypes.
        bias: [N]. residual: [..., N]. norm_weight, norm_bias: [K]. All in the dtype of x.
        activation: a name of ``ACTIVATIONS``.

    Returns: [..., N]. Everything between load and store is float32, except that the normed input is rounded to
    bfloat16 for a bfloat16 product. The sum over K runs in the same order for any number of rows, so a row's result
    does not depend, in any bit, on what else is in the batch.
    """
    refuse_grad(x, bias, residual, norm_weight, norm_bias)
    refuse_width(x, weight)
    return torch.ops.alula.linear(
        x,
        weight.data,
        weight.out_features,
        bias,
        norm_weight,
        norm_bias,
        norm_eps,
        activation_code(activation),
        residual,
        weight.code,
    )


@torch.library.register_fake("alula::linear")
def _(x, weight, out_features, bias, norm_weight, norm_bias, norm_eps, activation, residual, format=0):
    same_device(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    return x.new_empty([*x.shape[:-1], out_features])
