"""The meaning of every op, in plain PyTorch: the specification that the kernels are tested against.

The functions take the arguments of `alula.ops` by the same names, with plain weights [N, K] in place of packed ones.
They compute in `compute_dtype` (float64 unless told) and return it. `same_dtype(op, ...)` gives what PyTorch makes of
the same formula in the dtype of the inputs; its distance from the float64 result is the error a kernel is measured by.

B batch, T query tokens, S cache slots, H query heads, G key/value heads, D head size, E model width, N out, K in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alula.activations import FORMULAS

if TYPE_CHECKING:
    from alula.block_plan import BlockPlan
    from alula.ops import RowState

ACTIVATIONS = FORMULAS


def embedding(
    input_ids: Tensor,
    table: Tensor,
    *,
    position_ids: Tensor | None = None,
    position_table: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_table: Tensor | None = None,
    scale: float = 1.0,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """scale * table[input_ids] (+ position_table[position_ids]) (+ types[token_type_ids]).

    input_ids, token_type_ids: [B, T] int64; position_ids: [B, T] or [1, T] int64; table: [V, E];
    position_table: [P, E]; types: token_type_table [Y, E], or table where there is none. Returns [B, T, E].
    """
    y = scale * table.to(compute_dtype)[input_ids]
    if position_table is not None:
        y = y + position_table.to(compute_dtype)[position_ids]
    if token_type_ids is not None:
        types = table if token_type_table is None else token_type_table
        y = y + types.to(compute_dtype)[token_type_ids]
    return y


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """(z - mean(z)) / sqrt(var(z) + eps) * weight + bias over the last dimension, z = x + residual.

    x, residual: [..., E]; weight, bias: [E]. Returns [..., E].
    """
    z = x.to(compute_dtype)
    if residual is not None:
        z = z + residual.to(compute_dtype)
    return F.layer_norm(z, z.shape[-1:], weight.to(compute_dtype), _to(bias, compute_dtype), eps)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """activation(LN(x) @ weight.T + bias) + residual; the layer norm is there when `norm_weight` is given.

    x: [..., K]; weight: [N, K]; bias: [N]; norm_weight, norm_bias: [K]; residual: [..., N]. Returns [..., N].
    """
    x = x.to(compute_dtype)
    if norm_weight is not None:
        x = layer_norm(x, norm_weight, norm_bias, norm_eps, compute_dtype=compute_dtype)
    y = ACTIVATIONS[activation](F.linear(x, weight.to(compute_dtype), _to(bias, compute_dtype)))
    return y if residual is None else y + residual.to(compute_dtype)


def qkv_projection(
    x: Tensor,
    weight: Tensor,
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
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[q | k | v] = LN(x) @ weight.T + bias; kv_cache[b, g, positions[b, t]] = [k | v] of token t; returns q.

    x: [B, T, E]; weight: [(H + 2G) * D, E], rows [q (H*D) | k (G*D) | v (G*D)]; kv_cache: [B, G, S, 2*D], written in
    place and rounded to its own dtype; positions: [B, T] int32, a token whose position is negative is written nowhere.
    With `rotary_table`, q and k are turned first (interleaved pairs). With `mlp` [B, T, F], written in place, the
    weight has F more rows, and mlp = mlp_activation(their part of the product). Returns q: [B, T, H, D].
    """
    batch, tokens, _ = x.shape
    y = linear(
        x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, compute_dtype=compute_dtype
    )
    qkv_features = (num_heads + 2 * num_kv_heads) * head_dim
    heads = y[..., :qkv_features].view(batch, tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    if rotary_table is not None:
        q, k = rotary(q, k, rotary_positions, rotary_table, compute_dtype=compute_dtype)
    if mlp is not None:
        mlp.copy_(ACTIVATIONS[mlp_activation](y[..., qkv_features:]))
    for b, t in itertools.product(range(batch), range(tokens)):
        slot = int(positions[b, t])
        if slot >= 0:
            kv_cache[b, :, slot] = torch.cat([k[b, t], v[b, t]], dim=-1).to(kv_cache.dtype)
    return q


def rotary(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    interleaved: bool = True,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Each pair (a, b) of the first r values of a head becomes (a cos - b sin, b cos + a sin); the others stay.

    q: [B, T, H, D]; k: [B, T, G, D]; positions: [B, T] int32; table: [P, r], a row has the r/2 cosines, then the r/2
    sines of its position. Pairs are (0, 1), (2, 3), ... or, not interleaved, (0, r/2), (1, r/2 + 1), ...
    """
    angles = table.to(torch.promote_types(compute_dtype, torch.float32))[positions.long()][:, :, None]  # [B, T, 1, r]
    cosine, sine = angles.chunk(2, dim=-1)

    def turn(x: Tensor) -> Tensor:
        first, rest = x.to(compute_dtype).tensor_split([table.shape[1]], dim=-1)
        a, b = (first[..., 0::2], first[..., 1::2]) if interleaved else first.chunk(2, dim=-1)
        pair = (a * cosine - b * sine, b * cosine + a * sine)
        turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned.to(compute_dtype), rest], dim=-1)

    return turn(q), turn(k)


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
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """softmax(scale * q @ k.T + mask) @ v over the visible keys; query head h reads key/value head h // (H/G).

    q: [B, T, H, D]; kv_cache: [B, G, S, 2*D], a slot's key in [..., :D] and its value in [..., D:]; positions: [B, T]
    int32; lengths: [B] int32. Query t of row b sees key j if j < lengths[b], and (when causal) j <= positions[b, t],
    and the mask lets it. mask: bool (True = visible) or additive float, [B|1, H|1, T, S'] with S' >= max(lengths);
    head_mask: [H], multiplies the probabilities of a head; scale: D**-0.5 when None.
    A query that sees nothing, or whose position is negative, gives zeros. A slot that no query of its row sees has no
    influence, whatever it holds. Returns [B, T, H*D].
    """
    batch, tokens, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    group = num_heads // kv_cache.shape[1]
    out = torch.zeros(batch, tokens, num_heads, head_dim, dtype=compute_dtype)
    for b in range(batch):
        n = int(lengths[b])
        if n == 0 or tokens == 0:
            continue
        key, value = kv_cache[b, :, :n].to(compute_dtype).repeat_interleave(group, dim=0).split(head_dim, dim=-1)
        visible = (positions[b] >= 0)[:, None].expand(tokens, n)
        if causal:
            visible = visible & (torch.arange(n) <= positions[b][:, None])
        mask_b = None if mask is None else mask.expand(batch, -1, -1, -1)[b, :, :, :n]
        unseen = ~visible.any(dim=0)
        key, value = (tensor.masked_fill(unseen[:, None], 0.0) for tensor in (key, value))
        scores = q[b].to(compute_dtype).transpose(0, 1) @ key.transpose(-1, -2)  # [H, T, n]
        p = _softmax(scores, mask_b, scale, visible).to(compute_dtype)
        if head_mask is not None:
            p = p * head_mask.to(compute_dtype)[:, None, None]
        out[b] = (p @ value).transpose(0, 1)
    return out.flatten(2)


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
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attention in which key j enters the softmax of query i as often as the plan counts their blocks.

    q: [B, T, H, D]; k, v: [B, G, S, D], S >= T; plan: one for all rows of the batch, or one for each. Row b's blocks
    start at column first[b] (0 when None) and its tokens are the lengths[b] columns from there (all when None) that
    mask [B, T] (bool) has True for, as queries and as keys. head_mask: [H]; scale: D**-0.5 when None.
    Other queries, and queries that see nothing, give zeros; what other keys hold has no influence. [B, T, H*D].
    """
    batch, tokens, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    group = num_heads // k.shape[1]
    out = torch.zeros(batch, tokens, num_heads, head_dim, dtype=compute_dtype)
    for b in range(batch):
        begin = 0 if first is None else int(first[b])
        count = tokens - begin if lengths is None else int(lengths[b])
        here = slice(begin, begin + count)
        is_token = torch.ones(count, dtype=torch.bool) if mask is None else mask[b, here]
        counts = torch.from_numpy((plan[b] if isinstance(plan, Sequence) else plan).to_dense())[:, :count, :count]
        visible = (counts > 0) & is_token & is_token[:, None]
        key, value = (
            tensor[b, :, here].to(compute_dtype).masked_fill(~is_token[:, None], 0.0).repeat_interleave(group, dim=0)
            for tensor in (k, v)
        )
        query = q[b, here].to(compute_dtype).transpose(0, 1).masked_fill(~is_token[:, None], 0.0)
        times = counts.clamp(min=1).to(torch.promote_types(compute_dtype, torch.float32)).log()
        p = _softmax(query @ key.transpose(-1, -2), times, scale, visible)
        if head_mask is not None:
            p = p * head_mask.to(compute_dtype)[:, None, None]
        out[b, here] = (p.to(compute_dtype) @ value).transpose(0, 1)
    return out.flatten(2)


def scaled_masked_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    causal: bool = False,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """softmax(scale * scores + mask) over the last dimension; a row in which nothing is visible gives zeros.

    scores: [..., T, S]; mask: bool (True = visible) or additive float, broadcastable to scores; causal: query t sees
    key j if j <= t + (S - T). Returns [..., T, S] in `dtype`, or in `compute_dtype` when None.
    """
    tokens, keys = scores.shape[-2:]
    visible = torch.ones(tokens, keys, dtype=torch.bool)
    if causal:
        visible = visible.tril(keys - tokens)
    return _softmax(scores.to(compute_dtype), mask, scale, visible).to(dtype or compute_dtype)


def choose_token(
    scores: Tensor,
    state: RowState,
    pad_id: Tensor,
    eos_ids: Tensor | None = None,
    *,
    drawn: Tensor | None = None,
    advances: bool = True,
) -> RowState:
    """The state after a token was chosen for each running row, as :func:`alula.ops.choose_token` leaves it."""
    was_running = state.running
    wrong = scores.isnan()
    order = torch.where(wrong.any(1, keepdim=True), wrong.double(), scores.double())
    first = (order == order.max(1, keepdim=True).values).to(torch.uint8).argmax(1)
    largest = scores.float().gather(1, first.unsqueeze(1)).squeeze(1)
    token = first if drawn is None else drawn
    chosen = torch.where(was_running, token, pad_id)
    out, report = state.out.clone(), state.report.clone()
    out[:, int(state.step)] = chosen
    report[0] = chosen
    report[1] = torch.where(was_running & ~largest.isfinite(), largest, report[1])
    runs = was_running
    if eos_ids is not None:
        runs = runs & (chosen.unsqueeze(1) != eos_ids).all(1)
    lengths = state.lengths + (was_running if advances else False)
    return state._replace(
        tokens=(token * was_running).unsqueeze(1),
        running=runs,
        out=out,
        step=state.step + 1,
        report=report,
        lengths=lengths,
        positions=state.positions + (was_running.unsqueeze(1) if advances else False),
        slots=torch.where(runs, lengths, -1).unsqueeze(1),
        seen=lengths + runs.int(),
    )


def same_dtype(op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`op` (a function of this module) as PyTorch computes it in the dtype of its first floating-point tensor."""
    dtype = next(a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point())
    return op(*args, **kwargs, compute_dtype=dtype)


def _softmax(scores: Tensor, mask: Tensor | None, scale: float, visible: Tensor) -> Tensor:
    """softmax(scale * scores + mask) over the visible keys, in float32 at least; all -inf or nothing visible: zeros."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    scores = scores.masked_fill(~visible, -torch.inf)
    nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.softmax(dim=-1).masked_fill(nothing, 0.0)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
