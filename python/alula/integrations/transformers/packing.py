"""Packed copies of a module's weights, made once and kept up to date.

The kernels read matrices in panels (alula.ops.pack), so each is copied; vectors whose layout is the checkpoint's are
shared with the module. Before a pass every submodule and parameter is compared with what was packed (the object, its
memory, its version counter): what changed is packed again. Changes written through ``parameter.data`` move no counter;
``refresh`` packs after those.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from alula import ops
from alula.integrations.transformers import released
from alula.integrations.transformers.families import (
    Family,
    NotReplaceable,
    dtype_of,
    engine_config,
    inspect_stack,
)
from alula.models.base import PreTrainedModel
from alula.models.blocks import BlockShape, BlockStack, BlockWeights, ParallelBlockWeights
from alula.models.cross_attention import CrossWeights
from alula.models.layers import WeightModule

__all__ = ["PackedHead", "PackedStack", "Watch", "changed_too_far"]


# Where transformers runs cross-attention itself, BigBird's blocks are bound with its layer norm all the same.
_CROSS, _CROSS_NORM = ("crossattention.", "ln_cross_attn."), "crossattention.output."
_VERSION = operator.attrgetter("_version")


class Watch:
    """Remembers the parameters and submodules of modules, to say whether they are still the same."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._parents = [module._modules for module in modules if module._modules]
        self._children = [child for parent in self._parents for child in parent.values()]
        self._owners = [module._parameters for module in modules if module._parameters]
        self._parameters = [parameter for owner in self._owners for parameter in owner.values()]
        given = [parameter for parameter in self._parameters if parameter is not None]
        self._given = given
        self._pointers = list(map(Tensor.data_ptr, given))
        # A tensor made in inference mode counts no versions.
        self._counted = [parameter for parameter in given if not parameter.is_inference()]
        self._versions = list(map(_VERSION, self._counted))
        self._without_memory = [(parameter, parameter.dtype) for parameter in given if parameter.is_meta]

    def changed(self) -> bool:
        """Whether a parameter or submodule is another object, or a parameter lies elsewhere or was written in place."""
        with torch._C.DisableTorchFunctionSubclass():  # released parameters would answer in Python
            return self._differs()

    def _differs(self) -> bool:
        now = [parameter for owner in self._owners for parameter in owner.values()]
        children = [child for parent in self._parents for child in parent.values()]
        return (
            len(now) != len(self._parameters)
            or len(children) != len(self._children)
            or not all(map(operator.is_, now, self._parameters))
            or not all(map(operator.is_, children, self._children))
            or list(map(_VERSION, self._counted)) != self._versions
            or list(map(Tensor.data_ptr, self._given)) != self._pointers
            or any(parameter.dtype != dtype for parameter, dtype in self._without_memory)
        )


def changed_too_far(module: nn.Module, why: str) -> NotReplaceable:
    """The error for a module that alula ran and cannot run any more."""
    return NotReplaceable(
        f"an accelerated {type(module).__name__} was changed into what alula cannot run: {why}. Undo that, or call "
        "alula.integrations.transformers.restore(model)"
    )


class PackedStack:
    """The blocks of a model as alula's loops over blocks take them.

    Args:
        keep: whether the module keeps its own matrices beside the packed ones. shared: ids of parameters that it keeps
            in any case, since other modules have them, too.

    Attributes:
        blocks: per block the bound tensors. cross: per block those of cross-attention, where alula runs it. shape:
            their sizes. dtype: of all. engine: alula's model that owns the packed tensors (it has no embeddings of its
            own).
    """

    engine: PreTrainedModel
    shape: BlockShape
    dtype: torch.dtype
    cross: list[CrossWeights] | None

    def __init__(
        self, module: nn.Module, family: Family, keep: bool = True, shared: frozenset[int] = frozenset()
    ) -> None:
        self.family, self.keep = family, keep
        self._find_shared(module, shared)
        self.pack(module)

    def pack(self, module: nn.Module) -> None:
        """Packs every block. NotReplaceable, with nothing changed, where the model is not what alula computes."""
        released.give_back(self.family.blocks(module))
        dtype = dtype_of(module, self.family)
        engine = self.family.engine(engine_config(module, self.family), dtype=dtype, init_weights=False)
        inspect_stack(module, self.family, engine)
        self.engine, self.shape, self.dtype = engine, engine._shape, dtype
        count = len(self.family.blocks(module))
        self._pack_blocks(module, range(count), [None] * count, [None] * count)

    def watch(self, module: nn.Module) -> None:
        """Takes the module as it is now for what is packed."""
        blocks = self.family.blocks(module)
        self._container = blocks
        self._watches = [Watch(block.modules()) for block in blocks]
        self._watch_all = Watch(blocks.modules())

    def _pack_blocks(self, module: nn.Module, indices: Iterable[int], blocks: list[Any], cross: list[Any]) -> None:
        """Packs the blocks of these indices; the lists hold the others."""
        modules, counterparts = self.family.blocks(module), self.family.blocks(self.engine)
        has_cross = self.family.has_cross and bool(getattr(self.engine.config, "add_cross_attention", False))
        with torch.inference_mode(False), torch.no_grad():
            for index in indices:
                parameters = dict(modules[index].named_parameters())
                for name, slot in counterparts[index].weight_slots().items():
                    if has_cross or not name.startswith(_CROSS) or name.startswith(_CROSS_NORM):
                        _share_or_write(slot.module, slot.name, parameters[name])
                blocks[index] = counterparts[index].bind()
                cross[index] = counterparts[index].bind_cross() if has_cross else None
                if not self.keep:
                    self._release(modules, index)
        self.blocks = _bound(blocks, self.shape)
        self.cross = cross if has_cross else None
        self.watch(module)

    def _release(self, modules: nn.ModuleList, index: int) -> None:
        """Gives up the matrices of a block that are packed, but not those that other modules have, too."""
        block = modules[index]
        for name, slot in self.family.blocks(self.engine)[index].weight_slots().items():
            is_packed = slot.name in slot.module._data and slot.name in slot.module._packed_names
            if is_packed and f"{index}.{name}" not in self._shared:
                path, _, last = name.rpartition(".")
                released.release(block.get_submodule(path), last, slot)

    def _find_shared(self, module: nn.Module, shared: frozenset[int]) -> None:
        named = self.family.blocks(module).named_parameters(remove_duplicate=False)
        self._shared = {name for name, parameter in named if id(parameter) in shared}

    def set_keep(self, module: nn.Module, keep: bool, shared: frozenset[int]) -> None:
        """Changes whether the module keeps its own matrices."""
        if keep == self.keep:
            return
        self.keep = keep
        self._find_shared(module, shared)
        blocks = self.family.blocks(module)
        if keep:
            released.give_back(blocks)
        else:
            for index in range(len(blocks)):
                self._release(blocks, index)
        self.watch(module)

    def follow(self, module: nn.Module) -> bool:
        """Packs again what changed; whether something had."""
        blocks = self.family.blocks(module)
        if blocks is self._container and not self._watch_all.changed():
            return False
        where = released.written(blocks)
        if where:
            raise changed_too_far(module, f"{where} was written in place, but was given up (keep_weights=False)")
        stale = [index for index, watch in enumerate(self._watches) if watch.changed()]
        try:
            in_blocks = blocks is self._container and 0 < len(stale) < len(self._watches) == len(blocks)
            self._repack(module, stale) if in_blocks else self.pack(module)
        except NotReplaceable as error:
            raise changed_too_far(module, str(error)) from error
        return True

    def _repack(self, module: nn.Module, stale: list[int]) -> None:
        blocks = self.family.blocks(module)
        for index in stale:
            released.give_back(blocks[index])
        inspect_stack(module, self.family, self.engine)
        if dtype_of(module, self.family) != self.dtype:
            self.pack(module)
            return
        cross = [None] * len(self.blocks) if self.cross is None else list(self.cross)
        self._pack_blocks(module, stale, list(self.blocks), cross)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies of the blocks without cross-attention: what is shared with the module is not counted."""
        return _packed_bytes(self.blocks)

    @property
    def cross_nbytes(self) -> int:
        """Bytes of the copies of cross-attention."""
        return _packed_bytes(self.cross or ())


def _packed_bytes(blocks: Iterable[tuple[Any, ...]]) -> int:
    return sum(tensor.nbytes for block in blocks for tensor in block if isinstance(tensor, ops.PackedWeight))


def _bound(blocks: list[tuple], shape: BlockShape) -> BlockStack | list[tuple]:
    """What runs in one call, where these blocks can."""
    return BlockStack(blocks, shape) if isinstance(blocks[0], BlockWeights | ParallelBlockWeights) else blocks


def _share_or_write(module: WeightModule, name: str, value: Tensor) -> None:
    """Gives alula's module a tensor: the very memory where its layout is the kernel's, else a copy."""
    detached = value.detach()
    if name not in module._packed_names and detached.is_contiguous() and module._from_checkpoint(detached) is detached:
        module._data[name] = detached
    else:
        module.write(name, detached)


class PackedHead:
    """The output projection [V, E] of a language model, packed; ``keep``: whether the module keeps its own, too."""

    def __init__(self, module: nn.Linear, keep: bool = True) -> None:
        self.keep = keep
        self.pack(module)

    def pack(self, module: nn.Linear) -> None:
        released.give_back(module)
        with torch.no_grad():
            self.weight = ops.pack(module.weight.detach())
        if not self.keep:
            released.release(module, "weight", self)
        self._watch = Watch([module])

    def set_keep(self, module: nn.Linear, keep: bool) -> None:
        """Changes whether the module keeps its own matrix."""
        if keep != self.keep:
            self.keep = keep
            released.give_back(module) if keep else released.release(module, "weight", self)
            self._watch = Watch([module])

    def read(self) -> Tensor:
        """The matrix as it was."""
        return self.weight.unpack()

    def changed(self) -> bool:
        """Whether the weight is no longer what was packed."""
        return self._watch.changed()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
