"""Rotary position embeddings (Su et al. 2021) on their own."""

from __future__ import annotations

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors
from alula.ops.arguments import same_device
from alula.packed_weight import refuse_grad


def rotary_table(num_positions: int, rotary_dim: int, base: float = 10000.0, *, device: str | None = None) -> Tensor:
    """Cosines, then sines, of the angles ``position * base ** (-2 i / rotary_dim)``.

    Returns: float32 [num_positions, rotary_dim].
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and positive")
    inverse = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float() / rotary_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), inverse)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@raises_torch_errors
def rotary(
    q: Tensor, k: Tensor, positions: Tensor, table: Tensor, *, interleaved: bool = True, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of query and key in one pass (Su et al. 2021, RoFormer).

    Args:
        q: [B, T, H, D]. k: [B, T, G, D]. The first rotary_dim values of each head turn, the others stay.
        positions: int32 [B, T], rows of ``table``. table: float32 [P, rotary_dim] from :func:`rotary_table`.
        interleaved: pairs (0, 1), (2, 3), ... as GPT-J and CodeGen; else (0, r/2), (1, r/2 + 1), ... as GPT-NeoX.
        inplace: write into ``q`` and ``k`` (contiguous last dimension) and return them.

    Returns: turned q and k, of the dtype given; angles and products are float32.
    """
    refuse_grad(q, k)
    if inplace:
        torch.ops.alula.rotary_(q, k, positions, table, interleaved)
        return q, k
    return torch.ops.alula.rotary(q, k, positions, table, interleaved)


@torch.library.register_fake("alula::rotary")
def _(q, k, positions, table, is_interleaved):
    same_device(q=q, k=k, positions=positions, table=table)
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("alula::rotary_")
def _(q, k, positions, table, is_interleaved):
    same_device(q=q, k=k, positions=positions, table=table)
