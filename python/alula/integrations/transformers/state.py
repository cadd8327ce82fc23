"""What an accelerated stack of blocks carries, and the forward method that is put on its instance.

A call goes through alula's blocks where it can, and else to the forward of the class, with a warning and a count.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from alula.integrations.transformers import versions
from alula.integrations.transformers.cache import FixedLayer, GrowingLayer, adopt, decoder_cache
from alula.integrations.transformers.families import Family, NotReplaceable
from alula.integrations.transformers.packing import PackedStack
from alula.memory import raises_torch_errors

__all__ = [
    "StackState",
    "bound_forward",
    "forward_is_ours",
    "head_masks",
    "selected",
    "tells_of_cross_attention",
    "wanted",
]

_SELECTS_HIDDEN_STATES = versions.selects_hidden_states()
_WITHOUT_EFFECT = {
    "encoder_attention_mask",  # means something beside encoder_hidden_states only
    "num_items_in_batch",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


class StackState:
    """What an accelerated stack of blocks carries as ``_alula``: packed blocks, and counts of what ran.

    Subclasses say ``acted_on`` (the arguments their pass knows), :meth:`why_plain` and :meth:`run`.

    Attributes:
        fast: passes through alula's blocks (those of compiled code are not counted). plain: why -> passes through
            transformers' blocks. repacked: how often weights that changed were packed again. refused: why the module as
            it was last seen cannot run, if it cannot: compiled passes, which do not look at it, ask for this.
    """

    acted_on: frozenset[str] = frozenset()

    def __init__(
        self, module: nn.Module, family: Family, keep: bool = True, shared: frozenset[int] = frozenset()
    ) -> None:
        self.family = family
        self.stack = PackedStack(module, family, keep, shared)
        self.fast = self.repacked = 0
        self.refused: str | None = None
        self.plain: Counter[str] = Counter()
        rates = ("attn_pdrop", "attention_probs_dropout_prob")
        self.has_dropout = any(isinstance(inner, nn.Dropout) and inner.p for inner in module.modules()) or any(
            getattr(module.config, rate, 0) for rate in rates
        )
        self._find_hooks(module)

    # In an eager pass below a graph that broke, Dynamo would trace the looking and packing piece by piece.
    @torch.compiler.disable
    def follow(self, module: nn.Module) -> None:
        """Packs again what changed since the last pass. NotReplaceable if it became what alula cannot run."""
        try:
            changed = self.stack.follow(module)
        except NotReplaceable as error:
            self.refused = str(error)
            raise
        self.refused = None
        if changed:
            self.repacked += 1
            self._find_hooks(module)

    def forget(self) -> None:
        """Drops the packed copies, for a report outlives what it tells of."""
        del self.stack

    def _find_hooks(self, module: nn.Module) -> None:
        """Hooks on modules inside the blocks would not run: these dictionaries are looked at before every pass."""
        inner = list(self.family.blocks(module).modules())
        if self.family.is_decoder:
            inner.append(module.ln_f)
        self.hooks = [hooks for sub in inner for hooks in (sub._forward_hooks, sub._forward_pre_hooks)]

    def why_plain(self, module: nn.Module, given: dict[str, Any]) -> str | None:
        """Why this call cannot go through alula's blocks; None if it can. May put alula's layers into the cache."""
        raise TypeError(f"{type(self).__name__} does not say which calls it takes")

    def run(self, module: nn.Module, given: dict[str, Any], tracing: bool) -> Any:
        """The pass through alula's blocks."""
        raise TypeError(f"{type(self).__name__} does not say how its blocks run")

    # --- one call -------------------------------------------------------------------------------------------------

    def call(self, module: nn.Module, given: dict[str, Any]) -> Any:
        """forward(**given) of the module, on alula where it can be."""
        tracing = torch.compiler.is_compiling()
        self._check(module, given)
        grad = torch.is_grad_enabled()
        with torch.no_grad():
            if not tracing:
                self.follow(module)
            elif self.refused is not None:
                raise NotReplaceable(self.refused)
            reason = self._why_plain(module, given, tracing, grad)
            if reason is None:
                if not tracing:
                    self.fast += 1
                return self.run(module, given, tracing)
        if not self.stack.keep:
            raise RuntimeError(
                f"this call of a {type(module).__name__} needs transformers' own blocks ({reason}), whose matrices "
                "were given up (keep_weights=False). Call accelerate(model, keep_weights=True), or "
                "alula.integrations.transformers.restore(model)"
            )
        if not tracing:
            if not self.plain[reason]:
                text = f"alula: {type(module).__name__} runs on transformers' own blocks: {reason}"
                warnings.warn(text, stacklevel=5)
            self.plain[reason] += 1
        return type(module).forward(module, **given)

    def _check(self, module: nn.Module, given: dict[str, Any]) -> None:
        grad = torch.is_grad_enabled()
        if module.training and (grad or self.has_dropout):
            raise RuntimeError(
                f"this {type(module).__name__} was accelerated by alula and is in training mode; alula has no backward "
                "and no dropout. Call model.eval() to run it, or alula.integrations.transformers.restore(model) to "
                "train it"
            )
        embeds = given.get("inputs_embeds")
        if grad and embeds is not None and embeds.requires_grad:
            raise RuntimeError(
                "inputs_embeds requires grad, and alula has no backward: call under torch.no_grad(), or "
                "alula.integrations.transformers.restore(model) first"
            )

    def _why_plain(self, module: nn.Module, given: dict[str, Any], tracing: bool, grad: bool) -> str | None:
        for name, value in given.items():
            if value is not None and name not in self.acted_on and name not in _WITHOUT_EFFECT:
                return f"the argument {name} is not known to alula"
        states = given.get("encoder_hidden_states")
        if grad and states is not None and states.requires_grad:
            return "encoder_hidden_states requires grad"
        if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
            return "not exactly one of input_ids and inputs_embeds"
        mask, head_mask = given.get("attention_mask"), given.get("head_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() > 4):
            return "attention_mask is of no kind that alula takes"
        if head_mask is not None and head_mask.dim() > 2:
            return "head_mask has more than two dimensions"
        chosen = wanted(module, given, "output_hidden_states")
        if chosen and not isinstance(chosen, bool) and _records(module) and not _SELECTS_HIDDEN_STATES:
            return f"output_hidden_states that is no flag, in transformers {versions.VERSION}"
        if not tracing and self.hooked():
            return "a module inside the blocks has a forward hook"
        return self.why_plain(module, given)

    def hooked(self) -> bool:
        """Whether somebody registered a hook inside the blocks; those that collect outputs do not count."""
        return any(self.hooks) and any(
            not getattr(hook, "__module__", "").startswith("transformers.utils.output_capturing")
            for hooks in self.hooks
            for hook in hooks.values()
        )

    def why_not_cache(self, cache: Any) -> str | None:
        """Puts alula's layers into a cache, unless they are there. Why that cannot be, else None."""
        if not isinstance(cache, Cache):
            return f"past_key_values is a {type(cache).__name__}"
        inner, count = decoder_cache(cache), len(self.stack.blocks)
        if len(inner.layers) == count and type(inner.layers[0]) in (GrowingLayer, FixedLayer):
            return None
        return adopt(inner, count)


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
        return self._alula.call(self, kwargs)

    return raises_torch_errors(forward)


def forward_is_ours(module: nn.Module) -> bool:
    """Whether a call of the module runs :func:`bound_forward`'s forward, and no other that was put in its place."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is _make_forward(type(module).forward)


def wanted(module: nn.Module, given: dict[str, Any], name: str) -> Any:
    """An argument, or what the configuration says where it is not given."""
    value = given.get(name)
    return getattr(module.config, name, None) if value is None else value


def tells_of_cross_attention(module: nn.Module) -> bool:
    """Whether outputs that were asked for attentions have an entry for cross-attention, empty where there is none."""
    recorded = getattr(type(module), "_can_record_outputs", None)
    return "cross_attentions" in (recorded or {}) or bool(getattr(module.config, "add_cross_attention", False))


def head_masks(head_mask: Tensor | None, layers: int) -> list[Tensor] | None:
    """[H] or [L, H] as float32 [H] of each block."""
    if head_mask is None:
        return None
    head_mask = head_mask.float()
    return list(head_mask) if head_mask.dim() == 2 else [head_mask] * layers


def _records(module: nn.Module) -> bool:
    """Whether hooks collect the outputs of this class: then hidden states can be chosen by index."""
    return bool(getattr(type(module), "_can_record_outputs", None))


def selected(module: nn.Module, hidden_states: tuple[Tensor, ...], chosen: Any) -> tuple[Tensor | None, ...]:
    """All hidden states, or, of a class that can, only those of the index or indices asked for, None for the others."""
    if isinstance(chosen, bool) or not _records(module):
        return hidden_states
    count = len(hidden_states)
    keep = {index % count for index in ([chosen] if isinstance(chosen, int) else chosen) if -count <= index < count}
    return tuple(state if index in keep else None for index, state in enumerate(hidden_states))
