"""What decoder families share: checking inputs, positions, masks, the cache, and one pass through the blocks.

Alphabet: B batch, T new tokens, S columns (past and new), H query heads, D head size, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.config import PretrainedConfig
from alula.devices import raise_id_fault
from alula.models.base import PreTrainedModel
from alula.models.blocks import BlockObserver, BlockShape, BlockStack, attention_probabilities, embedding_op, run_blocks
from alula.models.cross_attention import CrossAttention, make_cross_key_values
from alula.models.heads import normed_linear
from alula.models.inputs import InputChecks, out_of_range, require_tensors
from alula.models.layers import VERSION, Embedding, LayerNorm, PositionTable

__all__ = ["DecoderModel", "DecoderPreTrainedModel", "DecoderRun", "DecoderWithHead", "see_from_padding"]


_CROSS_PARTS = (".crossattention.", ".ln_cross_attn.")


class DecoderRun(NamedTuple):
    """One pass: the last block's output [B, T, E], not normed; the cache; what was asked to be collected."""

    hidden: Tensor
    cache: KVCache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    cross_attentions: tuple[Tensor, ...] | None


class _Bound:
    """The flat tensors of a model, and the count of weight changes at which they were taken."""

    __slots__ = ("blocks", "cross", "position_table", "stamp", "table", "vocab_size")

    def __init__(self) -> None:
        self.stamp = -1


def see_from_padding(positions: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
    """What each query sees where padding sees what the last token before it saw, as in transformers.

    positions: int32 [B, T] of the pass; before: int32 [B], tokens stored earlier. Returns the last slot of every query,
    and the same of padding alone (-1 for tokens), None if no padding follows a token.
    """
    visible = torch.maximum(positions, before.unsqueeze(1) - 1).cummax(1).values
    padding = visible.masked_fill(positions >= 0, -1)
    return visible, padding if bool((padding >= 0).any()) else None


class DecoderPreTrainedModel(PreTrainedModel):
    """What all classes of a decoder family share. ``residual_projections``: name endings of the matrices that add into
    the residual and start smaller."""

    residual_projections: ClassVar[tuple[str, ...]] = ()

    def optional_prefixes(self) -> tuple[str, ...]:
        """Those of the class, and cross-attention: decoders get theirs on top of a checkpoint that has none."""
        if not getattr(self.config, "add_cross_attention", False):
            return self.optional_weights
        cross = {
            name[: name.index(part)] + part for name in self.weight_slots() for part in _CROSS_PARTS if part in name
        }
        return (*self.optional_weights, *sorted(cross))

    @torch.no_grad()
    def init_weights(self, names: list[str] | None = None) -> None:
        """Normal values of ``initializer_range`` for matrices (over sqrt(2 L) for the residual projections), ones and
        zeros for layer norms, zeros for biases."""
        config = self.config
        slots = self.weight_slots()
        for name in slots if names is None else names:
            slot = slots[name]
            value = torch.zeros(slot.shape, dtype=slot.dtype)
            if isinstance(slot.module, LayerNorm):
                value += slot.name == "weight"
            elif slot.name == "weight":
                std = config.initializer_range
                is_residual = name.endswith(self.residual_projections)
                value.normal_(std=std / (2 * config.n_layer) ** 0.5 if is_residual else std)
            slot.write(value)

    def _wants(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)


class DecoderModel(InputChecks, DecoderPreTrainedModel):
    """A stack of blocks.

    Subclasses make ``wte``, ``wpe`` (where positions are learned), ``h`` (blocks with ``bind()``, and with
    ``bind_cross()`` where they have cross-attention) and ``ln_f``, and say :meth:`block_shape`.
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

    def _run_blocks(
        self,
        x: Tensor,
        cache: KVCache,
        positions: Tensor,
        lengths: Tensor,
        padding_positions: Tensor | None,
        mask: Tensor | None,
        head_masks: Sequence[Tensor] | None,
        causal: bool,
        observe: BlockObserver | None,
        cross: CrossAttention | None,
        position_ids: Tensor,
        tokens_to_keep: int = 0,
    ) -> Tensor:
        """All blocks, as :func:`alula.models.blocks.run_blocks`; position_ids: int64 [B or 1, T]."""
        return run_blocks(
            self._bound.blocks,
            self._shape,
            x,
            cache.layers,
            positions,
            lengths,
            padding_positions,
            mask,
            head_masks,
            causal,
            observe,
            cross,
            tokens_to_keep,
        )

    def _bind(self) -> _Bound:
        bound = self._bound
        count = VERSION.count  # before anything is read: another thread may change weights meanwhile
        if bound.stamp != count:
            bound.blocks = BlockStack([block.bind() for block in self.h], self._shape)
            bound.table = self.wte.stored("weight")
            bound.vocab_size = self.wte.num_embeddings
            learned = getattr(self, "wpe", None)
            bound.position_table = None if learned is None else learned.stored("weight")
            has_cross = getattr(self.config, "add_cross_attention", False)
            bound.cross = [block.bind_cross() for block in self.h] if has_cross else None
            bound.stamp = count
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
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        tokens_to_keep: int = 0,
    ) -> DecoderRun:
        """One pass through all blocks. Raises ValueError for inputs that do not fit, before the cache changes; should
        anything fail later, the cache is put back to where it was.

        ``tokens_to_keep``: n > 0 where the caller reads the last n tokens of ``hidden`` alone; it may then hold no more
        than these.
        """
        require_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            head_mask=head_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        self.check_inference(inputs_embeds, encoder_hidden_states)
        bound = self._bind()
        config, shape = self.config, self._shape
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            input_ids = self._check_ids("input_ids", input_ids)
            batch, tokens = input_ids.shape
        else:
            batch, tokens = self._check_embeds("inputs_embeds", inputs_embeds)

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
        has_encoder = encoder_hidden_states is not None or encoder_attention_mask is not None or cache.cross is not None
        if has_encoder:
            encoder_real, encoder_mask = self._check_encoder(
                cache, batch, tokens, encoder_hidden_states, encoder_attention_mask
            )

        raise_id_fault(self.device)  # of an earlier call
        try:
            if inputs_embeds is None:
                x = embedding_op(
                    input_ids,
                    bound.table.data,
                    bound.vocab_size,
                    shape.width,
                    position_ids if bound.position_table is not None else None,
                    bound.position_table,
                    token_type_ids,
                    format=bound.table.code,
                    dtype=bound.table.value_dtype,
                )
            else:
                x = self._add_embeddings(inputs_embeds, position_ids, token_type_ids)
        except RuntimeError as error:
            ids = ((input_ids, bound.vocab_size), (token_type_ids, bound.vocab_size), (position_ids, limit))
            if any(given is not None and out_of_range(given, count) for given, count in ids):
                raise ValueError(str(error)) from None
            raise

        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        attentions: list[Tensor] | None = [] if output_attentions else None
        cross_attentions: list[Tensor] | None = [] if output_attentions else None  # empty without an encoder, as there
        observe = cross = None
        before, kept_cross = cache.lengths, cache.cross
        positions, lengths = cache.prepare(tokens, padding)
        visible, padding_positions = positions, None
        if padding is not None and tokens > 1:  # alone, a padding token is the end of a row: nobody reads its output
            visible, padding_positions = see_from_padding(positions, before)
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
                            scale=shape.scales[layer],
                            causal=causal,
                            mask=mask,
                            head_mask=None if head_masks is None else head_masks[layer],
                            real_columns=cache.real_columns(),
                        )
                    )

        try:
            if has_encoder:
                if cache.cross is None:
                    cache.cross = make_cross_key_values(bound.cross, shape, encoder_hidden_states, encoder_real)
                cross = CrossAttention(
                    bound.cross,
                    shape,
                    cache.cross,
                    positions,
                    encoder_mask,
                    head_masks,
                    cross_attentions,
                    may_pad=padding is not None and tokens > 1,
                )
            x = self._run_blocks(
                x,
                cache,
                positions,
                lengths,
                padding_positions,
                mask,
                head_masks,
                causal,
                observe,
                cross,
                position_ids,
                0 if output_hidden_states or has_encoder else tokens_to_keep,
            )
        except BaseException as error:
            cache.crop(past)
            cache.cross = kept_cross
            if isinstance(error, RuntimeError) and out_of_range(position_ids, limit):
                raise self._position_error(position_ids) from None
            raise
        raise_id_fault(x.device)
        return DecoderRun(
            x,
            cache if keep else None,
            None if hidden_states is None else tuple(hidden_states),
            None if attentions is None else tuple(attentions),
            None if cross_attentions is None else tuple(cross_attentions),
        )

    def _position_error(self, position_ids: Tensor) -> ValueError:
        limit = self._positions.shape[1]
        wrong = position_ids[(position_ids < 0) | (position_ids >= limit)]
        return ValueError(f"position_ids holds {int(wrong[0])}; accepted: 0 to {limit - 1}")

    def _add_embeddings(self, embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """inputs_embeds with positions (and token types) added in float32 and rounded once."""
        if out_of_range(position_ids, self._positions.shape[1]):
            raise self._position_error(position_ids)
        table = self._bound.position_table
        if table is None and token_type_ids is None:
            return embeds
        x = embeds.float()
        if table is not None:
            x = x + table[position_ids].float()
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids).float()
        return x.to(self.dtype)


class DecoderWithHead(DecoderPreTrainedModel):
    """A head on a decoder of ``model_class``, named ``transformer``."""

    model_class: ClassVar[type[DecoderModel]]
    transformer: DecoderModel

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype | None) -> None:
        super().__init__(config)
        self.transformer = self.model_class(config, dtype=dtype, init_weights=False)

    @property
    def weights_stamp(self) -> int:
        """Changes when a weight does, of this model or of another."""
        return VERSION.count

    def decode_step(
        self, tokens: Tensor, position_ids: Tensor, slots: Tensor, lengths: Tensor, cache: KVCache
    ) -> Tensor:
        """One token a row, nothing asked of the device: for steps whose state lies there (cuda_graph.py).

        Args:
            tokens, position_ids: int64 [B, 1], in range. slots: int32 [B, 1], where a row's token is stored, -1 for
                nowhere. lengths: int32 [B], with it. cache: its tensors are written; its own lengths are not touched,
                nor are the encoder's keys and values that it may hold.

        Returns: logits [B, 1, V].
        """
        base = self.base_model
        bound = base._bind()
        x = embedding_op(
            tokens,
            bound.table.data,
            bound.vocab_size,
            base._shape.width,
            position_ids if bound.position_table is not None else None,
            bound.position_table,
            None,
            format=bound.table.code,
            dtype=bound.table.value_dtype,
        )
        cross = None
        if cache.cross is not None:
            cross = CrossAttention(bound.cross, base._shape, cache.cross, slots, None, None, None, may_pad=False)
        x = base._run_blocks(x, cache, slots, lengths, None, None, None, True, None, cross, position_ids)
        return normed_linear(x, base.final_norm(), self.lm_head)

    def _run(
        self,
        *inputs: Any,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        logits_to_keep: int | Tensor = 0,
    ) -> DecoderRun:
        """:meth:`DecoderModel.run` on the inputs up to use_cache, and encoder states after; hidden states complete.

        ``logits_to_keep``: what the caller selects of ``hidden``, which may hold no more than the last so many tokens.
        """
        run = self.transformer.run(
            *inputs[:8],
            self._wants("output_attentions", output_attentions),
            self._wants("output_hidden_states", output_hidden_states),
            *inputs[8:],
            tokens_to_keep=max(0, logits_to_keep) if isinstance(logits_to_keep, int) else 0,
        )
        if run.hidden_states is None:
            return run
        return run._replace(hidden_states=(*run.hidden_states, self.transformer.ln_f(run.hidden)))
