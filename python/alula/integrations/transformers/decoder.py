"""The forward pass that stands in for transformers' GPT2Model, GPTBigCodeModel and CodeGenModel on one instance.

Embeddings, positions, masks and outputs are transformers'; the blocks between them run as alula's own classes run them
(alula.models.blocks). What the blocks cannot do is handed, call by call, to the forward of the class, and counted.

Alphabet: B batch, T new tokens, S columns (past and new), H query heads, G key/value heads, D head size, E model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPastAndCrossAttentions

from alula.integrations.transformers import cross_attention, last_tokens, versions
from alula.integrations.transformers.cache import FixedLayer, GrowingLayer, adopt, decoder_cache
from alula.integrations.transformers.families import Family
from alula.integrations.transformers.packing import PackedStack
from alula.integrations.transformers.state import StackState, head_masks, selected, tells_of_cross_attention, wanted
from alula.models import blocks as block_loops

__all__ = ["DecoderState", "Pass", "advance", "past_of", "prepare"]

layer_norm_op = torch.ops.alula.layer_norm.default

_IS_5 = versions.number(versions.VERSION) >= (5, 0)


class Pass(NamedTuple):
    """The inputs of one pass through the blocks."""

    x: Tensor  # [B, T, E]
    layers: list[GrowingLayer | FixedLayer] | None
    kv: list[Tensor]  # per block [B, G, S, 2*D]
    positions: Tensor  # int32 [B, T]
    lengths: Tensor  # int32 [B]
    mask: Tensor | None
    causal: bool
    columns: int  # S as transformers counts it


class DecoderState(StackState):
    """An accelerated GPT2Model, GPTBigCodeModel or CodeGenModel.

    Attributes:
        shortened: passes that left out of the last block the tokens whose logits nobody asked for.
    """

    shortened = 0
    acted_on = frozenset(
        (
            *versions.FORWARD,
            "head_mask",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "cache_position",
        )
    )

    def why_plain(self, module: nn.Module, given: dict[str, Any]) -> str | None:
        if not module.config.__dict__.get("is_causal", True):
            return "config.is_causal is False"
        cache = given.get("past_key_values")
        reason = None if cache is None else self.why_not_cache(cache)
        if reason is None and given.get("encoder_hidden_states") is not None:
            ids = given.get("input_ids")
            batch = given["inputs_embeds"].shape[0] if ids is None else ids.view(-1, ids.shape[-1]).shape[0]
            reason = cross_attention.why_not(self.stack, given, batch, bool(wanted(module, given, "use_cache")))
        return reason

    def run(self, module: nn.Module, given: dict[str, Any], tracing: bool) -> Any:
        return _run(module, self, given, tracing)


def _run(self: nn.Module, state: DecoderState, given: dict[str, Any], tracing: bool) -> Any:
    stack, family = state.stack, state.family
    kept = 0 if tracing else last_tokens.take(state)
    input_ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    attention_mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    input_shape = input_ids.shape if embeds is None else embeds.shape[:-1]
    tokens = input_shape[-1]
    if embeds is None:
        if family.name == "GPT-2" and not tracing:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        input_ids = input_ids.view(-1, tokens)
        embeds = self.wte(input_ids)
    batch = embeds.shape[0]

    cache = given.get("past_key_values")
    use_cache = wanted(self, given, "use_cache")
    had_cache = cache is not None
    if use_cache:
        if cache is None:
            cache = DynamicCache(config=self.config)
            adopt(cache, len(stack.blocks))
            if family.name == "GPTBigCode" and not _IS_5:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
        if self.config.__dict__.get("add_cross_attention") and not isinstance(cache, EncoderDecoderCache):
            cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
    layers = None if cache is None else decoder_cache(cache).layers
    past = past_of(layers, given.get("cache_position"), tracing)

    if position_ids is None:
        position_ids = (torch.arange(tokens, device=embeds.device) + past).unsqueeze(0)
        packed = None
    else:
        packed = _packed(position_ids, batch, attention_mask, had_cache or bool(use_cache), tracing)
    x = _embed(self, embeds, position_ids, given.get("token_type_ids"), tokens, family)
    run = prepare(stack, x, layers, past, attention_mask, packed, batch, tokens, tracing)

    with_attentions = bool(wanted(self, given, "output_attentions"))
    with_hidden = wanted(self, given, "output_hidden_states")
    if with_hidden or given.get("encoder_hidden_states") is not None or len(input_shape) != 2 or kept >= tokens:
        kept = 0
    hidden: list[Tensor] = []
    attentions: list[Tensor] = []
    masks_of_heads = head_masks(given.get("head_mask"), len(stack.blocks))
    observe = None
    if with_attentions or with_hidden:
        observe = _observer(stack, run, masks_of_heads, hidden, attentions if with_attentions else None)
    cross, cross_attentions = None, [] if with_attentions else None
    if given.get("encoder_hidden_states") is not None:
        if isinstance(cache, EncoderDecoderCache):
            adopt(cache.cross_attention_cache, len(stack.blocks))  # a new one of this pass
        cross = cross_attention.CrossPass(
            stack,
            given["encoder_hidden_states"],
            given.get("encoder_attention_mask"),
            cache,
            tokens,
            masks_of_heads,
            cross_attentions,
        )
    x = _run_blocks(stack, run, position_ids, masks_of_heads, observe, cross, kept)
    if run.layers is not None:
        advance(run.layers, tokens, past)

    norm = self.ln_f
    last = layer_norm_op(x, norm.weight, norm.bias, norm.eps, None)
    if kept:
        state.shortened += 1
    else:
        last = last.view(*_leading(input_shape, family), last.shape[-1])
    hidden_states = None
    if with_hidden:
        hidden_states = selected(self, (*hidden, last), with_hidden)
    seen = (tuple(attentions), tuple(cross_attentions)) if with_attentions else None
    return _output(self, family, given, last, cache, use_cache, hidden_states, seen)


def _leading(input_shape: torch.Size, family: Family) -> tuple[int, ...]:
    return (-1, *input_shape[1:]) if family.name == "GPT-2" else tuple(input_shape)


def past_of(layers: list | None, cache_position: Tensor | None, tracing: bool) -> int | Tensor:
    """Columns stored before this pass: a number, or a tensor where a compiled step of a static cache must not fix
    it."""
    if not layers:
        return 0
    layer = layers[0]
    if type(layer) is GrowingLayer:
        return layer.length
    if cache_position is not None:
        start = cache_position[0]
        return start if tracing else int(start)
    if not layer.is_initialized:
        return 0
    return layer.cumulative_length.clone() if tracing else int(layer.cumulative_length)


def _packed(
    position_ids: Tensor, batch: int, attention_mask: Tensor | None, has_cache: bool, tracing: bool
) -> Tensor | None:
    """int64 [B, T], the sequence that each token belongs to, where several are packed into a row as transformers
    sees it: from positions that start again, without a mask and without a cache."""
    if attention_mask is not None or has_cache:
        return None
    packed = find_packed_sequence_indices(position_ids.expand(batch, -1))
    if packed is None or (not tracing and not bool(packed[:, -1].any())):
        return None
    return packed


def _embed(
    self: nn.Module, embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, tokens: int, family: Family
) -> Tensor:
    x = embeds if family.name == "CodeGen" else embeds + self.wpe(position_ids)
    if token_type_ids is not None:
        x = x + self.wte(token_type_ids.view(-1, tokens))
    return x


def prepare(
    stack: PackedStack,
    x: Tensor,
    layers: list | None,
    past: int | Tensor,
    attention_mask: Tensor | None,
    packed: Tensor | None,
    batch: int,
    tokens: int,
    tracing: bool,
) -> Pass:
    shape = stack.shape
    if layers is None:
        scratch = x.new_empty((batch, shape.num_kv_heads, tokens, 2 * shape.head_dim))
        kv, columns = [scratch] * len(stack.blocks), tokens
    else:
        for layer in layers:
            if not layer.is_initialized:
                layer.start(batch, shape.num_kv_heads, shape.head_dim, x.dtype, x.device)
        _check_layers(layers[0], stack, batch)
        if type(layers[0]) is GrowingLayer:
            kv = [layer.reserve(tokens) for layer in layers]
            columns = past + tokens
        else:
            kv = [layer.merged for layer in layers]
            columns = layers[0].max_cache_len
    if isinstance(past, Tensor):
        positions = (torch.arange(tokens, device=x.device) + past).to(torch.int32).expand(batch, tokens)
        lengths = (past + tokens).to(torch.int32).expand(batch)
    else:
        positions = torch.arange(past, past + tokens, dtype=torch.int32, device=x.device).expand(batch, tokens)
        lengths = torch.full((batch,), past + tokens, dtype=torch.int32, device=x.device)
    mask, causal = _mask(attention_mask, packed, batch, tokens, columns, tracing)
    return Pass(x, layers, kv, positions, lengths, mask, causal, columns)


def _check_layers(layer: GrowingLayer | FixedLayer, stack: PackedStack, batch: int) -> None:
    shape, merged = stack.shape, layer.merged
    have = (merged.shape[0], merged.shape[1], merged.shape[3] // 2, merged.dtype)
    if have != (batch, shape.num_kv_heads, shape.head_dim, stack.dtype):
        raise ValueError(
            f"past_key_values holds (batch, key/value heads, head size, dtype) = {have}; the input and the model need "
            f"{(batch, shape.num_kv_heads, shape.head_dim, stack.dtype)}"
        )


def _mask(
    attention_mask: Tensor | None, packed: Tensor | None, batch: int, tokens: int, columns: int, tracing: bool
) -> tuple[Tensor | None, bool]:
    """A mask as alula's attention takes it, and whether the causal limit is to be added."""
    if packed is not None:
        return (packed.unsqueeze(2) == packed.unsqueeze(1)).unsqueeze(1), True
    if attention_mask is None:
        return None, True
    if attention_mask.dim() == 4:
        return attention_mask, False
    seen = attention_mask.reshape(batch, -1)[:, :columns] != 0
    missing = columns - seen.shape[1]
    if not missing and not tracing and bool(seen.all()):
        return None, True
    if missing:
        seen = F.pad(seen, (0, missing))  # transformers: columns that the mask does not name are not seen
    return seen[:, None, None, :].expand(batch, 1, tokens, columns), True


def _observer(
    stack: PackedStack,
    run: Pass,
    of_heads: list[Tensor] | None,
    hidden: list[Tensor],
    attentions: list[Tensor] | None,
) -> block_loops.BlockObserver:
    def observe(layer: int, x: Tensor, q: Tensor) -> None:
        hidden.append(x)
        if attentions is None:
            return
        probabilities = block_loops.attention_probabilities(
            q,
            run.kv[layer],
            run.positions,
            run.lengths,
            scale=stack.shape.scales[layer],
            causal=run.causal,
            mask=_score_mask(stack, run.mask),
            head_mask=None if of_heads is None else of_heads[layer],
        )
        attentions.append(F.pad(probabilities, (0, run.columns - probabilities.shape[3])))

    return observe


def _score_mask(stack: PackedStack, mask: Tensor | None) -> Tensor | None:
    """CodeGen adds its mask before the scores are divided by sqrt(D)."""
    if mask is None or mask.dtype == torch.bool or stack.family.name != "CodeGen":
        return mask
    return mask.float() * stack.shape.scales[0]


def _run_blocks(
    stack: PackedStack,
    run: Pass,
    position_ids: Tensor,
    of_heads: list[Tensor] | None,
    observe: block_loops.BlockObserver | None,
    cross: cross_attention.CrossPass | None,
    tokens_to_keep: int,
) -> Tensor:
    mask = _score_mask(stack, run.mask)
    start = (stack.blocks, stack.shape, run.x, run.kv, run.positions, run.lengths, None, mask, of_heads, run.causal)
    if stack.family.name == "CodeGen":
        rotary = position_ids.to(torch.int32).expand(run.positions.shape).contiguous()
        return block_loops.run_parallel_blocks(*start, observe, stack.engine._rotary_table, rotary, tokens_to_keep)
    return block_loops.run_blocks(*start, observe, cross, tokens_to_keep)


def advance(layers: list, tokens: int, past: int | Tensor) -> None:
    """Says that the new columns are stored."""
    for layer in layers:
        if type(layer) is GrowingLayer:
            layer.length += tokens
        elif isinstance(past, Tensor):
            layer.cumulative_length.copy_(past + tokens)
        else:
            layer.cumulative_length.fill_(past + tokens)


def _output(
    self: nn.Module,
    family: Family,
    given: dict[str, Any],
    last: Tensor,
    cache: Cache | None,
    use_cache: Any,
    hidden_states: tuple | None,
    attentions: tuple[tuple, tuple] | None,  # and those of cross-attention
) -> Any:
    kept = {
        "last_hidden_state": last,
        "past_key_values": cache if use_cache or family.name != "GPT-2" else None,
        "hidden_states": hidden_states,
        "attentions": None if attentions is None else attentions[0],
    }
    if family.name == "CodeGen":
        output = BaseModelOutputWithPast(**kept)
    else:
        cross = attentions[1] if attentions is not None and tells_of_cross_attention(self) else None
        output = BaseModelOutputWithPastAndCrossAttentions(**kept, cross_attentions=cross)
    return_dict = given.get("return_dict")
    if return_dict is None:
        return_dict = getattr(self.config, "return_dict", True)
    return output if return_dict else output.to_tuple()
