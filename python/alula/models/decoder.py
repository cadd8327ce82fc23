"""What decoder families share: checking inputs, positions, masks, the cache, and one pass through the blocks.

Alphabet: B batch, T new tokens, S columns (past and new), H query heads, D head size, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.config import PretrainedConfig
from alula.models.base import PreTrainedModel
from alula.models.layers import (
    VERSION,
    BlockShape,
    Embedding,
    LayerNorm,
    PositionTable,
    attention_probabilities,
    embedding_op,
    run_blocks,
)

__all__ = ["DecoderModel", "DecoderRun"]


class DecoderRun(NamedTuple):
    """One pass: the last block's output [B, T, E], not normed; the cache; what was asked to be collected."""

    hidden: Tensor
    cache: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class _Bound:
    """The flat tensors of a model, and the count of weight changes at which they were taken."""

    __slots__ = ("blocks", "position_table", "stamp", "table", "vocab_size")

    def __init__(self) -> None:
        self.stamp = -1


def _see_from_padding(positions: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
    """What each query sees where padding sees what the last token before it saw, as in transformers.

    positions: int32 [B, T] of the pass; before: int32 [B], tokens stored earlier. Returns the last slot of every query,
    and the same of padding alone (-1 for tokens), None if no padding follows a token.
    """
    visible = torch.maximum(positions, before.unsqueeze(1) - 1).cummax(1).values
    padding = visible.masked_fill(positions >= 0, -1)
    return visible, padding if bool((padding >= 0).any()) else None


def _out_of_range(ids: Tensor, count: int) -> bool:
    return int(ids.min()) < 0 or int(ids.max()) >= count


class DecoderModel(PreTrainedModel):
    """A stack of pre-layer-norm blocks with learned positions.

    Subclasses make ``wte``, ``wpe``, ``h`` (blocks with ``bind() -> BlockWeights``) and ``ln_f``, and say
    :meth:`block_shape`.
    """

    wte: Embedding
    wpe: PositionTable
    ln_f: LayerNorm

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self._shape = self.block_shape()
        self._bound = _Bound()
        self._positions = torch.arange(config.max_position_embeddings).unsqueeze(0)  # [1, P]

    def block_shape(self) -> BlockShape:
        """The sizes of the blocks, from the configuration."""
        raise TypeError(f"{type(self).__name__} does not say how large its blocks are")

    def _bind(self) -> _Bound:
        bound = self._bound
        if bound.stamp != VERSION.count:
            bound.blocks = [block.bind() for block in self.h]
            bound.table = self.wte.stored("weight").data
            bound.vocab_size = self.wte.num_embeddings
            bound.position_table = self.wpe.stored("weight")
            bound.stamp = VERSION.count
        return bound

    def final_norm(self) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and epsilon of the layer norm after the last block."""
        return self.ln_f.stored("weight"), self.ln_f.stored("bias"), self.ln_f.eps

    def run(
        self,
        input_ids: Tensor | None,
        past_key_values: KVCache | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        head_mask: Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> DecoderRun:
        """One pass through all blocks. Raises ValueError for inputs that do not fit, before the cache changes; should
        anything fail later, the cache is put back to where it was."""
        self.check_inference(inputs_embeds)
        bound = self._bind()
        config, shape = self.config, self._shape
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            input_ids = self._check_ids("input_ids", input_ids)
            batch, tokens = input_ids.shape
        else:
            batch, tokens = self._check_embeds(inputs_embeds)

        cache = past_key_values
        if cache is None:
            past = 0
            keep = config.use_cache if use_cache is None else use_cache
            cache = KVCache(config, batch, dtype=self.dtype, device=self.device, _shared_layer=not keep)
        else:
            keep = True
            past = self._check_cache(cache, batch)
        limit = self._positions.shape[1]
        if position_ids is None:
            if past + tokens > limit:
                raise ValueError(
                    f"{past} cached and {tokens} new tokens make {past + tokens}, more than n_positions={limit}"
                )
            position_ids = self._positions[:, past : past + tokens]
        else:
            position_ids = self._check_broadcast("position_ids", position_ids, batch, tokens)
        if token_type_ids is not None:
            token_type_ids = self._check_broadcast("token_type_ids", token_type_ids, batch, tokens).expand(
                batch, tokens
            )
        padding = mask = None
        if attention_mask is not None:
            self._check_device("attention_mask", attention_mask)
            if attention_mask.dim() == 2:
                padding = attention_mask
            else:
                mask = self._full_mask(attention_mask, batch, tokens, past + tokens, cache)
        head_masks = None if head_mask is None else self._head_masks(head_mask)
        causal = mask is None

        try:
            if inputs_embeds is None:
                x = embedding_op(
                    input_ids,
                    bound.table,
                    bound.vocab_size,
                    shape.width,
                    position_ids,
                    bound.position_table,
                    token_type_ids,
                )
            else:
                x = self._add_embeddings(inputs_embeds, position_ids, token_type_ids)
        except RuntimeError as error:
            ids = ((input_ids, bound.vocab_size), (token_type_ids, bound.vocab_size), (position_ids, limit))
            if any(given is not None and _out_of_range(given, count) for given, count in ids):
                raise ValueError(str(error)) from None
            raise

        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        attentions: list[Tensor] | None = [] if output_attentions else None
        observe = None
        before = cache.lengths
        positions, lengths = cache.prepare(tokens, padding)
        visible, padding_positions = positions, None
        if padding is not None and tokens > 1:  # alone, a padding token is the end of a row: nobody reads its output
            visible, padding_positions = _see_from_padding(positions, before)
        if output_hidden_states or output_attentions:

            def observe(layer: int, x: Tensor, q: Tensor) -> None:
                if hidden_states is not None:
                    hidden_states.append(x)
                if attentions is not None:
                    attentions.append(
                        attention_probabilities(
                            q,
                            cache.layers[layer],
                            visible,
                            lengths,
                            scale=shape.scale,
                            causal=causal,
                            mask=mask,
                            head_mask=None if head_masks is None else head_masks[layer],
                            real_columns=cache.real_columns(),
                        )
                    )

        try:
            x = run_blocks(
                bound.blocks,
                shape,
                x,
                cache.layers,
                positions,
                lengths,
                padding_positions,
                mask,
                head_masks,
                causal,
                observe,
            )
        except BaseException:
            cache.crop(past)
            raise
        return DecoderRun(
            x,
            cache if keep else None,
            None if hidden_states is None else tuple(hidden_states),
            None if attentions is None else tuple(attentions),
        )

    # --- checks ---------------------------------------------------------------------------------------------

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, the model on {self.device}")

    def _check_ids(self, name: str, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"{name} has shape {list(ids.shape)}; accepted: [batch, tokens], at least one of each")
        self._check_device(name, ids)
        if ids.dtype is torch.int64:
            return ids
        if ids.dtype is torch.int32:
            return ids.long()
        raise ValueError(f"{name} has dtype {ids.dtype}; accepted: int64, int32")

    def _check_embeds(self, embeds: Tensor) -> tuple[int, int]:
        if embeds.dim() != 3 or not embeds.numel() or embeds.shape[2] != self._shape.width:
            raise ValueError(
                f"inputs_embeds has shape {list(embeds.shape)}; accepted: [batch, tokens, {self._shape.width}]"
            )
        if embeds.dtype != self.dtype:
            raise ValueError(f"inputs_embeds has dtype {embeds.dtype}; accepted: the model's, {self.dtype}")
        self._check_device("inputs_embeds", embeds)
        return embeds.shape[0], embeds.shape[1]

    def _check_cache(self, cache: KVCache, batch: int) -> int:
        if not isinstance(cache, KVCache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}; accepted: alula.cache.KVCache or None")
        shape = self._shape
        have = (cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.dtype)
        need = (len(self._bound.blocks), shape.num_kv_heads, shape.head_dim, self.dtype)
        if have != need:
            raise ValueError(
                f"past_key_values is of another model: (layers, key/value heads, head size, dtype) = {have}; "
                f"accepted: {need}"
            )
        if cache.batch_size != batch:
            raise ValueError(f"past_key_values has a batch of {cache.batch_size}, the input one of {batch}")
        return cache.get_seq_length()

    def _check_broadcast(self, name: str, ids: Tensor, batch: int, tokens: int) -> Tensor:
        if ids.dim() == 1:
            ids = ids.unsqueeze(0)
        if ids.dim() != 2 or ids.shape[1] != tokens or ids.shape[0] not in (1, batch):
            raise ValueError(f"{name} has shape {list(ids.shape)}; accepted: [{batch}, {tokens}] or [1, {tokens}]")
        return self._check_ids(name, ids)

    def _full_mask(self, mask: Tensor, batch: int, tokens: int, columns: int, cache: KVCache) -> Tensor:
        """A mask [B, T, S] or [B or 1, H or 1, T, S] as the attention takes it. It stands alone: no causal limit is
        added to it, so that trees and prefixes can be expressed."""
        given = list(mask.shape)
        full = mask.unsqueeze(1) if mask.dim() == 3 else mask
        heads = self._shape.num_heads
        fits = full.dim() == 4 and full.shape[0] in (1, batch) and full.shape[1] in (1, heads)
        if not fits or list(full.shape[2:]) != [tokens, columns]:
            raise ValueError(
                f"attention_mask has shape {given}; accepted: [{batch}, {tokens}] or [{batch}, {columns}] (1 = token, "
                f"0 = padding), [{batch}, {tokens}, {columns}], [{batch}|1, {heads}|1, {tokens}, {columns}]"
            )
        if full.dtype != torch.bool and not full.dtype.is_floating_point:
            raise ValueError(
                f"attention_mask of {mask.dim()} dimensions has dtype {mask.dtype}; accepted: bool (True = visible) or "
                "floating point (added to the scores)"
            )
        if cache.has_padding:
            raise ValueError("a 3-D or 4-D attention_mask cannot follow padding that past_key_values left out")
        return full.float() if full.dtype == torch.float64 else full

    def _head_masks(self, head_mask: Tensor) -> Sequence[Tensor]:
        layers, heads = len(self._bound.blocks), self._shape.num_heads
        if list(head_mask.shape) not in ([heads], [layers, heads]):
            raise ValueError(f"head_mask has shape {list(head_mask.shape)}; accepted: [{heads}] or [{layers}, {heads}]")
        self._check_device("head_mask", head_mask)
        head_mask = head_mask.to(torch.float32).contiguous()
        return [head_mask] * layers if head_mask.dim() == 1 else list(head_mask)

    def _add_embeddings(self, embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """inputs_embeds with positions (and token types) added in float32 and rounded once."""
        limit = self._positions.shape[1]
        if _out_of_range(position_ids, limit):
            wrong = position_ids[(position_ids < 0) | (position_ids >= limit)]
            raise ValueError(f"position_ids holds {int(wrong[0])}; accepted: 0 to {limit - 1}")
        x = embeds.float() + self._bound.position_table[position_ids].float()
        if token_type_ids is not None:
            x += self.wte(token_type_ids).float()
        return x.to(self.dtype)
