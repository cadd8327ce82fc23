"""Attention over the blocks of keys that a plan lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.block_plan import BlockPlan, batch_plans
from alula.memory import raises_torch_errors
from alula.ops.arguments import same_device
from alula.packed_weight import refuse_grad


@raises_torch_errors
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan | Sequence[BlockPlan],
    *,
    first: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention in which a block of queries sees the key blocks that a plan lists for it, as often as it counts them.

    Args:
        q: [B, T, H, D], D a multiple of 8 up to 256.
        k, v: [B, G, S, D], S >= T, G divides H; token t's key and value in slot t. Views of a merged cache do without
            a copy: ``k, v = kv_cache.split(D, dim=-1)``.
        plan: :class:`alula.BlockPlan` for T tokens, or a sequence of B plans, of which row b's fits its length.
        first: int32 [B], the column in which row b's blocks begin (left padding), default 0.
        lengths: int32 [B], how many columns from ``first`` hold tokens, default all.
        mask: bool [B, T], False = padding, on top of that; the blocks stay where they are.
        head_mask: float32 [H], multiplies the probabilities of each head.
        scale: multiplies the scores, default ``D ** -0.5``.

    Returns: [B, T, H*D]. Scores, softmax and sums are float32. Padding, and a query that sees no key, gives zeros.
    The plan's own tensors are made on the device of q at the first call there.
    Algorithm: BigBird (Zaheer et al. 2020) as online softmax over lists of blocks; extra memory does not grow with T.
    """
    refuse_grad(q, k, v, head_mask)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    lists = plan if isinstance(plan, BlockPlan) else batch_plans(plan, q, first, lengths)
    starts, entries, global_tokens, schedule, num_partials = lists.on(q.device)
    return torch.ops.alula.block_sparse_attention(
        q,
        k,
        v,
        starts,
        entries,
        global_tokens,
        lists.block_size,
        first,
        lengths,
        mask,
        head_mask,
        scale,
        lists.is_causal,
        schedule,
        num_partials,
    )


def block_sparse_probabilities(
    q: Tensor,
    k: Tensor,
    plan: BlockPlan | Sequence[BlockPlan],
    *,
    first: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The probabilities of :func:`block_sparse_attention` as a dense matrix, for people to look at: slow, T * T memory.

    The arguments are those of :func:`block_sparse_attention`. A key that counts c times has the probability of one of
    the c, as transformers' BigBird returns it: a row sums to 1 only where every count is 1. Padding has zeros.

    Returns: float32 [B, H, T, T].
    """
    refuse_grad(q, k)
    batch, tokens, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    result = torch.zeros(batch, num_heads, tokens, tokens, device=q.device)
    for b in range(batch):
        begin = 0 if first is None else int(first[b])
        end = tokens if lengths is None else begin + int(lengths[b])
        row_plan = plan if isinstance(plan, BlockPlan) else plan[b]
        counts = torch.from_numpy(row_plan.to_dense())[:, : end - begin, : end - begin].to(q.device)
        if mask is not None:
            counts = counts * mask[b, begin:end] * mask[b, begin:end, None]
        keys = k[b, :, begin:end].float().repeat_interleave(num_heads // k.shape[1], dim=0)
        scores = q[b, begin:end].float().transpose(0, 1) @ keys.transpose(-1, -2) * scale
        scores = scores.masked_fill(counts == 0, -torch.inf)
        share = scores.sub_(scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)).exp_()
        total = (share * counts).sum(dim=-1, keepdim=True)
        result[b, :, begin:end, begin:end] = share / total.masked_fill(total == 0, 1.0)
    return result


@torch.library.register_fake("alula::block_sparse_attention")
def _(
    q,
    k,
    v,
    starts,
    entries,
    global_tokens,
    block_size,
    first,
    lengths,
    mask,
    head_mask,
    scale,
    causal,
    schedule=None,
    num_partials=0,
):
    same_device(
        q=q,
        k=k,
        v=v,
        starts=starts,
        entries=entries,
        global_tokens=global_tokens,
        first=first,
        lengths=lengths,
        mask=mask,
        head_mask=head_mask,
        schedule=schedule,
    )
    return q.new_empty([q.shape[0], q.shape[1], q.shape[2] * q.shape[3]])
