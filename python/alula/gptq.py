"""GPTQ (Frantar et al. 2022): codes chosen for what a product gives on real inputs, not for the weight alone.

Of the inputs X of a product only their second moment H = X^T X is kept. Columns of the weight are rounded one after
another, and each one's error is made up for by the columns that are still to come: with U upper triangular and
U^T U = H^-1, w[j] -= (w[i] - q[i]) / U[i, i] * U[i, j] is the least of ||(W - Q) X^T|| that they can reach. The bytes
are those of any packed weight; nothing changes where they are read.

N output features, K input features, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alula import ops
from alula.packed_weight import PackedWeight

__all__ = ["SecondMoment", "inverse_factor", "pack_calibrated"]

DAMPINGS = (0.01, 0.1, 1.0)  # added to the diagonal, of its mean; the first that Cholesky's method can do
BLOCK = 1024  # columns of H that are summed, and of a factor that are inverted, at once


class SecondMoment:
    """H = X^T X of the rows that were added, float32 [K, K]."""

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, width, dtype=torch.float32)

    def add(self, x: Tensor) -> None:
        """x: [..., K], any floating dtype."""
        width = len(self._sum)
        rows = x.reshape(-1, width).float()
        for first in range(0, width, BLOCK):  # the upper half
            self._sum[first : first + BLOCK, first:].addmm_(rows[:, first : first + BLOCK].T, rows[:, first:])

    def whole(self) -> Tensor:
        """H; the object is of no use afterwards. ValueError where inputs were not finite."""
        h = self._sum
        for first in range(0, len(h), BLOCK):
            end = first + BLOCK
            h[end:, first:end] = h[first:end, end:].T
        if not bool(torch.isfinite(h.diagonal()).all()):
            raise ValueError("its inputs are not finite on the calibration text")
        return h


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (H / mean + damping)^-1, float32 [K, K], mean that of H's diagonal; H is
    changed.

    Inputs that never occur, or that follow from others, leave the damping alone on their side, so any H has a U.
    """
    mean = float(h.diagonal().double().mean())
    if mean > 0:
        h /= mean
    # With rows and columns in reverse, H = L L^T has the inverse's factor in L^-1.
    h = h.flip(0, 1)
    damped = 0.0
    for damping in DAMPINGS:
        h.diagonal().add_(damping - damped)
        damped = damping
        lower, info = torch.linalg.cholesky_ex(h)
        if not int(info):
            return _inverse(lower, torch.zeros_like(lower)).flip(0, 1)
    raise ValueError("the second moment of its inputs has no Cholesky factor")


def _inverse(lower: Tensor, out: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix into ``out``, zeros, by halves: half the time of solving for an identity
    at K = 8192."""
    size = len(lower)
    if size <= BLOCK:
        return out.copy_(torch.linalg.solve_triangular(lower, torch.eye(size, dtype=lower.dtype), upper=False))
    half = size // 2
    first, second = _inverse(lower[:half, :half], out[:half, :half]), _inverse(lower[half:, half:], out[half:, half:])
    out[half:, :half] = (second @ (lower[half:, :half] @ first)).neg_()
    return out


def pack_calibrated(value: Tensor, format: str, group_size: int, activations: str, h: Tensor) -> PackedWeight:
    """As :func:`alula.ops.pack`, for inputs whose second moment is ``h`` [K, K] (changed); the 4-bit formats.

    RuntimeError for a weight that pack refuses, ValueError for an H that is not finite.
    """
    packed = ops.pack(value, format, group_size, activations=activations)  # the memory, and the checks
    factor = inverse_factor(h)
    left = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    starts = range(0, packed.in_features, group_size)
    for place, first in zip(packed.data.chunk(len(starts), 1), starts, strict=True):
        block = factor[first : first + group_size]
        end = first + len(block)
        codes, errors = ops.quantize_columns(left[:, first:end], block[:, first:end], format, group_size)
        place.copy_(codes)
        left[:, end:].addmm_(errors, block[:, end:], alpha=-1)
    return packed
