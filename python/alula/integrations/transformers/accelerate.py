"""``accelerate`` and ``restore``: alula's forward methods put on the modules of one model, and taken off again."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import alula
from alula.integrations.transformers import head, last_tokens, released, versions
from alula.integrations.transformers.big_bird import BigBirdState
from alula.integrations.transformers.cache import has_our_layers
from alula.integrations.transformers.decoder import DecoderState
from alula.integrations.transformers.families import FAMILIES, NotReplaceable, family_of
from alula.integrations.transformers.guards import refuse
from alula.integrations.transformers.report import Left, Replaced, Report
from alula.integrations.transformers.state import StackState, bound_forward

__all__ = ["accelerate", "accelerate_model", "refresh", "restore"]

_OURS = ("forward", "_apply", "_alula", "_alula_hook")


class _Plan(NamedTuple):
    """A module to be replaced: where it is, its state, its new forward, what the report says."""

    where: str
    module: nn.Module
    state: Any
    forward: Any
    lines: list[Replaced]


def accelerate(model: PreTrainedModel, *, keep_weights: bool | None = None) -> Report:
    """Makes this model run on alula; no other model, and no class, is touched.

    Args:
        model: any class of GPT-2, GPTBigCode, CodeGen or BigBird, or one that contains their models; on the CPU, in
            evaluation mode, in float32, bfloat16 or float16.
        keep_weights: False gives up the model's own matrices, block by block, for the packed ones: those of the blocks
            and of an output projection that no embedding shares. ``state_dict``, ``save_pretrained``, ``restore`` and
            ``load_state_dict`` make them again, bit for bit, and ``.to()`` works; what else reads them fails, and so
            does a call that needs transformers' own blocks. True keeps them, and makes those again that were given up.
            Default: True, or what an earlier call said.

    Returns: what was replaced and what was left, and why. Calling it again changes nothing, packs weights that changed,
        and reports again.

    Raises TypeError or ValueError, with nothing changed, for a model that cannot be accelerated or in which nothing
    could be replaced, saying what and why.
    """
    versions.check()
    refuse(model)
    report = Report(type(model).__name__, {"alula": alula.__version__, "transformers": versions.VERSION})
    plans: list[_Plan] = []
    try:
        taken = _take(model, keep_weights, plans, report)
    except BaseException:
        released.give_back(model)
        raise
    for plan in plans:
        _put_on(plan)
        report.replaced += plan.lines
        report.states.append(plan.state)
    for where, module in model.named_modules():
        if last_tokens.put_on(module):
            report.replaced.append(Replaced(where, "forward", 1, "itself, and the decoder is told logits_to_keep", 0))
    _tell_of_the_rest(model, taken, report)
    report.released_bytes = sum(module._parameters[name].nbytes for module, name in released.names_of(model))
    return report


def _take(
    model: PreTrainedModel, keep_weights: bool | None, plans: list[_Plan], report: Report
) -> dict[int, nn.Module]:
    """Packs what can be replaced and appends it to ``plans``. Returns every module that alula runs, by id."""
    taken: dict[int, nn.Module] = {}
    keep, shared = keep_weights is not False, _shared(model)
    for module in model.modules():
        if _is_accelerated(module) and not _runs_ours(module):
            _take_off(module)  # unpickled: methods put on an instance come back as those of its class
    for where, module in model.named_modules():
        if _is_accelerated(module):
            module._alula.follow(module)
            if keep_weights is not None:
                _set_keep(module, keep_weights, shared)
            taken[id(module)] = module
            report.replaced += _lines(where, module, module._alula)
            report.states.append(module._alula)
            continue
        family = family_of(module)
        if family is None:
            continue
        try:
            state = (DecoderState if family.is_decoder else BigBirdState)(module, family, keep, shared)
        except NotReplaceable as error:
            report.left.append(Left(where or type(model).__name__, type(module).__name__, str(error)))
            continue
        taken[id(module)] = module
        plans.append(_Plan(where, module, state, bound_forward(module), _lines(where, module, state)))
    if not taken:
        _nothing_replaced(model, report)
    _heads(model, taken, report, plans, keep, shared)
    return taken


def _shared(model: nn.Module) -> frozenset[int]:
    """Ids of the parameters that are in the model more than once."""
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return frozenset(parameter for parameter, count in counts.items() if count > 1)


def _set_keep(module: nn.Module, keep: bool, shared: frozenset[int]) -> None:
    state = module._alula
    if isinstance(state, StackState):
        state.stack.set_keep(module, keep, shared)
    else:
        state.packed.set_keep(module, keep or id(module.weight) in shared)


def accelerate_model(model: PreTrainedModel, *, keep_weights: bool | None = None) -> PreTrainedModel:
    """:func:`accelerate`, returning the model, for use inside a call."""
    accelerate(model, keep_weights=keep_weights)
    return model


def restore(model: nn.Module) -> int:
    """Takes alula off every module of the model. Returns of how many; 0 for a model that was not accelerated.

    Parameters, buffers and configuration were never touched: the model is what it was, bit for bit. Matrices that were
    given up (``keep_weights=False``) are made again, in new parameters of the same bits.
    """
    count = 0
    for module in _uncompiled(model).modules():
        if _is_accelerated(module):
            _take_off(module)
            count += 1
        last_tokens.take_off(module)
        # 4.57 keeps a static cache between calls of generate
        if isinstance(kept := module.__dict__.get("_cache"), Cache) and has_our_layers(kept):
            del module._cache
    return count


def refresh(model: nn.Module) -> None:
    """Packs all weights again, whether or not a change was seen: needed after writing through ``parameter.data``."""
    for module in _uncompiled(model).modules():
        if _is_accelerated(module):
            state = module._alula
            (state.stack if isinstance(state, StackState) else state.packed).pack(module)


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _is_accelerated(module: nn.Module) -> bool:
    return "_alula" in module.__dict__


def _runs_ours(module: nn.Module) -> bool:
    """Whether the forward on this instance is alula's."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is not type(module).forward


def _take_off(module: nn.Module) -> None:
    released.give_back(module)
    module._alula.forget()
    module._alula_hook.remove()
    for name in _OURS:
        module.__dict__.pop(name, None)


def _put_on(plan: _Plan) -> None:
    module = plan.module
    module.__dict__["_alula"] = plan.state
    module.__dict__["forward"] = plan.forward
    # Eager passes notice changes themselves; compiled ones rely on these two.
    module.__dict__["_apply"] = _apply.__get__(module)
    module.__dict__["_alula_hook"] = module.register_load_state_dict_post_hook(_after_loading)


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """nn.Module._apply (``to``, ``half``, ``cuda`` ...), then packs what it changed."""
    if fn(torch.empty(0)).device.type != "cpu":
        released.give_back(self)
    with released.moved_aside(self) as empty:
        type(self)._apply(self, fn, recurse)
    for parameter in empty:
        parameter.data = parameter.data.to(fn(torch.empty(0, dtype=parameter.dtype)).dtype)
    with contextlib.suppress(NotReplaceable):  # the next pass says it, when every part of the model is converted
        self._alula.follow(self)
    return self


def _after_loading(module: nn.Module, incompatible: Any) -> None:
    if _is_accelerated(module):
        with contextlib.suppress(NotReplaceable):
            module._alula.follow(module)


def _lines(where: str, module: nn.Module, state: Any) -> list[Replaced]:
    if isinstance(state, head.HeadState):
        return [Replaced(where, "output projection", 1, "linear", state.packed.nbytes)]
    family = state.family
    count = len(family.blocks(module))
    attention = {"CodeGen": "attention_into", "BigBird": "block_sparse_attention or attention"}.get(
        family.name, "attention"
    )
    norms = ", layer_norm" if family.name == "BigBird" else ""
    by = f"qkv_projection, {attention}, linear{norms}"
    lines = [Replaced(where, family.block.__name__, count, by, state.stack.nbytes)]
    if state.stack.cross is not None:
        lines.append(Replaced(where, "cross-attention", count, "linear, attention", state.stack.cross_nbytes))
    return [*lines, Replaced(where, "final LayerNorm", 1, "layer_norm", 0)] if family.is_decoder else lines


def _heads(
    model: PreTrainedModel,
    taken: dict[int, nn.Module],
    report: Report,
    plans: list[_Plan],
    keep: bool,
    shared: frozenset[int],
) -> None:
    """Plans the output projections that read what an accelerated decoder writes."""
    names = {id(module): name for name, module in model.named_modules()}
    for owner in model.modules():
        if not isinstance(owner, PreTrainedModel) or id(owner) in taken:
            continue
        if not any(id(child) in taken for child in owner.children()):
            continue
        module = owner.get_output_embeddings()
        if module is None or id(module) not in names or id(module) in taken or _is_accelerated(module):
            continue
        where = names[id(module)]
        why = head.why_not(module)
        if why is None:
            state = head.HeadState(module, keep or id(module.weight) in shared)
            plans.append(_Plan(where, module, state, head.bound_forward(module), _lines(where, module, state)))
            taken[id(module)] = module
        else:
            report.left.append(Left(where, type(module).__name__, why))


def _nothing_replaced(model: PreTrainedModel, report: Report) -> None:
    if report.left:
        raise ValueError(
            f"nothing in this {type(model).__name__} could be replaced: "
            + "; ".join(f"{left.where}: {left.why}" for left in report.left)
        )
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"{type(model).__name__} is not supported; accepted: any class with a model of {known}")


def _tell_of_the_rest(model: PreTrainedModel, taken: dict[int, nn.Module], report: Report) -> None:
    """Adds the modules with parameters that still run on PyTorch."""
    inside = {id(inner) for module in taken.values() for inner in _replaced_parts(module)}
    plain = [module for module in taken.values() if _runs_no_cross(module)]
    cross = {id(inner) for module in plain for name, inner in module.named_modules() if _is_cross(name)}
    for where, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own or id(module) in inside:
            continue
        why = "a look-up" if isinstance(module, nn.Embedding) else "not a part that alula replaces; PyTorch runs it"
        if id(module) in cross:
            why = "cross-attention runs on transformers' blocks when encoder_hidden_states are given"
        report.left.append(Left(where, type(module).__name__, why))


def _replaced_parts(module: nn.Module) -> list[nn.Module]:
    """The modules below an accelerated one that alula computes."""
    state = module._alula
    if not isinstance(state, StackState):
        return [module]
    blocks = state.family.blocks(module)
    inner = [part for name, part in blocks.named_modules() if not _runs_no_cross(module) or not _is_cross(name)]
    return [*inner, module.ln_f] if state.family.is_decoder else inner


def _runs_no_cross(module: nn.Module) -> bool:
    return isinstance(module._alula, StackState) and module._alula.stack.cross is None


def _is_cross(where: str) -> bool:
    return "crossattention" in where or "ln_cross_attn" in where
