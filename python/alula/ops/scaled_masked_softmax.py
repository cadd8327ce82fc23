"""Scale, mask, softmax in float32 and cast, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors
from alula.ops.arguments import same_device
from alula.packed_weight import refuse_grad


@raises_torch_errors
def scaled_masked_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``softmax(scores * scale + mask)`` over the last dimension, in float32, cast on the way out.

    Args:
        scores: [..., T, S], float32, bfloat16 or float16.
        mask: broadcastable to ``scores``; bool (True = visible) or floating point, added.
        causal: key j is visible to query t iff ``j <= t + (S - T)``.
        dtype: of the result, default that of ``scores``.

    Returns: the shape of ``scores``. A row with no visible key is zeros, never NaN.
    """
    refuse_grad(scores, mask)
    return torch.ops.alula.scaled_masked_softmax(scores, mask, scale, causal, dtype)


@torch.library.register_fake("alula::scaled_masked_softmax")
def _(scores, mask, scale, causal, dtype):
    same_device(scores=scores, mask=mask)
    return torch.empty(scores.shape, dtype=dtype or scores.dtype, device=scores.device)
