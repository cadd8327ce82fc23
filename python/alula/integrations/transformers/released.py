"""Matrices of a module that were given up for their packed copies (``accelerate(model, keep_weights=False)``).

Each leaves a parameter without memory (on the meta device) of its shape and dtype, and a source that makes the matrix
again, bit for bit. ``state_dict`` and ``save_pretrained`` ask the sources; ``load_state_dict`` and :func:`give_back`
first put parameters with values in place. Anything else that reads such a parameter is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Released", "Source", "give_back", "is_released", "moved_aside", "names_of", "release", "written"]

_HELD, _HOOKS = "_alula_released", "_alula_released_hooks"


class Source(Protocol):
    """What makes a matrix again."""

    def read(self) -> Tensor:
        """The matrix as it was."""


class _WithoutValues(Tensor):
    """A tensor on the meta device in place of values that were given up, or one that was made of it.

    PyTorch multiplies a tensor on the CPU by one on the meta device without an error, into memory that nothing was
    written to. So a call with this and another tensor raises; what asks for shape, dtype and the like does not.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if any(isinstance(value, Tensor) and not value.is_meta for value in tree_leaves((args, kwargs))):
                raise RuntimeError(
                    "this weight was given up for alula's copy (keep_weights=False) and lies on the meta device, "
                    "without values. alula.integrations.transformers.restore(model) makes it again, accelerate(model, "
                    "keep_weights=True) keeps it; a model that was unpickled needs accelerate(model) once more"
                )
            return tree_map_only(Tensor, _marked, func(*args, **kwargs))


def _marked(result: Tensor) -> Tensor:
    return result.as_subclass(_WithoutValues) if type(result) is Tensor and result.is_meta else result


class Released(nn.Parameter):
    """A parameter whose values were given up."""

    __torch_function__ = _WithoutValues.__torch_function__

    def __deepcopy__(self, memo: dict[int, Any]) -> Released:
        if id(self) not in memo:
            make, arguments = self.__reduce_ex__(None)
            memo[id(self)] = make(*arguments)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _without_memory, (tuple(self.shape), self.dtype, self.requires_grad, self.__dict__)


def _without_memory(
    shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, attributes: dict[str, Any]
) -> Released:
    empty = Released(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=requires_grad)
    empty.__dict__.update(attributes)
    return empty


def is_released(module: nn.Module, name: str) -> bool:
    """Whether this parameter of the module has no memory."""
    held = module.__dict__.get(_HELD, {}).get(name)
    return held is not None and module._parameters.get(name) is held[0]


def names_of(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every released parameter at or below a module."""
    for module in list(root.modules()):
        yield from ((module, name) for name in list(module.__dict__.get(_HELD, ())) if is_released(module, name))


def written(root: nn.Module) -> str | None:
    """Where a parameter without memory was written in place, which nobody could keep."""
    for module, name in names_of(root):
        if module._parameters[name]._version:
            return f"{name} of a {type(module).__name__}"
    return None


def release(module: nn.Module, name: str, source: Source) -> int:
    """Gives up a parameter. Returns its bytes."""
    parameter = module._parameters[name]
    empty = _without_memory(tuple(parameter.shape), parameter.dtype, parameter.requires_grad, parameter.__dict__)
    module.__dict__.setdefault(_HELD, {})[name] = (empty, source)
    module._parameters[name] = empty
    if _HOOKS not in module.__dict__:
        module.__dict__[_HOOKS] = (
            module.register_state_dict_post_hook(_fill),
            module.register_load_state_dict_pre_hook(_before_loading),
        )
    return parameter.nbytes


def give_back(root: nn.Module) -> int:
    """Puts parameters with values in place at and below a module. Returns their bytes."""
    count = 0
    for module in list(root.modules()):
        for name in list(module.__dict__.get(_HELD, ())):
            empty, source = module.__dict__[_HELD].pop(name)
            if module._parameters.get(name) is empty:
                module._parameters[name] = _made(empty, source)
                count += empty.nbytes
        for hook in module.__dict__.pop(_HOOKS, ()):
            hook.remove()
        module.__dict__.pop(_HELD, None)
    return count


def _made(empty: nn.Parameter, source: Source) -> nn.Parameter:
    with torch.inference_mode(False), torch.no_grad():
        parameter = nn.Parameter(source.read().to(empty.dtype), requires_grad=empty.requires_grad)
    parameter.__dict__.update(empty.__dict__)
    return parameter


def _fill(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, (empty, source) in module.__dict__.get(_HELD, {}).items():
        if is_released(module, name):
            state_dict[prefix + name] = _made(empty, source).detach()


def _before_loading(module: nn.Module, *args: Any) -> None:
    give_back(module)


class moved_aside:
    """Within it the released parameters below a module are None, which nn.Module passes over."""

    def __init__(self, root: nn.Module) -> None:
        self._places = list(names_of(root))

    def __enter__(self) -> list[nn.Parameter]:
        self._held = [module._parameters[name] for module, name in self._places]
        for module, name in self._places:
            module._parameters[name] = None
        return self._held

    def __exit__(self, *error: object) -> None:
        for (module, name), empty in zip(self._places, self._held, strict=True):
            module._parameters[name] = empty
