"""Layer norm, query/key/value projection, rotary embedding and the write into the cache, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.activations import activation_code
from alula.memory import raises_torch_errors
from alula.ops.arguments import refuse_width, same_device
from alula.packed_weight import PackedWeight, refuse_grad


@raises_torch_errors
def qkv_projection(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_cache: Tensor,
    positions: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    rotary_table: Tensor | None = None,
    rotary_positions: Tensor | None = None,
    mlp: Tensor | None = None,
    mlp_activation: str = "none",
) -> Tensor:
    """Layer norm, QKV product, bias, split, rotary, and the write of key and value into the merged cache, in one call.

    Args:
        x: [B, T, E]. weight: packed, rows ``[q (H*D) | k (G*D) | v (G*D)]``. bias: [(H + 2*G)*D].
        kv_cache: [B, G, S, 2*D], written in place: key in ``[..., :D]``, value in ``[..., D:]``.
        positions: int32 [B, T]; token t of row b is written at ``kv_cache[b, :, positions[b, t]]``, a negative
            position means padding and writes nothing.
        rotary_table: float32 [P, rotary_dim] of :func:`rotary_table`; turns query and key (interleaved pairs) by the
            angles of ``rotary_positions``, int32 [B, T], before the key is written.
        mlp: [B, T, F], written: for a block whose MLP reads the same normed input (CodeGen), ``weight`` and ``bias``
            have F more rows, and their activated product goes here. May be a range of a wider tensor's last dimension.

    Returns: the query, [B, T, H, D].
    """
    refuse_grad(x, bias, kv_cache, norm_weight, norm_bias, mlp)
    refuse_width(x, weight)
    features = (num_heads + 2 * num_kv_heads) * head_dim + (mlp.size(-1) if mlp is not None and mlp.dim() else 0)
    if features != weight.out_features:
        raise ValueError(
            f"num_heads {num_heads}, num_kv_heads {num_kv_heads}, head_dim {head_dim} (and the width of mlp) make "
            f"{features} features of q, k, v (and mlp); the weight has {weight.out_features}"
        )
    return torch.ops.alula.qkv_projection(
        x,
        weight.data,
        bias,
        norm_weight,
        norm_bias,
        norm_eps,
        num_heads,
        num_kv_heads,
        head_dim,
        kv_cache,
        positions,
        rotary_table,
        rotary_positions,
        mlp,
        activation_code(mlp_activation),
        weight.code,
    )


@torch.library.register_fake("alula::qkv_projection")
def _(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    norm_eps,
    num_heads,
    num_kv_heads,
    head_dim,
    kv_cache,
    positions,
    rotary_table=None,
    rotary_positions=None,
    mlp=None,
    mlp_activation=0,
    format=0,
):
    same_device(
        x=x,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        kv_cache=kv_cache,
        positions=positions,
        rotary_table=rotary_table,
        rotary_positions=rotary_positions,
        mlp=mlp,
    )
    return x.new_empty([x.shape[0], x.shape[1], num_heads, head_dim])
