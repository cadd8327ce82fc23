"""A whole stack of decoder blocks in one call."""

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
from alula.activations import activation_code
from alula.ops.arguments import same_device
from alula.packed_weight import PackedWeight, refuse_grad


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
            activation_code(activation),
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
        tokens_to_keep: int = 0,
    ) -> Tensor:
        """The last block's output [B, T, E], not normed.

        Args:
            x: [B, T, E], of the weights' dtype; not changed.
            kv_caches: a block each, [B, G, S, 2 * D], written as :func:`qkv_projection` does.
            head_masks: none, or float32 [H] for each block.
            positions, lengths, mask, causal: as :func:`attention`. rotary_table, rotary_positions: as
                :func:`qkv_projection`.
            tokens_to_keep: n > 0 for the output of the last n tokens only, [B, n, E], which costs less: of the others
                the last block stores keys and values and computes no more. Rows with much padding in front of their
                tokens then run one by one without it, to the same bits. 0, or n >= T: of all.

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
            tokens_to_keep,
        )


@torch.library.register_fake("alula::decoder_blocks")
def _(x, blocks, kv_caches, positions, lengths, mask, head_masks, causal, rotary_table, _turns, tokens_to_keep=0):
    same_device(x=x, kv_caches=kv_caches[0], positions=positions, lengths=lengths, mask=mask, rotary_table=rotary_table)
    batch, tokens, width = x.shape
    return x.new_empty(batch, min(tokens, tokens_to_keep) if tokens_to_keep else tokens, width)


# Resolved once, not at every step of decoding.
decoder_blocks_op = torch.ops.alula.decoder_blocks.default
