"""BigBird's blocks: layer norms after the residual sums. Their modules, their flat tensors, and the loop over a stack.

Alphabet: B batch, T query tokens, S key tokens, H heads, D head size, E model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alula.config import BigBirdConfig
from alula.models.blocks import BlockShape, product, qkv_op
from alula.models.cross_attention import CrossWeights
from alula.models.layers import Embedding, LayerNorm, Linear, Module, ModuleList, PositionTable, merge_rows
from alula.ops import PackedWeight

__all__ = ["Attend", "BigBirdEmbeddings", "BigBirdEncoder", "BigBirdLayer", "PostNormWeights", "run_post_norm_blocks"]

layer_norm_op = torch.ops.alula.layer_norm.default

# What an MLP may hold between its matrices, in bytes. Beyond LARGE the allocator gives memory back to the system each
# time and gets it anew, a page fault for every 4 KiB; the rows are then taken in parts of at most PART, which stay in
# the third-level cache.
LARGE, PART = 32 << 20, 8 << 20


class PostNormWeights(NamedTuple):
    """The tensors of one block, in the order :func:`run_post_norm_blocks` takes them."""

    qkv_weight: PackedWeight  # [3 E, E]: q, k, v
    qkv_bias: Tensor | None
    out_weight: PackedWeight  # [E, E]
    out_bias: Tensor
    norm1_weight: Tensor  # [E]
    norm1_bias: Tensor
    fc_weight: PackedWeight  # [F, E]
    fc_bias: Tensor
    proj_weight: PackedWeight  # [E, F]
    proj_bias: Tensor
    norm2_weight: Tensor  # [E]
    norm2_bias: Tensor
    cross_norm_weight: Tensor | None  # [E], after cross-attention
    cross_norm_bias: Tensor | None


class BigBirdSelfAttention(Module):
    """``query``, ``key`` and ``value`` as the checkpoint has them; kept as one matrix with rows [q | k | v]."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.query = Linear(width, width, dtype, bias=config.use_bias)
        self.key = Linear(width, width, dtype, bias=config.use_bias)
        self.value = Linear(width, width, dtype, bias=config.use_bias)


class BigBirdOutput(Module):
    """``LayerNorm(dense(x) + residual)``."""

    def __init__(self, in_features: int, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size, dtype)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def bind(self) -> tuple[PackedWeight, Tensor | None, Tensor, Tensor]:
        """Weight and bias of both."""
        norm = self.LayerNorm
        return *stored(self.dense), norm.stored("weight"), norm.stored("bias")


class BigBirdIntermediate(Module):
    """The first matrix of an MLP; what it gives is activated."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size, dtype)


class BigBirdAttention(Module):
    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.self = BigBirdSelfAttention(config, dtype)
        self.output = BigBirdOutput(config.hidden_size, config, dtype)


class BigBirdLayer(Module):
    """``x = LayerNorm(x + attention(x))``, with an encoder ``x = LayerNorm(x + crossattention(x))``, then
    ``LayerNorm(x + mlp(x))``; :func:`run_post_norm_blocks` runs it."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = BigBirdAttention(config, dtype)
        if config.add_cross_attention:
            self.crossattention = BigBirdAttention(config, dtype)
        self.intermediate = BigBirdIntermediate(config, dtype)
        self.output = BigBirdOutput(config.intermediate_size, config, dtype)

    def merged_layers(self) -> list[tuple[int, tuple[Linear, ...]]]:
        """Matrices that are stored as one, below each other (0)."""
        own = self.attention.self
        groups = [(0, (own.query, own.key, own.value))]
        if hasattr(self, "crossattention"):
            groups.append((0, (self.crossattention.self.key, self.crossattention.self.value)))
        return groups

    def bind(self) -> PostNormWeights:
        own = self.attention.self
        cross = getattr(self, "crossattention", None)
        return PostNormWeights(
            merge_rows(own.query, own.key, own.value),
            joined_bias(own.query, own.key, own.value),
            *self.attention.output.bind(),
            *stored(self.intermediate.dense),
            *self.output.bind(),
            *((None, None) if cross is None else cross.output.bind()[2:]),
        )

    def bind_cross(self) -> CrossWeights:
        """Without a layer norm before: it comes after the residual sum."""
        own, output = self.crossattention.self, self.crossattention.output
        return CrossWeights(
            None,
            None,
            *stored(own.query),
            merge_rows(own.key, own.value),
            joined_bias(own.key, own.value),
            *stored(output.dense),
        )


class BigBirdEmbeddings(Module):
    """``LayerNorm(words + positions + token types)``."""

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, width, dtype)
        self.position_embeddings = PositionTable(config.max_position_embeddings, width, dtype)
        self.token_type_embeddings = PositionTable(config.type_vocab_size, width, dtype)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps, dtype)


class BigBirdEncoder(Module):
    def __init__(self, config: BigBirdConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = ModuleList([BigBirdLayer(config, dtype) for _ in range(config.num_hidden_layers)])


def stored(layer: Linear) -> tuple[PackedWeight, Tensor | None]:
    """The packed weight and the bias of a matrix that is part of no other."""
    return layer.stored("weight"), layer.stored_bias()


def joined_bias(*layers: Linear) -> Tensor | None:
    """The biases of layers whose rows are merged, one after another; None where they have none."""
    biases = [layer.stored_bias() for layer in layers]
    return None if biases[0] is None else torch.cat(biases)


class Attend(Protocol):
    """The attention of one pass, called in every block."""

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [B, T, H, D], kv [B, H, S, 2*D] -> [B, T, H*D]."""

    def probabilities(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """What the call weighs the values with, [B, H, T, S]."""


def mlp_rows(rows: int, row_bytes: int) -> int:
    """How many of ``rows`` an MLP takes at once; ``row_bytes``: of a row between its matrices."""
    total = rows * row_bytes
    return rows if total <= LARGE else -(-rows // -(-total // PART))


def run_post_norm_blocks(
    blocks: Sequence[PostNormWeights],
    shape: BlockShape,
    x: Tensor,
    kv_layers: Sequence[Tensor],
    positions: Tensor,
    attend: Attend,
    cross: Callable[[int, Tensor], Tensor] | None = None,
    hidden_states: list[Tensor] | None = None,
    attentions: list[Tensor] | None = None,
) -> Tensor:
    """Runs a stack of blocks, seven calls each: QKV, attention, output (+ residual), layer norm, MLP in (activated),
    MLP out (+ residual), layer norm; the last three a part of the rows at a time where those are many.

    Args:
        x: [B, T, E]. kv_layers: per block [B, H, S, 2*D], written at positions (int32 [B, T], negative: not written).
        attend: the attention. cross: called after the first layer norm with the block's index and [B, T, E]; gives
            back the sum of that and of its own attention, which has a layer norm of its own.
        hidden_states, attentions: lists to collect every block's output and probabilities in.

    Returns: [B, T, E].
    """
    heads, _, head_dim, width, mlp_width, _, eps, activation = shape
    step = mlp_rows(x.numel() // width, mlp_width * x.element_size())
    for layer, block in enumerate(blocks):
        qkv_w, qkv_b, out_w, out_b, n1w, n1b, fc_w, fc_b, proj_w, proj_b, n2w, n2b, ncw, ncb = block
        kv = kv_layers[layer]
        q = qkv_op(
            x,
            qkv_w.data,
            qkv_b,
            None,
            None,
            eps,
            heads,
            heads,
            head_dim,
            kv,
            positions,
            format=qkv_w.code,
        )
        if attentions is not None:
            attentions.append(attend.probabilities(layer, q, kv))
        y = product(attend(layer, q, kv), out_w, out_b, residual=x)
        x = layer_norm_op(y, n1w, n1b, eps, None)
        if cross is not None:
            x = layer_norm_op(cross(layer, x), ncw, ncb, eps, None)
        rows = x.view(-1, width)
        parts = []
        for part in rows.split(step):
            y = product(part, fc_w, fc_b, activation=activation)
            y = product(y, proj_w, proj_b, residual=part)
            parts.append(layer_norm_op(y, n2w, n2b, eps, None))
        x = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
        if hidden_states is not None:
            hidden_states.append(x)
    return x
