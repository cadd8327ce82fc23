"""How a stack of decoder blocks runs over flat lists of tensors, and the tensors it takes: one op call for the whole
stack, or, where something happens between two ops of a block, the loops that call them one by one.

Two kinds of blocks: sequential ones (GPTBigCode, GPT-2: five calls a layer) and parallel ones (CodeGen: three).

Alphabet: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head size, E model width, F MLP
width, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from alula import ops
from alula.models.layers import LayerNorm, Linear, merge_columns, merge_rows
from alula.ops import PackedWeight

__all__ = [
    "BlockShape",
    "BlockStack",
    "BlockWeights",
    "ParallelBlockWeights",
    "attention_probabilities",
    "bind",
    "bind_parallel_block",
    "product",
    "run_blocks",
    "run_parallel_blocks",
]

# Bound once: attribute look-ups on torch.ops cost more than the calls' own overhead.
embedding_op = torch.ops.alula.embedding.default
linear_op = torch.ops.alula.linear.default
qkv_op = torch.ops.alula.qkv_projection.default
attention_op = torch.ops.alula.attention.default
attention_into_op = torch.ops.alula.attention_into.default


T = TypeVar("T", "BlockWeights", "ParallelBlockWeights")


class BlockShape(NamedTuple):
    """What all blocks of a stack have in common, and what their scores are multiplied with."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    mlp_width: int
    scales: tuple[float, ...]  # a block
    norm_eps: float
    activation: int


class BlockWeights(NamedTuple):
    """The tensors of one pre-layer-norm block, in the order :func:`run_blocks` takes them."""

    norm1_weight: Tensor  # [E]
    norm1_bias: Tensor
    qkv_weight: PackedWeight  # [(H + 2 G) D, E]
    qkv_bias: Tensor
    out_weight: PackedWeight  # [E, H D]
    out_bias: Tensor
    norm2_weight: Tensor  # [E]
    norm2_bias: Tensor
    fc_weight: PackedWeight  # [F, E]
    fc_bias: Tensor
    proj_weight: PackedWeight  # [E, F]
    proj_bias: Tensor


class ParallelBlockWeights(NamedTuple):
    """The tensors of one parallel block, in the order :func:`run_parallel_blocks` takes them."""

    norm_weight: Tensor  # [E]
    norm_bias: Tensor
    in_weight: PackedWeight  # [3 E + F, E]: q, k, v, MLP in
    in_bias: Tensor
    out_weight: PackedWeight  # [E, E + F]: attention output beside MLP out
    out_bias: Tensor


class BlockStack(Sequence[T]):
    """The tensors of all blocks, and one call that runs them (:class:`alula.ops.DecoderBlocks`)."""

    __slots__ = ("_blocks", "_shape", "run")

    def __init__(self, blocks: Sequence[T], shape: BlockShape) -> None:
        self._blocks = list(blocks)
        self._shape = shape
        if self._blocks[0][0].is_cuda:  # where the ops run one by one
            self.run = None
            return
        self.run = ops.DecoderBlocks(
            [tensor for block in self._blocks for tensor in block],
            is_parallel=isinstance(self._blocks[0], ParallelBlockWeights),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            mlp_width=shape.mlp_width,
            scales=shape.scales,
            norm_eps=shape.norm_eps,
            activation=next(name for name, code in ops.ACTIVATIONS.items() if code == shape.activation),
        )

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        return self._blocks[index]

    def __iter__(self) -> Iterator[T]:
        return iter(self._blocks)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockStack, (self._blocks, self._shape)  # a copy binds its own tensors


def product(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    activation: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`alula.ops.linear` without its checks in Python; ``activation`` is a value of ``ACTIVATIONS``."""
    return linear_op(
        x,
        weight.data,
        weight.out_features,
        bias,
        norm_weight,
        norm_bias,
        norm_eps,
        activation,
        residual,
        weight.code,
    )


def bind(*modules: LayerNorm | Linear) -> list[Tensor | PackedWeight]:
    """The stored weight and bias of each module in turn."""
    return [module.stored(name) for module in modules for name in ("weight", "bias")]


def bind_parallel_block(
    norm: LayerNorm, qkv: Linear, fc_in: Linear, out: Linear, fc_out: Linear
) -> ParallelBlockWeights:
    """The tensors of a block whose attention and MLP read one normed input and add into one residual.

    Its four matrices become two, each in place of its parts. ``qkv`` and ``out`` may lack a bias.
    """
    merged_in, merged_out = merge_rows(qkv, fc_in), merge_columns(out, fc_out)
    in_bias = torch.cat([_bias(qkv), _bias(fc_in)])
    return ParallelBlockWeights(*bind(norm), merged_in, in_bias, merged_out, _bias(out) + _bias(fc_out))


def _bias(layer: Linear) -> Tensor:
    bias = layer.stored_bias()
    return torch.zeros(layer.out_features, dtype=layer.dtype, device=layer.device) if bias is None else bias


# Called in every block with (layer index, block input [B, T, E], query [B, T, H, D]).
BlockObserver = Callable[[int, Tensor, Tensor], None]


def run_blocks(
    blocks: BlockStack[BlockWeights],
    shape: BlockShape,
    x: Tensor,
    kv_layers: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    padding_positions: Tensor | None = None,
    mask: Tensor | None = None,
    head_masks: Sequence[Tensor] | None = None,
    causal: bool = True,
    observe: BlockObserver | None = None,
    cross: Callable[[int, Tensor], Tensor] | None = None,
    tokens_to_keep: int = 0,
) -> Tensor:
    """Runs pre-layer-norm blocks: QKV (normed), attention, output (+ residual), MLP in (normed, activated), MLP out
    (+ residual). One op call for all, or on CUDA and with padding after tokens, ``observe`` or ``cross``, five calls
    a block.

    Args:
        x: [B, T, E]. kv_layers: per block [B, G, S, 2*D], written. positions, lengths: int32 [B, T], [B].
        padding_positions: int32 [B, T], the last slot that each padding query sees, negative for tokens. These queries
            have a call of their own, so that tokens give the same bits whatever padding follows them.
        mask: as :func:`alula.ops.attention` takes it. head_masks: per block float32 [H].
        observe: called in every block with its index, its input and its query [B, T, H, D], once keys are written.
        cross: called between attention and MLP with the block's index and [B, T, E]; gives back the sum of that and of
            its own attention.
        tokens_to_keep: n > 0 where only the outputs of the last n tokens are wanted, 0 for all; 0 with ``cross``, whose
            queries are all tokens.

    Returns: [B, T, E] or [B, n, E], not normed.
    """
    if not x.is_cuda and padding_positions is None and observe is None and cross is None:
        return blocks.run(
            x,
            kv_layers,
            positions,
            lengths,
            mask=mask,
            head_masks=head_masks or (),
            causal=causal,
            tokens_to_keep=tokens_to_keep,
        )
    heads, kv_heads, head_dim, _, _, scales, eps, activation = shape
    for layer, (n1w, n1b, qkv_w, qkv_b, out_w, out_b, n2w, n2b, fc_w, fc_b, proj_w, proj_b) in enumerate(blocks):
        kv = kv_layers[layer]
        q = qkv_op(
            x,
            qkv_w.data,
            qkv_b,
            n1w,
            n1b,
            eps,
            heads,
            kv_heads,
            head_dim,
            kv,
            positions,
            format=qkv_w.code,
        )
        if observe is not None:
            observe(layer, x, q)
        count = tokens_to_keep if layer == len(blocks) - 1 else 0
        x, q, positions, padding_positions, mask = keep_last(count, x, q, positions, padding_positions, mask)
        head_mask = None if head_masks is None else head_masks[layer]
        y = attention_op(q, kv, positions, lengths, mask, head_mask, scales[layer], causal)
        if padding_positions is not None:
            y += attention_op(q, kv, padding_positions, lengths, mask, head_mask, scales[layer], causal)
        x = product(y, out_w, out_b, residual=x)
        if cross is not None:
            x = cross(layer, x)
        y = product(x, fc_w, fc_b, n2w, n2b, eps, activation)
        x = product(y, proj_w, proj_b, residual=x)
    return x


def run_parallel_blocks(
    blocks: BlockStack[ParallelBlockWeights],
    shape: BlockShape,
    x: Tensor,
    kv_layers: Sequence[Tensor],
    positions: Tensor,
    lengths: Tensor,
    padding_positions: Tensor | None,
    mask: Tensor | None,
    head_masks: Sequence[Tensor] | None,
    causal: bool,
    observe: BlockObserver | None,
    rotary_table: Tensor,
    rotary_positions: Tensor,
    tokens_to_keep: int = 0,
) -> Tensor:
    """Runs parallel blocks ``x + attention(norm(x)) + mlp(norm(x))``: QKV and MLP in as one product (normed, turned,
    activated), attention, attention output and MLP out as one product (+ residual). One op call for all, or on
    CUDA and with padding after tokens or ``observe``, three calls a block.

    Attention and MLP in write side by side into one [B, T, E + F], which the last product reads.

    Args: as :func:`run_blocks`; rotary_table: float32 [P, rotary_dim]; rotary_positions: int32 [B, T], its rows.
    """
    if not x.is_cuda and padding_positions is None and observe is None:
        return blocks.run(
            x,
            kv_layers,
            positions,
            lengths,
            mask=mask,
            head_masks=head_masks or (),
            causal=causal,
            rotary_table=rotary_table,
            rotary_positions=rotary_positions,
            tokens_to_keep=tokens_to_keep,
        )
    heads, kv_heads, head_dim, width, mlp_width, scales, eps, activation = shape
    inner = x.new_empty(x.shape[0], x.shape[1], width + mlp_width)
    attended, mlp = inner[..., :width], inner[..., width:]
    for layer, (nw, nb, in_w, in_b, out_w, out_b) in enumerate(blocks):
        kv = kv_layers[layer]
        q = qkv_op(
            x,
            in_w.data,
            in_b,
            nw,
            nb,
            eps,
            heads,
            kv_heads,
            head_dim,
            kv,
            positions,
            rotary_table,
            rotary_positions,
            mlp,
            activation,
            in_w.code,
        )
        if observe is not None:
            observe(layer, x, q)
        count = tokens_to_keep if layer == len(blocks) - 1 else 0
        x, q, positions, padding_positions, mask = keep_last(count, x, q, positions, padding_positions, mask)
        if count:
            inner = inner[:, -x.shape[1] :].contiguous()
            attended = inner[..., :width]
        head_mask = None if head_masks is None else head_masks[layer]
        attention_into_op(q, kv, positions, lengths, mask, head_mask, scales[layer], causal, attended)
        if padding_positions is not None:
            attended += attention_op(q, kv, padding_positions, lengths, mask, head_mask, scales[layer], causal)
        x = product(inner, out_w, out_b, residual=x)
    return x


def keep_last(
    count: int, x: Tensor, q: Tensor, positions: Tensor, padding_positions: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments for the last ``count`` queries, once all keys and values are stored; as given for 0 or too many."""
    if not 0 < count < x.shape[1]:
        return x, q, positions, padding_positions, mask
    return (
        x[:, -count:],
        q[:, -count:],
        positions[:, -count:],
        None if padding_positions is None else padding_positions[:, -count:],
        None if mask is None else mask[:, :, -count:],
    )


def attention_probabilities(
    q: Tensor,
    kv: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    real_columns: Tensor | None = None,
) -> Tensor:
    """The probabilities :func:`alula.ops.attention` uses and does not keep, [B, H, T, columns], in q's dtype.

    ``real_columns`` (bool [B, columns]) spreads the slots of a padded cache over the
    columns of the batch; padding columns get zeros.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads, longest = kv.shape[1], max(1, int(lengths.max()))
    keys = kv[:, :, :longest, :head_dim].float()
    grouped = q.float().unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)  # [B, G, H/G, T, D]
    scores = torch.matmul(grouped, keys.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale  # [B, H, T, S]
    slots = torch.arange(longest, device=q.device)
    visible = (slots < lengths.view(-1, 1, 1)) & (positions >= 0).unsqueeze(2)
    if causal:
        visible = visible & (slots <= positions.unsqueeze(2))
    visible = visible.unsqueeze(1)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask[..., :longest]
    elif mask is not None:
        scores = scores + mask[..., :longest].float()
    probabilities = ops.scaled_masked_softmax(scores, visible)
    if head_mask is not None:
        probabilities = probabilities * head_mask.view(-1, 1, 1)
    if real_columns is not None:
        slot_of = (real_columns.cumsum(1) - 1).clamp_(min=0).view(batch, 1, 1, -1)
        probabilities = probabilities.gather(3, slot_of.expand(-1, heads, tokens, -1))
        probabilities = probabilities * real_columns.view(batch, 1, 1, -1)
    return probabilities.to(q.dtype)
