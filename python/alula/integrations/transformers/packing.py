"""Packed copies of a module's weights, made once and kept up to date.

The kernels read matrices in panels (alula.ops.pack), so each is copied; vectors whose layout is the checkpoint's are
shared with the module. Before a pass every submodule and parameter is compared with what was packed (the object, its
memory, its version counter): what changed is packed again. Changes written through ``parameter.data`` move no counter;
``refresh`` packs after those.
"""

from __future__ import annotations

import ctypes
import mmap
import operator
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from alula import ops
from alula.integrations.transformers.families import (
    Family,
    NotReplaceable,
    dtype_of,
    engine_config,
    inspect_stack,
)
from alula.models.base import PreTrainedModel
from alula.models.blocks import BlockShape, BlockStack, BlockWeights, ParallelBlockWeights
from alula.models.layers import WeightModule

__all__ = ["PackedHead", "PackedStack", "Watch", "changed_too_far"]


# Cross-attention stays in transformers; BigBird's blocks are bound with its layer norm all the same.
_CROSS, _CROSS_NORM = ("crossattention.", "ln_cross_attn."), "crossattention.output."
_ALIGNMENT, _LARGE_PAGE = 4096, 2 << 20
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

    def changed(self) -> bool:
        """Whether a parameter or submodule is another object, or a parameter lies elsewhere or was written in place."""
        now = [parameter for owner in self._owners for parameter in owner.values()]
        children = [child for parent in self._parents for child in parent.values()]
        return (
            len(now) != len(self._parameters)
            or len(children) != len(self._children)
            or not all(map(operator.is_, now, self._parameters))
            or not all(map(operator.is_, children, self._children))
            or list(map(_VERSION, self._counted)) != self._versions
            or list(map(Tensor.data_ptr, self._given)) != self._pointers
        )


def changed_too_far(module: nn.Module, why: str) -> NotReplaceable:
    """The error for a module that alula ran and cannot run any more."""
    return NotReplaceable(
        f"an accelerated {type(module).__name__} was changed into what alula cannot run: {why}. Undo that, or call "
        "alula.integrations.transformers.restore(model)"
    )


class PackedStack:
    """The blocks of a model as alula's loops over blocks take them.

    Attributes:
        blocks: per block the bound tensors. shape: their sizes. dtype: of all. engine: alula's model that owns the
            packed tensors (it has no embeddings of its own).
    """

    engine: PreTrainedModel
    shape: BlockShape
    dtype: torch.dtype

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.family = family
        self.pack(module)

    def pack(self, module: nn.Module) -> None:
        """Packs every block. NotReplaceable, with nothing changed, where the model is not what alula computes."""
        dtype = dtype_of(module, self.family)
        engine = self.family.engine(engine_config(module, self.family), dtype=dtype, init_weights=False)
        inspect_stack(module, self.family, engine)
        blocks, memory = [], None
        pairs = list(zip(self.family.blocks(module), self.family.blocks(engine), strict=True))
        with torch.inference_mode(False), torch.no_grad():
            for pair in pairs:
                bound = self._pack_block(*pair)
                memory = memory or _Memory(bound, len(pairs))
                blocks.append(type(bound)(*map(memory.take, bound)))
        self.engine, self.shape, self.dtype = engine, engine._shape, dtype
        self.blocks = _bound(blocks, self.shape)
        self.watch(module)

    def watch(self, module: nn.Module) -> None:
        """Takes the module as it is now for what is packed."""
        blocks = self.family.blocks(module)
        self._container = blocks
        self._watches = [Watch(block.modules()) for block in blocks]
        self._watch_all = Watch(blocks.modules())

    @staticmethod
    def _pack_block(block: nn.Module, counterpart: nn.Module) -> tuple:
        parameters = dict(block.named_parameters())
        for name, slot in counterpart.weight_slots().items():
            if not name.startswith(_CROSS) or name.startswith(_CROSS_NORM):
                _share_or_write(slot.module, slot.name, parameters[name])
        bound = counterpart.bind()
        for owner in counterpart.modules():
            if isinstance(owner, WeightModule):
                owner._data.clear()  # the bound tensors are all that is needed
        return bound

    def follow(self, module: nn.Module) -> bool:
        """Packs again what changed; whether something had."""
        blocks = self.family.blocks(module)
        if blocks is self._container and not self._watch_all.changed():
            return False
        stale = [index for index, watch in enumerate(self._watches) if watch.changed()]
        try:
            in_blocks = blocks is self._container and 0 < len(stale) < len(self._watches) == len(blocks)
            self._repack(module, stale) if in_blocks else self.pack(module)
        except NotReplaceable as error:
            raise changed_too_far(module, str(error)) from error
        return True

    def _repack(self, module: nn.Module, stale: list[int]) -> None:
        inspect_stack(module, self.family, self.engine)
        if dtype_of(module, self.family) != self.dtype:
            self.pack(module)
            return
        blocks = list(self.blocks)
        modules, counterparts = self.family.blocks(module), self.family.blocks(self.engine)
        with torch.inference_mode(False), torch.no_grad():
            for index in stale:
                pairs = zip(self._pack_block(modules[index], counterparts[index]), blocks[index], strict=True)
                moved = (_move(new, there) for new, there in pairs)
                blocks[index] = type(blocks[index])(*moved)
        self.blocks = _bound(blocks, self.shape)
        self.watch(module)

    @property
    def nbytes(self) -> int:
        """Bytes of the copies: what is shared with the module is not counted."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block if isinstance(tensor, ops.PackedWeight))


def _move(new: Any, there: Any) -> Any:
    """A matrix in the memory of the one before it; anything else as it is."""
    return there._replace(data=there.data.copy_(new.data)) if isinstance(new, ops.PackedWeight) else new


class _Memory:
    """One stretch of memory for the packed matrices of all blocks, in the order in which a pass reads them.

    It is fresh from the system and asks for large pages: matrices that come one by one land in memory that loading a
    model has left behind, in small pages (a step through CodeGen-350M's blocks in bf16 took a tenth longer there).
    """

    def __init__(self, first: tuple[Any, ...], blocks: int) -> None:
        total = blocks * sum(self._size(tensor) for tensor in first if isinstance(tensor, ops.PackedWeight))
        self._bytes = torch.empty(total, dtype=torch.uint8)
        self._used = 0
        begin = -(-self._bytes.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        length = (self._bytes.data_ptr() + total) // _LARGE_PAGE * _LARGE_PAGE - begin
        if length > 0 and sys.platform == "linux":  # a wish: failing is fine
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)

    @staticmethod
    def _size(weight: ops.PackedWeight) -> int:
        return -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT

    def take(self, tensor: Any) -> Any:
        """A matrix moved here; anything else as it is."""
        if not isinstance(tensor, ops.PackedWeight):
            return tensor
        place = self._bytes[self._used : self._used + tensor.nbytes].view(tensor.data.dtype).view(tensor.data.shape)
        self._used += self._size(tensor)
        return tensor._replace(data=place.copy_(tensor.data))


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
    """The output projection [V, E] of a language model, packed."""

    def __init__(self, module: nn.Linear) -> None:
        self.pack(module)

    def pack(self, module: nn.Linear) -> None:
        with torch.no_grad():
            self.weight = ops.pack(module.weight.detach())
        self._watch = Watch([module])

    def changed(self) -> bool:
        """Whether the weight is no longer what was packed."""
        return self._watch.changed()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes
