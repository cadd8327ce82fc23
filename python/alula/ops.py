"""The tensor ops of alula: one documented function per op.

Each function checks that no gradient is asked for and calls ``torch.ops.alula.<op>``, whose C++ side checks shapes,
dtypes and devices and runs the kernel. The meaning of every op, in readable PyTorch, stands in
:mod:`alula.testing.reference`.

Alphabet: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head size, E model width,
N output features, K input features, V vocabulary, P positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from alula import (
    _C,
    _library,  # noqa: F401  (loads the op library)
)
from alula.block_plan import BlockPlan, batch_plans
from alula.packed_weight import PackedWeight, pack, refuse_grad

__all__ = [
    "ACTIVATIONS",
    "DecoderBlocks",
    "PackedWeight",
    "attention",
    "block_sparse_attention",
    "block_sparse_probabilities",
    "embedding",
    "layer_norm",
    "linear",
    "pack",
    "qkv_projection",
    "rotary",
    "rotary_table",
    "scaled_masked_softmax",
]

# Hugging Face's activation names and the code the kernels know them by (csrc/cpu/activation.h).
# gelu_new, gelu_fast and gelu_pytorch_tanh are the same function up to rounding.
ACTIVATIONS: dict[str, int] = {
    "none": 0,
    "linear": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu_fast": 1,
    "gelu_tanh": 1,
    "gelu": 2,
    "gelu_python": 2,
    "relu": 3,
    "silu": 4,
    "swish": 4,
    "tanh": 5,
}


def _activation_code(activation: str) -> int:
    try:
        return ACTIVATIONS[activation]
    except KeyError:
        raise ValueError(f"unknown activation {activation!r}; accepted: {', '.join(ACTIVATIONS)}") from None


def _refuse_width(x: Tensor, weight: PackedWeight) -> None:
    """The kernels see a packed weight rounded up to whole pairs and panels; here its sizes are known exactly."""
    if x.dim() and x.size(-1) != weight.in_features:
        raise ValueError(f"x has {x.size(-1)} features (shape {list(x.shape)}); the weight takes {weight.in_features}")


def embedding(
    input_ids: Tensor,
    table: PackedWeight,
    *,
    position_ids: Tensor | None = None,
    position_table: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_table: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Sum of embeddings, added in float32 and rounded once.

    Args:
        input_ids: int64 [B, T], each in [0, V).
        table: packed [V, E]; may be the same object as the packed output matrix of a tied model.
        position_ids: int64 [B, T] or [1, T], each in [0, P); needs ``position_table`` [P, E] (not packed).
        token_type_ids: int64 [B, T]; rows of ``table`` added on top, as GPT-2 and GPTBigCode do, or rows of
            ``token_type_table`` [types, E] (not packed), as BigBird does.
        scale: multiplies the row of ``table`` that ``input_ids`` names.

    Returns: [B, T, E] in the table's dtype. Raises RuntimeError for an id out of range, naming it.
    """
    refuse_grad(table.data, position_table, token_type_table)
    return torch.ops.alula.embedding(
        input_ids,
        table.data,
        table.out_features,
        table.in_features,
        position_ids,
        position_table,
        token_type_ids,
        token_type_table,
        scale,
        table.code,
        table.value_dtype,
    )


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
    _refuse_width(x, weight)
    return torch.ops.alula.linear(
        x,
        weight.data,
        weight.out_features,
        bias,
        norm_weight,
        norm_bias,
        norm_eps,
        _activation_code(activation),
        residual,
        weight.code,
    )


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
    _refuse_width(x, weight)
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
        _activation_code(mlp_activation),
        weight.code,
    )


def rotary_table(num_positions: int, rotary_dim: int, base: float = 10000.0, *, device: str | None = None) -> Tensor:
    """Cosines, then sines, of the angles ``position * base ** (-2 i / rotary_dim)``.

    Returns: float32 [num_positions, rotary_dim].
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; it must be even and positive")
    inverse = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float() / rotary_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), inverse)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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


class DecoderBlocks:
    """A stack of decoder blocks that runs in one call: :func:`qkv_projection`, :func:`attention` and :func:`linear`
    strung together, with the same bits as these one by one, and without what each call costs.

    Sequential blocks (GPT-2, GPTBigCode): ``x += out(attention(qkv(norm1(x)))); x += proj(act(fc(norm2(x))))``.
    Parallel blocks (GPT-J, CodeGen): ``x += out([attention | act(mlp)])``, where ``[qkv | mlp]`` is one product of
    ``norm(x)``.

    The weights are checked once, here, and kept: change them in place or make a new object, and do not resize them.

    Args:
        weights: per sequential block norm1 weight and bias [E], QKV (packed [(H + 2 G) D, E]) and its bias, attention
            output (packed [E, H D]) and bias, norm2 weight and bias, MLP in (packed [F, E]) and bias, MLP out (packed
            [E, F]) and bias; per parallel block norm weight and bias, in (packed [(H + 2 G) D + F, E]) and bias, out
            (packed [E, H D + F]) and bias. One block after the other, all float32, bfloat16 or float16; packed
            ones may be quantized.
        scales: what each block's scores are multiplied with, usually ``head_dim ** -0.5``; as many as there are blocks.
        mlp_width: F. activation: a key of :data:`ACTIVATIONS`.

    Raises: RuntimeError for counts, shapes or dtypes that do not fit; ValueError for no weights, an unknown activation.
    """

    __slots__ = ("__weakref__", "_number")

    def __init__(
        self,
        weights: Sequence[Tensor | PackedWeight],
        *,
        is_parallel: bool = False,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mlp_width: int,
        scales: Sequence[float],
        norm_eps: float = 1e-5,
        activation: str = "gelu_new",
    ) -> None:
        tensors = [w.data if isinstance(w, PackedWeight) else w for w in weights]
        if not tensors:
            raise ValueError("weights is empty; a stack has one block or more")
        refuse_grad(*tensors)
        self._number: int = torch.ops.alula.bind_decoder_blocks(
            tensors,
            [w.code if isinstance(w, PackedWeight) else 0 for w in weights],
            is_parallel,
            num_heads,
            num_kv_heads,
            head_dim,
            mlp_width,
            list(scales),
            norm_eps,
            _activation_code(activation),
        )
        weakref.finalize(self, _C.release_decoder_blocks, self._number).atexit = False

    def __reduce__(self) -> NoReturn:
        raise TypeError("a DecoderBlocks holds no weights of its own to copy or pickle; copy the weights and bind them")

    def __call__(
        self,
        x: Tensor,
        kv_caches: Sequence[Tensor],
        positions: Tensor,
        lengths: Tensor,
        *,
        mask: Tensor | None = None,
        head_masks: Sequence[Tensor] = (),
        causal: bool = True,
        rotary_table: Tensor | None = None,
        rotary_positions: Tensor | None = None,
    ) -> Tensor:
        """The last block's output [B, T, E], not normed.

        Args:
            x: [B, T, E], of the weights' dtype; not changed.
            kv_caches: a block each, [B, G, S, 2 * D], written as :func:`qkv_projection` does.
            head_masks: none, or float32 [H] for each block.
            positions, lengths, mask, causal: as :func:`attention`. rotary_table, rotary_positions: as
                :func:`qkv_projection`.

        Raises: RuntimeError for shapes, dtypes, counts or indices that do not fit, before anything is written.
        """
        refuse_grad(x, *kv_caches, mask)
        return decoder_blocks_op(
            x,
            self._number,
            kv_caches,
            positions,
            lengths,
            mask,
            head_masks,
            causal,
            rotary_table,
            rotary_positions,
        )


decoder_blocks_op = torch.ops.alula.decoder_blocks.default


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
    Algorithm: BigBird (Zaheer et al. 2020) as online softmax over lists of blocks; extra memory does not grow with T.
    """
    refuse_grad(q, k, v, head_mask)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    lists = plan if isinstance(plan, BlockPlan) else batch_plans(plan, q, first, lengths)
    starts, entries, global_tokens = lists.tensors
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
    result = torch.zeros(batch, num_heads, tokens, tokens)
    for b in range(batch):
        begin = 0 if first is None else int(first[b])
        end = tokens if lengths is None else begin + int(lengths[b])
        row_plan = plan if isinstance(plan, BlockPlan) else plan[b]
        counts = torch.from_numpy(row_plan.to_dense())[:, : end - begin, : end - begin]
        if mask is not None:
            counts = counts * mask[b, begin:end] * mask[b, begin:end, None]
        keys = k[b, :, begin:end].float().repeat_interleave(num_heads // k.shape[1], dim=0)
        scores = q[b, begin:end].float().transpose(0, 1) @ keys.transpose(-1, -2) * scale
        scores = scores.masked_fill(counts == 0, -torch.inf)
        share = scores.sub_(scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)).exp_()
        total = (share * counts).sum(dim=-1, keepdim=True)
        result[b, :, begin:end, begin:end] = share / total.masked_fill(total == 0, 1.0)
    return result


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


# --- shapes and dtypes without data, for torch.compile, export and the meta device ---------------------------------


def _same_device(**tensors: Tensor | None) -> None:
    """A real tensor beside one on the meta device comes here, too, and must not get an uninitialized result."""
    given = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for name, device in given[1:]:
        if device != given[0][1]:
            raise RuntimeError(
                f"{name} is on device {device} and {given[0][0]} on device {given[0][1]}; "
                "all tensors of one call must be on the same device"
            )


@torch.library.register_fake("alula::embedding")
def _(
    input_ids,
    packed,
    num_embeddings,
    embedding_dim,
    position_ids,
    position_table,
    token_type_ids,
    token_type_table=None,
    scale=1.0,
    format=0,
    dtype=None,
):
    _same_device(
        input_ids=input_ids,
        packed=packed,
        position_ids=position_ids,
        position_table=position_table,
        token_type_ids=token_type_ids,
        token_type_table=token_type_table,
    )
    return packed.new_empty([*input_ids.shape, embedding_dim], dtype=dtype)


@torch.library.register_fake("alula::linear")
def _(x, weight, out_features, bias, norm_weight, norm_bias, norm_eps, activation, residual, format=0):
    _same_device(x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    return x.new_empty([*x.shape[:-1], out_features])


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
    _same_device(
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


@torch.library.register_fake("alula::rotary")
def _(q, k, positions, table, is_interleaved):
    _same_device(q=q, k=k, positions=positions, table=table)
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("alula::rotary_")
def _(q, k, positions, table, is_interleaved):
    _same_device(q=q, k=k, positions=positions, table=table)


@torch.library.register_fake("alula::attention")
def _(q, kv_cache, positions, lengths, mask, head_mask, scale, causal):
    _same_device(q=q, kv_cache=kv_cache, positions=positions, lengths=lengths, mask=mask, head_mask=head_mask)
    return q.new_empty([q.shape[0], q.shape[1], q.shape[2] * q.shape[3]])


@torch.library.register_fake("alula::attention_into")
def _(q, kv_cache, positions, lengths, mask, head_mask, scale, causal, out):
    _same_device(q=q, kv_cache=kv_cache, positions=positions, lengths=lengths, mask=mask, head_mask=head_mask, out=out)


@torch.library.register_fake("alula::block_sparse_attention")
def _(q, k, v, starts, entries, global_tokens, block_size, first, lengths, mask, head_mask, scale, causal):
    _same_device(
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
    )
    return q.new_empty([q.shape[0], q.shape[1], q.shape[2] * q.shape[3]])


@torch.library.register_fake("alula::decoder_blocks")
def _(x, blocks, kv_caches, positions, lengths, mask, head_masks, causal, rotary_table, rotary_positions):
    _same_device(
        x=x, kv_caches=kv_caches[0], positions=positions, lengths=lengths, mask=mask, rotary_table=rotary_table
    )
    return x.new_empty(x.shape)


@torch.library.register_fake("alula::scaled_masked_softmax")
def _(scores, mask, scale, causal, dtype):
    _same_device(scores=scores, mask=mask)
    return torch.empty(scores.shape, dtype=dtype or scores.dtype, device=scores.device)


@torch.library.register_fake("alula::layer_norm")
def _(x, weight, bias, eps, residual):
    _same_device(x=x, weight=weight, bias=bias, residual=residual)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
