"""The output projection of a language model, on alula's packed product."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alula.integrations.transformers import released
from alula.integrations.transformers.families import NotReplaceable
from alula.integrations.transformers.packing import PackedHead, changed_too_far

__all__ = ["HeadState", "bound_forward", "why_not"]

linear_op = torch.ops.alula.linear.default


class HeadState:
    """What an accelerated output projection carries as ``_alula``."""

    def __init__(self, module: nn.Linear, keep: bool = True) -> None:
        self.packed = PackedHead(module, keep)
        self.fast = 0
        self.refused: str | None = None  # as in StackState

    @torch.compiler.disable  # as in StackState
    def follow(self, module: nn.Linear) -> None:
        """Packs again if the weight changed. NotReplaceable if it became what alula cannot read."""
        if self.packed.changed():
            where = released.written(module)
            why = f"{where} was written in place, but was given up (keep_weights=False)" if where else why_not(module)
            if why:
                error = changed_too_far(module, why)
                self.refused = str(error)
                raise error
            self.packed.pack(module)
        self.refused = None

    def forget(self) -> None:
        """Drops the packed copy, for a report outlives what it tells of."""
        del self.packed


def why_not(module: nn.Module) -> str | None:
    """Why alula cannot compute this output projection; None if it can."""
    if type(module) is not nn.Linear or ("forward" in module.__dict__ and "_alula" not in module.__dict__):
        return f"a {type(module).__module__}.{type(module).__name__}, not torch.nn.Linear as transformers makes it"
    plain = type(module.weight) is nn.Parameter and type(module.weight.data) is Tensor
    if not plain and not released.is_released(module, "weight"):
        return f"its weight is a {type(module.weight.data).__name__}"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}; accepted: float32, bfloat16, float16"
    return None


def bound_forward(module: nn.Linear) -> types.MethodType:
    """A forward for this instance."""
    return types.MethodType(forward, module)


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """[..., E] -> [..., V]. Where gradients are followed, torch's own product."""
    state: HeadState = self._alula
    if torch.is_grad_enabled() and (input.requires_grad or self.training):
        if released.is_released(self, "weight"):
            raise RuntimeError(
                "a gradient through the output projection needs its own weight, which was given up "
                "(keep_weights=False): call under torch.no_grad(), or alula.integrations.transformers.restore(model)"
            )
        return F.linear(input, self.weight, self.bias)
    with torch.no_grad():
        if not torch.compiler.is_compiling():
            state.follow(self)
            state.fast += 1
        elif state.refused is not None:
            raise NotReplaceable(state.refused)
        packed = state.packed.weight
        return linear_op(input, packed.data, packed.out_features, self.bias, None, None, 0.0, 0, None)
