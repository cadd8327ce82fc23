"""A copy of a weight, as PyTorch code sees it, that says so where one would write into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightCopy"]

_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_ALLOWED = {"requires_grad_", "share_memory_"}  # requires_grad_(True) is refused by PyTorch itself


class WeightCopy(Tensor):
    """What ``layer.weight`` and ``parameters()`` give: an inference tensor with a copy of a packed weight.

    Writing into it (``weight.zero_()``, ``weight[0] = x``, ``weight.data = x``, ``weight.data.copy_(x)``,
    ``torch.nn.init``) raises RuntimeError, as it could not reach the model. All else works as on a tensor, and what is
    computed, copied or pickled is a plain one. ``isinstance(weight, torch.nn.Parameter)`` is true.
    """

    _is_param = True

    @classmethod
    def of(cls, value: Tensor) -> WeightCopy:
        """``value``, which nobody else has, as such a copy."""
        with torch.inference_mode():
            return value.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _READ_DATA:
            return args[0]
        target = args[0] if args else next(iter((kwargs or {}).values()), None)
        if isinstance(target, cls) and _writes(func):
            raise RuntimeError(
                "this tensor is a copy of a weight, which alula keeps packed: writing into it would not change the "
                "model. Assign (layer.weight = value) or load_state_dict"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if func is Tensor.detach else result  # the same memory

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._plain().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def _plain(self) -> Tensor:
        with torch.inference_mode():
            return self.as_subclass(Tensor)


_READ_DATA, _WRITE_DATA = Tensor.data.__get__, Tensor.data.__set__


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or name in _IN_PLACE or func == _WRITE_DATA
    return name.endswith("_") and name not in _ALLOWED
