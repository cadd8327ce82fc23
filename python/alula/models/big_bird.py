"""BigBird: the encoder (and decoder) without a head.

The arguments and outputs are Hugging Face's. ``past_key_values`` is a :class:`alula.cache.KVCache`.

Alphabet: B batch, T new tokens, S columns (past and new), H heads, D head size, E model width, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alula.block_plan import BlockPlan
from alula.cache import KVCache
from alula.config import BigBirdConfig
from alula.models.big_bird_attention import FullAttention, SparseAttention, default_plans
from alula.models.big_bird_base import BigBirdPreTrainedModel, BigBirdRun
from alula.models.big_bird_blocks import (
    Attend,
    BigBirdEmbeddings,
    BigBirdEncoder,
    layer_norm_op,
    run_post_norm_blocks,
)
from alula.models.blocks import BlockShape, embedding_op, product
from alula.models.cross_attention import CrossAttention, make_cross_key_values
from alula.models.decoder import see_from_padding
from alula.models.inputs import InputChecks, out_of_range, require_tensors
from alula.models.layers import VERSION, Linear
from alula.ops import ACTIVATIONS
from alula.outputs import BaseModelOutputWithPoolingAndCrossAttentions

__all__ = ["BigBirdModel", "BigBirdWithHead", "BlockPlans"]

BlockPlans = BlockPlan | Sequence[BlockPlan] | None  # one for all layers, one for each, or the model's own


class _Bound:
    """The flat tensors of a model, and the count of weight changes at which they were taken."""

    __slots__ = ("blocks", "cross", "norm", "pooler", "position_table", "stamp", "table", "type_table")

    def __init__(self) -> None:
        self.stamp = -1


def first_columns(real: Tensor, position_ids: Tensor) -> Tensor | None:
    """int64 [B], the column of each row's first token, where padding is on the left alone (``real``, bool [B, T]) and
    positions (int64 [B or 1, T]) count from there; None where not, and where no row is padded."""
    if bool(real[:, 0].all()):
        return None
    first = (~real).sum(1)
    places = torch.arange(real.shape[1], device=real.device) - first.unsqueeze(1)
    if not torch.equal(places >= 0, real) or bool(((position_ids != places) & real).any()):
        return None
    return first.clamp(max=real.shape[1] - 1)


class BigBirdModel(InputChecks, BigBirdPreTrainedModel):
    """The blocks without a head.

    Args:
        config: its sizes.
        add_pooling_layer: also a ``pooler`` over the first token.
        dtype: of the weights and activations, default float32.
        init_weights: False leaves the weights without values, to be loaded.

    Attributes:
        attention_type: "block_sparse" or "original_full". With ``config.sticky`` the first input too short for blocks
            changes it to "original_full".
    """

    def __init__(
        self,
        config: BigBirdConfig,
        add_pooling_layer: bool = True,
        *,
        dtype: torch.dtype | None = None,
        init_weights: bool = True,
    ) -> None:
        dtype = dtype or torch.float32
        super().__init__(config)
        self.embeddings = BigBirdEmbeddings(config, dtype)
        self.encoder = BigBirdEncoder(config, dtype)
        self.pooler = Linear(config.hidden_size, config.hidden_size, dtype) if add_pooling_layer else None
        self.attention_type = "original_full" if config.add_cross_attention else config.attention_type
        self._shape = BlockShape(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            scales=(config.head_dim**-0.5,) * config.num_hidden_layers,
            norm_eps=config.layer_norm_eps,
            activation=ACTIVATIONS[config.hidden_act],
        )
        self._bound = _Bound()
        self._word_scale = config.hidden_size**0.5 if config.rescale_embeddings else 1.0
        self._positions = torch.arange(config.max_position_embeddings).unsqueeze(0)  # [1, P]
        if init_weights:
            self.init_weights()

    def set_attention_type(self, value: str) -> None:
        """Changes ``attention_type``. Weights are the same for both."""
        if value not in ("block_sparse", "original_full"):
            raise ValueError(f"attention_type={value!r}; accepted: block_sparse, original_full")
        self.attention_type = value

    def _bind(self) -> _Bound:
        bound = self._bound
        count = VERSION.count  # before anything is read: another thread may change weights meanwhile
        if bound.stamp != count:
            tables, layers = self.embeddings, self.encoder.layer
            bound.blocks = [layer.bind() for layer in layers]
            bound.cross = [layer.bind_cross() for layer in layers] if self.config.add_cross_attention else None
            bound.table = tables.word_embeddings.stored("weight")
            bound.position_table = tables.position_embeddings.stored("weight")
            bound.type_table = tables.token_type_embeddings.stored("weight")
            bound.norm = (tables.LayerNorm.stored("weight"), tables.LayerNorm.stored("bias"), tables.LayerNorm.eps)
            bound.pooler = None
            if self.pooler is not None:
                bound.pooler = (self.pooler.stored("weight"), self.pooler.stored("bias"))
            bound.stamp = count
        return bound

    # --- one pass -------------------------------------------------------------------------------------------------

    def run(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        block_plan: BlockPlans = None,
    ) -> BigBirdRun:
        """One pass through all blocks. Raises ValueError for inputs that do not fit, before the cache changes; should
        anything fail later, the cache is put back to where it was."""
        require_tensors(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            head_mask=head_mask,
        )
        self.check_inference(inputs_embeds, encoder_hidden_states)
        bound, shape, config = self._bind(), self._shape, self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            input_ids = self._check_ids("input_ids", input_ids)
            batch, tokens = input_ids.shape
        else:
            batch, tokens = self._check_embeds("inputs_embeds", inputs_embeds)
        if past_key_values is not None and not config.is_decoder:
            raise ValueError("past_key_values is given to an encoder; it needs a configuration with is_decoder=True")
        past = 0 if past_key_values is None else self._check_cache(past_key_values, batch)
        is_sparse = self._chooses_blocks(tokens, past_key_values, use_cache, block_plan is not None)
        plans = self._plans(tokens, block_plan) if is_sparse else None
        has_positions = position_ids is not None
        position_ids = self._checked_positions(position_ids, batch, tokens, past)
        if token_type_ids is None:
            token_type_ids = torch.zeros(batch, tokens, dtype=torch.int64, device=self.device)
        else:
            token_type_ids = self._check_broadcast("token_type_ids", token_type_ids, batch, tokens)
            token_type_ids = token_type_ids.expand(batch, tokens)
        padding = mask = None
        if attention_mask is not None:
            self._check_device("attention_mask", attention_mask)
            if attention_mask.dim() == 2:
                padding = attention_mask
            elif is_sparse:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}; accepted by block-sparse attention: "
                    f"[{batch}, {tokens}] (1 = token, 0 = padding). attention_type='original_full' takes masks of "
                    "pairs, too"
                )
        first = None
        if padding is not None and has_positions and not past and list(padding.shape) == [batch, tokens]:
            first = first_columns(padding.bool(), position_ids)
        head_masks = None if head_mask is None else self._head_masks(head_mask)

        keep = config.is_decoder and not is_sparse and self._wants("use_cache", use_cache)
        cache = past_key_values
        if cache is None:
            cache = KVCache(config, batch, dtype=self.dtype, device=self.device, _shared_layer=not keep)
        if attention_mask is not None and padding is None:
            mask = self._full_mask(attention_mask, batch, tokens, past + tokens, cache)
        has_encoder = encoder_hidden_states is not None or encoder_attention_mask is not None or cache.cross is not None
        encoder_real = encoder_mask = None
        if has_encoder:
            encoder_real, encoder_mask = self._check_encoder(
                cache, batch, tokens, encoder_hidden_states, encoder_attention_mask
            )
        x = self._embed(input_ids, inputs_embeds, position_ids, token_type_ids)

        hidden_states: list[Tensor] | None = [x] if self._wants("output_hidden_states", output_hidden_states) else None
        attentions: list[Tensor] | None = [] if self._wants("output_attentions", output_attentions) else None
        cross_attentions: list[Tensor] | None = None if attentions is None else []  # empty without an encoder, as there
        kept_cross = cache.cross
        try:
            attend, positions = self._attend(
                cache, tokens, padding, mask, head_masks, plans, first if block_plan is None else None
            )
            cross = None
            if has_encoder:
                if cache.cross is None:
                    cache.cross = make_cross_key_values(bound.cross, shape, encoder_hidden_states, encoder_real)
                cross = CrossAttention(
                    bound.cross, shape, cache.cross, positions, encoder_mask, head_masks, cross_attentions
                )
            x = run_post_norm_blocks(
                bound.blocks, shape, x, cache.layers, positions, attend, cross, hidden_states, attentions
            )
        except BaseException:
            cache.crop(past)
            cache.cross = kept_cross
            raise
        collected = (None if c is None else tuple(c) for c in (hidden_states, attentions, cross_attentions))
        return BigBirdRun(x, first, cache if keep or past_key_values is not None else None, *collected)

    def pool(self, run: BigBirdRun) -> Tensor | None:
        """``tanh(pooler(x))`` of the first tokens, [B, E]; None without a pooler."""
        if self.pooler is None:
            return None
        return product(run.first_tokens(), *self._bound.pooler, activation=ACTIVATIONS["tanh"])

    def _chooses_blocks(self, tokens: int, cache: KVCache | None, use_cache: bool | None, has_plan: bool) -> bool:
        """Whether this pass is block-sparse."""
        limit = self.config.max_full_tokens
        if has_plan:
            if self.config.add_cross_attention:
                raise ValueError("block_plan does not go with cross-attention")
        elif self.attention_type != "block_sparse":
            return False
        elif tokens <= limit:
            if self.config.sticky:
                self.attention_type = "original_full"
            return False
        if self.config.is_decoder and (cache is not None or use_cache):
            raise ValueError(
                f"{tokens} tokens are to get block-sparse attention (more than {limit}, or a block_plan), which keeps "
                "no cache; pass use_cache=False, or make the model with attention_type='original_full'"
            )
        return True

    def _checked_positions(self, position_ids: Tensor | None, batch: int, tokens: int, past: int) -> Tensor:
        limit = self._positions.shape[1]
        if position_ids is not None:
            return self._check_broadcast("position_ids", position_ids, batch, tokens)
        if past + tokens > limit:
            count = f"{past} cached and {tokens} new tokens make {past + tokens}," if past else f"{tokens} tokens are"
            raise ValueError(
                f"{count} more than max_position_embeddings={limit}; cut the text to {limit} tokens "
                f"(tokenizer(text, truncation=True, max_length={limit})) or run it in pieces"
            )
        return self._positions[:, past : past + tokens]

    def _embed(
        self, input_ids: Tensor | None, embeds: Tensor | None, position_ids: Tensor, token_type_ids: Tensor
    ) -> Tensor:
        """Words, positions and token types, summed in float32, rounded and normed."""
        bound, config = self._bound, self.config
        for name, ids, count, limit in (
            ("position_ids", position_ids, config.max_position_embeddings, "max_position_embeddings"),
            ("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size"),
            ("input_ids", input_ids, config.vocab_size, "vocab_size"),
        ):
            if ids is not None and out_of_range(ids, count):
                wrong = int(ids[(ids < 0) | (ids >= count)][0])
                raise ValueError(f"{name} holds {wrong}; accepted: 0 to {count - 1} ({limit} is {count})")
        if embeds is None:
            return self.embed_ids(input_ids, position_ids, token_type_ids)
        x = embeds.float() * self._word_scale + bound.position_table[position_ids].float()
        x = (x + bound.type_table[token_type_ids].float()).to(self.dtype)
        weight, bias, eps = bound.norm
        return layer_norm_op(x, weight, bias, eps, None)

    def embed_ids(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The normed embeddings [B, T, E] of ids that are in range."""
        bound, config = self._bound, self.config
        x = embedding_op(
            input_ids,
            bound.table.data,
            config.vocab_size,
            config.hidden_size,
            position_ids,
            bound.position_table,
            token_type_ids,
            bound.type_table,
            self._word_scale,
            bound.table.code,
            bound.table.value_dtype,
        )
        weight, bias, eps = bound.norm
        return layer_norm_op(x, weight, bias, eps, None)

    def run_step(self, tokens: Tensor, position_ids: Tensor, slots: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """The last block's output [B, 1, E] for one token a row of a decoder, nothing asked of the device; arguments as
        :meth:`alula.models.decoder.DecoderWithHead.decode_step`."""
        bound, shape = self._bind(), self._shape
        x = self.embed_ids(tokens, position_ids, torch.zeros_like(tokens))
        attend = FullAttention(shape, slots, None, lengths, None, None, None, True)
        cross = None
        if cache.cross is not None:
            cross = CrossAttention(bound.cross, shape, cache.cross, slots, None, None, None, may_pad=False)
        return run_post_norm_blocks(bound.blocks, shape, x, cache.layers, slots, attend, cross)

    def _attend(
        self,
        cache: KVCache,
        tokens: int,
        padding: Tensor | None,
        mask: Tensor | None,
        head_masks: Any,
        plans: Sequence[BlockPlan] | None,
        first: Tensor | None,
    ) -> tuple[Attend, Tensor]:
        """The attention of this pass, and the slots (int32 [B, T]) at which it looks for keys and values."""
        is_decoder = self.config.is_decoder
        if plans is not None:
            positions, _ = cache.prepare(tokens)
            real = None
            if padding is not None:
                if list(padding.shape) != list(positions.shape):
                    raise ValueError(
                        f"attention_mask has shape {list(padding.shape)}; accepted: {list(positions.shape)}"
                    )
                real = padding.bool()
                real = None if bool(real.all()) else real
            if first is not None:
                by_row = [default_plans(self.config, n, is_training=self.training) for n in (tokens - first).tolist()]
                plans = [list(plans_of_layer) for plans_of_layer in zip(*by_row, strict=True)]
                return SparseAttention(self._shape, plans, None, head_masks, first.int()), positions
            return SparseAttention(self._shape, plans, real, head_masks), positions
        before = cache.lengths
        positions, lengths = cache.prepare(tokens, padding)
        causal = is_decoder and mask is None
        visible, alone = positions, None
        if not causal:
            visible = torch.zeros_like(positions)
            if padding is not None and bool((positions < 0).any()):
                alone = visible.masked_fill(positions >= 0, -1)
        elif padding is not None and tokens > 1:
            visible, alone = see_from_padding(positions, before)
        attend = FullAttention(self._shape, visible, alone, lengths, cache.real_columns(), mask, head_masks, causal)
        return attend, positions

    def _plans(self, tokens: int, given: BlockPlans) -> Sequence[BlockPlan]:
        """The plan of every block."""
        if given is None:
            return default_plans(self.config, tokens, is_training=self.training)
        layers = self.config.num_hidden_layers
        plans = [given] * layers if isinstance(given, BlockPlan) else list(given)
        if len(plans) != layers or not all(isinstance(plan, BlockPlan) for plan in plans):
            raise ValueError(f"block_plan must be one alula.BlockPlan, or one for each of the {layers} layers")
        for plan in plans:
            if not plan.fits(tokens):
                raise ValueError(
                    f"block_plan has {plan.num_blocks} blocks of {plan.block_size}; the input {tokens} tokens"
                )
            if plan.num_heads not in (1, self._shape.num_heads):
                raise ValueError(f"block_plan is for {plan.num_heads} heads; the model has {self._shape.num_heads}")
            if self.config.is_decoder and not plan.is_causal:
                raise ValueError("block_plan is not causal, and the model a decoder; make it with is_causal=True")
        return plans

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        *,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        block_plan: BlockPlans = None,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """One pass.

        Args:
            input_ids: int64 [B, T], or ``inputs_embeds`` [B, T, E] in the model's dtype in their place. At most
                ``max_position_embeddings`` tokens; any number, not only multiples of the block size.
            attention_mask: [B, T] (with a cache also [B, past + T]), nonzero = token, 0 = padding (left, right or
                holes); with full attention also [B, T|1, S] or [B|1, H|1, T|1, S], bool (True = visible) or
                floating point (added).
            token_type_ids: int64 [B, T], default zeros. position_ids: int64 [B, T] or [1, T]; default: the column,
                with no correction for padding, as in transformers. Where the mask pads on the left and they count from
                each row's first token (``mask.cumsum(1) - 1``), blocks begin there, too, and what is pooled is that
                token: a row gives what it gives alone.
            encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache: for a decoder, as
                :class:`alula.models.GPT2Model` takes them; they go with full attention.
            head_mask: [H] or [L, H]; multiplies the attention probabilities.
            output_attentions: also the probabilities, L of [B, H, T, S]. Of block-sparse attention they are dense, and
                a block that counts more than once has the probabilities of one copy, as in transformers.
            output_hidden_states: also the normed embeddings and every block's output, L + 1 of [B, T, E].
            return_dict: False for a plain tuple.
            block_plan: your own pattern of blocks, one for all layers or one for each, in place of the model's; an
                input of any length is then block-sparse.

        In training mode (under ``torch.no_grad()``) block-sparse attention uses the random blocks that transformers
        trains with; dropout is not applied.

        Raises ValueError for inputs that do not fit and RuntimeError where gradients are asked for.
        """
        run = self.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache,
            head_mask,
            output_attentions,
            output_hidden_states,
            block_plan,
        )
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            run.hidden, self.pool(run), run.cache, run.hidden_states, run.attentions, run.cross_attentions
        )
        return output if self._wants("return_dict", return_dict) else output.to_tuple()


class BigBirdWithHead(BigBirdPreTrainedModel):
    """A head on a :class:`BigBirdModel`, named ``bert``."""

    bert: BigBirdModel

    def __init__(self, config: BigBirdConfig, dtype: torch.dtype | None, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.bert = BigBirdModel(config, add_pooling_layer, dtype=dtype, init_weights=False)

    @property
    def weights_stamp(self) -> int:
        """Changes when a weight does, of this model or of another."""
        return VERSION.count

    def set_attention_type(self, value: str) -> None:
        """:meth:`BigBirdModel.set_attention_type`."""
        self.bert.set_attention_type(value)
