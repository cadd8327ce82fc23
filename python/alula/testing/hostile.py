"""The same values in memory as awkward as a caller can make it, with NaN wherever a kernel has no business to read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def misaligned(x: Tensor) -> Tensor:
    """Contiguous, but its first element is one element past the start of its storage."""
    base = torch.full((x.numel() + 2,), torch.nan, dtype=x.dtype)
    return base[1 : 1 + x.numel()].view(x.shape).copy_(x)


def gaps_between_rows(x: Tensor) -> Tensor:
    """The last dimension is dense, the row stride is odd and larger than the row."""
    base = torch.full((*x.shape[:-1], x.shape[-1] + 5 + x.shape[-1] % 2 * 2), torch.nan, dtype=x.dtype)
    return base[..., 3 : 3 + x.shape[-1]].copy_(x)


def gaps_between_elements(x: Tensor) -> Tensor:
    """Every third element of a larger tensor."""
    base = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    return base[..., 1::3].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The last two dimensions lie in memory the other way round (one dimension: gaps between elements)."""
    return x.mT.contiguous().mT if x.dim() > 1 else gaps_between_elements(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": misaligned,
    "gaps_between_rows": gaps_between_rows,
    "gaps_between_elements": gaps_between_elements,
    "transposed": transposed,
}


def any_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bit patterns: NaNs of every payload, infinities, subnormals and both zeros among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    values = torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).squeeze(-1)
    flat = values.view(-1)
    for i, special in enumerate((-0.0, 0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).smallest_normal / 2)):
        flat[i : i + 1] = special
    return values
