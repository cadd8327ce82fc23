"""A language model that is asked for the logits of its last n tokens, as ``generate`` asks in its first pass.

transformers computes all tokens in all blocks and then takes the last n of them to the output projection. Nobody reads
the others after the last block's keys and values, so an accelerated decoder leaves them out there. It must know of n,
which only some classes hand on: for the length of a call the forward put on the language model leaves word of it, and
the decoder takes that word when it begins, so that no other call of it, from a hook or by the user, ever finds one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from alula.integrations.transformers import versions
from alula.integrations.transformers.families import FAMILIES
from alula.integrations.transformers.state import StackState, forward_is_ours

__all__ = ["put_on", "take", "take_off"]

_FORWARDS = [family.language_model.forward for family in FAMILIES if family.language_model is not None]
# Whose pass is next, and of how many tokens it is to give the output; per thread.
_word: ContextVar[tuple[StackState, int] | None] = ContextVar("alula_last_tokens", default=None)


def put_on(module: nn.Module) -> bool:
    """Puts the forward on a language model of transformers that has logits_to_keep and an accelerated decoder; not over
    a forward that somebody else put there. Whether it is there now."""
    if not _is_language_model(module) or "_alula" not in module.transformer.__dict__:
        return False
    of_class = type(module).forward
    if _function(module) is of_class:
        module.__dict__["forward"] = types.MethodType(_make_forward(of_class), module)
    return _function(module) is _make_forward(of_class)


def take_off(module: nn.Module) -> None:
    """Takes it off, also one that was unpickled, which comes back as that of the class."""
    if _is_language_model(module) and _function(module) in (type(module).forward, _make_forward(type(module).forward)):
        module.__dict__.pop("forward", None)


def _is_language_model(module: nn.Module) -> bool:
    forward = getattr(type(module), "forward", None)
    return forward in _FORWARDS and "logits_to_keep" in versions.parameters(forward)


def _function(module: nn.Module) -> Any:
    return getattr(module.forward, "__func__", None)


@functools.cache
def _make_forward(cls_forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(cls_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        of_class = type(self).forward
        count = kwargs.get("logits_to_keep")
        if torch.compiler.is_compiling() or type(count) is not int or count <= 0 or of_class is not cls_forward:
            return of_class(self, *args, **kwargs)
        decoder = _decoder_of(self)
        if decoder is None:
            return of_class(self, *args, **kwargs)
        token = _word.set((decoder, count))
        try:
            return of_class(self, *args, **kwargs)
        finally:
            _word.reset(token)

    return forward


def _decoder_of(module: nn.Module) -> StackState | None:
    """What carries the decoder's pass, if nobody but the language model sees what the decoder gives."""
    body = module.transformer
    decoder = body.__dict__.get("_alula")
    if decoder is None or not forward_is_ours(body) or decoder.hooked():
        return None
    hooks = (
        body._forward_hooks,
        body._forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
    )
    return None if any(hooks) else decoder


def take(decoder: StackState) -> int:
    """How many of the last tokens the caller of this decoder's pass reads; 0 for all. Asked again, it is all."""
    word = _word.get()
    if word is None or word[0] is not decoder:
        return 0
    _word.set(None)
    return word[1]
