"""Attention of queries over a merged key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors
from alula.ops.arguments import same_device
from alula.packed_weight import refuse_grad


@raises_torch_errors
def attention(
    q: Tensor,
    kv_cache: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over the merged cache: multi-head, grouped and multi-query, prefill and decode, from one kernel.

    Query t of row b sees key j iff ``j < lengths[b]`` and, when ``causal``, ``j <= positions[b, t]``.

    Args:
        q: [B, T, H, D], D a multiple of 8 up to 256. kv_cache: [B, G, S, 2*D], G divides H; query head h reads
            key/value head ``h // (H // G)``. positions: int32 [B, T], negative = padding. lengths: int32 [B].
        scale: multiplies the scores, default ``D ** -0.5``.
        mask: [B or 1, H or 1, T, S'] with S' >= max(lengths); bool (True = visible) or floating point, added.
        head_mask: float32 [H], multiplies the probabilities of each head.
        out: [B, T, H*D], written and returned; may be a range of a wider tensor's last dimension.

    Returns: [B, T, H*D]. Scores, softmax and sums are float32. A row with no visible key is zeros.
    Algorithm: online softmax (Milakov and Gimelshein 2018) over key tiles, as in FlashAttention (Dao et al. 2022).
    """
    refuse_grad(q, kv_cache, mask, head_mask, out)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if out is not None:
        torch.ops.alula.attention_into(q, kv_cache, positions, lengths, mask, head_mask, scale, causal, out)
        return out
    return torch.ops.alula.attention(q, kv_cache, positions, lengths, mask, head_mask, scale, causal)


@torch.library.register_fake("alula::attention")
def _(q, kv_cache, positions, lengths, mask, head_mask, scale, causal):
    same_device(q=q, kv_cache=kv_cache, positions=positions, lengths=lengths, mask=mask, head_mask=head_mask)
    return q.new_empty([q.shape[0], q.shape[1], q.shape[2] * q.shape[3]])


@torch.library.register_fake("alula::attention_into")
def _(q, kv_cache, positions, lengths, mask, head_mask, scale, causal, out):
    same_device(q=q, kv_cache=kv_cache, positions=positions, lengths=lengths, mask=mask, head_mask=head_mask, out=out)
