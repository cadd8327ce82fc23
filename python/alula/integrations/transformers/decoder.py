"""The forward pass that stands in for transformers' GPT2Model, GPTBigCodeModel and CodeGenModel on one instance.

Embeddings, positions, masks and outputs are transformers'; the blocks between them run as alula's own classes run them
(alula.models.blocks). What the blocks cannot do is handed, call by call, to the forward of the class, and counted.

Alphabet: B batch, T new tokens, S columns (past and new), H query heads, G key/value heads, D head size, E model width.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPastAndCrossAttentions

from alula.integrations.transformers import versions
from alula.integrations.transformers.cache import FixedLayer, GrowingLayer, adopt, decoder_cache
from alula.integrations.transformers.families import Family
from alula.integrations.transformers.packing import PackedStack
from alula.models import blocks as block_loops

__all__ = ["DecoderState", "bound_forward"]

layer_norm_op = torch.ops.alula.layer_norm.default

_IS_5 = versions.number(versions.VERSION) >= (5, 0)
# Arguments the pass below acts on, and those of transformers that change nothing in it.
_ACTED_ON = {
    *versions.FORWARD,
    "head_mask",
    "encoder_hidden_states",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
}
_WITHOUT_EFFECT = {
    "encoder_attention_mask",  # means something beside encoder_hidden_states only
    "num_items_in_batch",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


class DecoderState:
    """What an accelerated decoder carries as ``_alula``: packed blocks, and counts of what ran.

    Attributes:
        fast: passes through alula's blocks (those of compiled code are not counted). plain: why -> passes through
            transformers' blocks.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.family = family
        self.stack = PackedStack(module, family)
        self.fast = 0
        self.plain: Counter[str] = Counter()
        self.repacked = 0
        self.has_dropout = any(isinstance(inner, nn.Dropout) and inner.p for inner in module.modules()) or bool(
            getattr(module.config, "attn_pdrop", 0)
        )
        # Hooks on modules inside the blocks would not run: these dictionaries are looked at before every pass.
        inner = [submodule for block in module.h for submodule in block.modules()] + [module.ln_f]
        self.hooks = [hooks for sub in inner for hooks in (sub._forward_hooks, sub._forward_pre_hooks)]

    def follow(self, module: nn.Module) -> None:
        """Packs again what changed since the last pass."""
        if self.stack.follow(module):
            self.repacked += 1

    def hooked(self) -> bool:
        """Whether somebody registered a hook inside the blocks; those that collect outputs do not count."""
        return any(self.hooks) and any(
            not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")
            for hooks in self.hooks
            for hook in hooks.values()
        )


class _Pass(NamedTuple):
    """The inputs of one pass through the blocks."""

    x: Tensor  # [B, T, E]
    layers: list[GrowingLayer | FixedLayer] | None
    kv: list[Tensor]  # per block [B, G, S, 2*D]
    positions: Tensor  # int32 [B, T]
    lengths: Tensor  # int32 [B]
    mask: Tensor | None
    causal: bool
    columns: int  # S as transformers counts it


def bound_forward(module: nn.Module) -> types.MethodType:
    """A forward for this instance, with the signature of its class."""
    cls_forward = type(module).forward
    return types.MethodType(_make_forward(cls_forward), module)


@functools.cache
def _make_forward(cls_forward: Any) -> Any:
    names = tuple(inspect.signature(cls_forward).parameters)[1:]

    @functools.wraps(cls_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args:
            if len(args) > len(names):
                raise TypeError(f"forward takes {len(names)} positional arguments, {len(args)} were given")
            twice = [name for name in names[: len(args)] if name in kwargs]
            if twice:
                raise TypeError(f"forward got two values for {twice[0]!r}")
            kwargs.update(zip(names, args, strict=False))
        return _forward(self, self._alula, kwargs)

    return forward


def _forward(self: nn.Module, state: DecoderState, given: dict[str, Any]) -> Any:
    tracing = torch.compiler.is_compiling()
    grad = torch.is_grad_enabled()
    if self.training and (grad or state.has_dropout):
        raise RuntimeError(
            f"this {type(self).__name__} was accelerated by alula and is in training mode; alula has no backward "
            "and no dropout. Call model.eval() to run it, or alula.integrations.transformers.restore(model) to train it"
        )
    if grad:
        embeds = given.get("inputs_embeds")
        if embeds is not None and embeds.requires_grad:
            raise RuntimeError(
                "inputs_embeds requires grad, and alula has no backward: call under torch.no_grad(), or "
                "alula.integrations.transformers.restore(model) first"
            )
    with torch.no_grad():
        if not tracing:
            state.follow(self)
        reason = _why_plain(self, state, given, tracing)
        if reason is None:
            if not tracing:
                state.fast += 1
            return _run(self, state, given, tracing)
    if not tracing:
        if not state.plain[reason]:
            warnings.warn(f"alula: {type(self).__name__} runs on transformers' own blocks: {reason}", stacklevel=4)
        state.plain[reason] += 1
    return type(self).forward(self, **given)


def _why_plain(self: nn.Module, state: DecoderState, given: dict[str, Any], tracing: bool) -> str | None:
    """Why this call cannot go through alula's blocks; None if it can. May put alula's layers into the cache."""
    for name, value in given.items():
        if value is not None and name not in _ACTED_ON and name not in _WITHOUT_EFFECT:
            return f"the argument {name} is not known to alula"
    if given.get("encoder_hidden_states") is not None:
        return "cross-attention (encoder_hidden_states)"
    if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
        return "not exactly one of input_ids and inputs_embeds"
    if not self.config.__dict__.get("is_causal", True):
        return "config.is_causal is False"
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() > 4):
        return "attention_mask is of no kind that alula takes"
    head_mask = given.get("head_mask")
    if head_mask is not None and head_mask.dim() > 2:
        return "head_mask has more than two dimensions"
    if not tracing and state.hooked():
        return "a module inside the blocks has a forward hook"
    cache = given.get("past_key_values")
    if cache is not None:
        if not isinstance(cache, Cache):
            return f"past_key_values is a {type(cache).__name__}"
        inner = decoder_cache(cache)
        layers = inner.layers
        if len(layers) != len(state.stack.blocks) or type(layers[0]) not in (GrowingLayer, FixedLayer):
            return adopt(inner, len(state.stack.blocks))
    return None


def _wanted(self: nn.Module, given: dict[str, Any], name: str) -> Any:
    value = given.get(name)
    return getattr(self.config, name, None) if value is None else value


def _run(self: nn.Module, state: DecoderState, given: dict[str, Any], tracing: bool) -> Any:
    stack, family = state.stack, state.family
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
    use_cache = _wanted(self, given, "use_cache")
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
    past = _past(layers, given.get("cache_position"), tracing)

    if position_ids is None:
        position_ids = (torch.arange(tokens, device=embeds.device) + past).unsqueeze(0)
        packed = None
    else:
        packed = _packed(position_ids, batch, attention_mask, had_cache or bool(use_cache), tracing)
    x = _embed(self, embeds, position_ids, given.get("token_type_ids"), tokens, family)
    run = _prepare(stack, x, layers, past, attention_mask, packed, batch, tokens, tracing)

    with_attentions = bool(_wanted(self, given, "output_attentions"))
    with_hidden = _wanted(self, given, "output_hidden_states")
    hidden: list[Tensor] = []
    attentions: list[Tensor] = []
    head_masks = _head_masks(given.get("head_mask"), len(stack.blocks))
    observe = None
    if with_attentions or (with_hidden is not None and with_hidden is not False):
        observe = _observer(stack, run, head_masks, hidden, attentions if with_attentions else None)
    x = _run_blocks(stack, run, position_ids, head_masks, observe)
    if run.layers is not None:
        _advance(run.layers, tokens, past)

    norm = self.ln_f
    last = layer_norm_op(x, norm.weight, norm.bias, norm.eps, None)
    last = last.view(*_leading(input_shape, family), last.shape[-1])
    hidden_states = None
    if with_hidden is not None and with_hidden is not False:
        hidden_states = _selected((*hidden, last), with_hidden)
    return _output(self, family, given, last, cache, use_cache, hidden_states, tuple(attentions), with_attentions)


def _leading(input_shape: torch.Size, family: Family) -> tuple[int, ...]:
    return (-1, *input_shape[1:]) if family.name == "GPT-2" else tuple(input_shape)


def _past(layers: list | None, cache_position: Tensor | None, tracing: bool) -> int | Tensor:
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


def _prepare(
    stack: PackedStack,
    x: Tensor,
    layers: list | None,
    past: int | Tensor,
    attention_mask: Tensor | None,
    packed: Tensor | None,
    batch: int,
    tokens: int,
    tracing: bool,
) -> _Pass:
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
    return _Pass(x, layers, kv, positions, lengths, mask, causal, columns)


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


def _head_masks(head_mask: Tensor | None, layers: int) -> list[Tensor] | None:
    if head_mask is None:
        return None
    head_mask = head_mask.float()
    return list(head_mask) if head_mask.dim() == 2 else [head_mask] * layers


def _observer(
    stack: PackedStack,
    run: _Pass,
    head_masks: list[Tensor] | None,
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
            head_mask=None if head_masks is None else head_masks[layer],
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
    run: _Pass,
    position_ids: Tensor,
    head_masks: list[Tensor] | None,
    observe: block_loops.BlockObserver | None,
) -> Tensor:
    mask = _score_mask(stack, run.mask)
    start = (stack.blocks, stack.shape, run.x, run.kv, run.positions, run.lengths, None, mask, head_masks, run.causal)
    if stack.family.name == "CodeGen":
        rotary = position_ids.to(torch.int32).expand(run.positions.shape).contiguous()
        return block_loops.run_parallel_blocks(*start, observe, stack.engine._rotary_table, rotary)
    return block_loops.run_blocks(*start, observe)


def _advance(layers: list, tokens: int, past: int | Tensor) -> None:
    """Says that the new columns are stored."""
    for layer in layers:
        if type(layer) is GrowingLayer:
            layer.length += tokens
        elif isinstance(past, Tensor):
            layer.cumulative_length.copy_(past + tokens)
        else:
            layer.cumulative_length.fill_(past + tokens)


def _selected(hidden_states: tuple[Tensor, ...], wanted: Any) -> tuple[Tensor | None, ...]:
    """All hidden states, or only those of the index or indices asked for, None in place of the others."""
    if isinstance(wanted, bool):
        return hidden_states
    count = len(hidden_states)
    keep = {index % count for index in ([wanted] if isinstance(wanted, int) else wanted) if -count <= index < count}
    return tuple(state if index in keep else None for index, state in enumerate(hidden_states))


def _output(
    self: nn.Module,
    family: Family,
    given: dict[str, Any],
    last: Tensor,
    cache: Cache | None,
    use_cache: Any,
    hidden_states: tuple | None,
    attentions: tuple,
    with_attentions: bool,
) -> Any:
    kept = {
        "last_hidden_state": last,
        "past_key_values": cache if use_cache or family.name != "GPT-2" else None,
        "hidden_states": hidden_states,
        "attentions": attentions if with_attentions else None,
    }
    if family.name == "CodeGen":
        output = BaseModelOutputWithPast(**kept)
    else:
        has_cross = _IS_5 or getattr(self.config, "add_cross_attention", False)
        output = BaseModelOutputWithPastAndCrossAttentions(
            **kept, cross_attentions=() if with_attentions and has_cross else None
        )
    return_dict = given.get("return_dict")
    if return_dict is None:
        return_dict = getattr(self.config, "return_dict", True)
    return output if return_dict else output.to_tuple()
