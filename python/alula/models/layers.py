"""The pieces models are made of: modules that own the tensors of a checkpoint.

A weight is stored the way the kernels read it (matrices packed, multi-head QKV rows regrouped) and is seen the way
its checkpoint has it: ``layer.weight`` and ``state_dict()`` give copies in the checkpoint's layout, bit for bit;
assignment and ``load_state_dict`` write. The module tree carries Hugging Face's names; the hot path does not walk it,
but runs over a flat list of tensors taken from it (models/blocks.py).

Alphabet: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head size, E model width, F MLP
width, V vocabulary, P positions, N output features, K input features.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from alula import ops
from alula.devices import checked_device
from alula.models.weight_copy import WeightCopy
from alula.ops import PackedWeight
from alula.weights import check_dtype

__all__ = ["QKV", "Conv1D", "Embedding", "LayerNorm", "Linear", "Module", "ModuleList", "PositionTable", "WeightSlot"]


class PackedPart(NamedTuple):
    """A weight that is a range of rows or of columns of a merged one, see :func:`merge_rows`."""

    merged: PackedWeight
    dim: int  # 0 rows, 1 columns
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.merged.nbytes * self.count // self.merged[1 + self.dim]

    @property
    def code(self) -> int:
        return self.merged.code

    def unpack(self) -> Tensor:
        return self.merged.unpack().narrow(self.dim, self.first, self.count).contiguous()

    def with_merged(self, **changes: Any) -> PackedPart:
        return self._replace(merged=self.merged._replace(**changes))


class WeightFormat(NamedTuple):
    """How matrices are stored, as :func:`alula.ops.pack` takes it."""

    format: str = "dense"
    group_size: int | None = None
    activations: str = "int8"

    def pack(self, value: Tensor) -> PackedWeight:
        return ops.pack(value, self.format, self.group_size, activations=self.activations)


DENSE = WeightFormat()


class _Version:
    """Counts changes of any weight of any model, so that flat lists of tensors know when they are out of date."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


VERSION = _Version()


class _OnDevice:
    """Copies tensors to devices; layers that share one (merged matrices) share its copy, too."""

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()  # original -> {device: copy}, neither kept alive

    def copy(self, data: Tensor, device: torch.device) -> Tensor:
        if data.device == device:
            return data
        copies = self._copies.setdefault(data, {})
        copy = copies[device]() if device in copies else None
        if copy is None:
            with torch.inference_mode(False):
                copy = data.to(device)
            copies[device] = weakref.ref(copy)
        return copy


_ON_DEVICE = _OnDevice()


class WeightSlot(NamedTuple):
    """One tensor of a checkpoint: where it lives and what it looks like there."""

    module: WeightModule
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.module.shapes[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.module.read(self.name)

    def write(self, value: Tensor) -> None:
        self.module.write(self.name, value)


class Module(nn.Module):
    """An nn.Module of an inference engine: parameters are copies that cannot be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            VERSION.count += 1

    def weight_slots(self, prefix: str = "") -> dict[str, WeightSlot]:
        """Every tensor of the checkpoint below this module, by full name, in the order of the modules."""
        slots = {}
        for path, module in self.named_modules(prefix=prefix):
            if isinstance(module, WeightModule):
                for name in module.shapes:
                    slots[f"{path}.{name}" if path else name] = WeightSlot(module, name)
        return slots

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and copies of the weights in the checkpoint's layout.

        Changing one of the copies in place or asking it for gradients raises, since neither could reach the model
        (:class:`WeightCopy`). Assign or ``load_state_dict`` to change weights.
        """
        for name, slot in self.weight_slots(prefix).items():
            if recurse or slot.module is self:
                yield name, slot.module.frozen(slot.name)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        if requires_grad:
            raise RuntimeError("alula has no backward yet: its weights cannot require grad")
        return self


class ModuleList(Module, nn.ModuleList):
    """nn.ModuleList of such modules."""

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        nn.ModuleList.__init__(self, modules)
        self.training = False


class WeightModule(Module):
    """A module that owns tensors of a checkpoint.

    Args:
        shapes: name -> shape in the checkpoint.
        packed: those of the names that are stored packed.
        dtype: of all of them.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], packed: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shapes = shapes
        self.dtype = dtype
        self.device = torch.device("cpu")
        self._packed_names = packed
        self.format = DENSE
        self.error: float | None = None  # relative, of what is quantized, where it is known
        self._data: dict[str, Tensor | PackedWeight | PackedPart] = {}

    def stored(self, name: str) -> Tensor | PackedWeight | PackedPart:
        """The tensor as the kernels read it. RuntimeError if it was never loaded."""
        try:
            return self._data[name]
        except KeyError:
            raise RuntimeError(f"{name} of this {type(self).__name__} has no values: load or initialise it") from None

    def read(self, name: str) -> Tensor:
        """A copy in the checkpoint's layout."""
        stored = self.stored(name)
        return self._to_checkpoint(stored.clone() if isinstance(stored, Tensor) else stored.unpack())

    def frozen(self, name: str) -> WeightCopy:
        """As :meth:`read`, but it refuses to be changed in place, and PyTorch to track its gradient."""
        with torch.inference_mode():
            return WeightCopy.of(self.read(name).clone() if name in self._packed_names else self.read(name))

    def write(self, name: str, value: Tensor) -> None:
        """Stores a tensor given in the checkpoint's layout and of this module's shape, a matrix in the module's
        ``format``; its dtype becomes the module's where it is the only one."""
        if tuple(value.shape) != self.shapes[name]:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(self.shapes[name])}")
        check_dtype(value.dtype, f"{name}: dtype")
        with torch.inference_mode(False), torch.no_grad():
            value = self._from_checkpoint(value.detach().to(self.device))
            self.store(name, self.format.pack(value) if name in self._packed_names else value.clone().contiguous())

    def store(self, name: str, stored: Tensor | PackedWeight | PackedPart) -> None:
        """Takes a tensor as the kernels read it."""
        self._data[name] = stored
        if name in self._packed_names:
            self.error = None
        dtype = stored.merged.dtype if isinstance(stored, PackedPart) else stored.dtype
        object.__setattr__(self, "dtype", dtype)
        VERSION.count += 1

    def _to_checkpoint(self, value: Tensor) -> Tensor:
        return value

    def _from_checkpoint(self, value: Tensor) -> Tensor:
        return value

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("shapes", ()):
            return self.frozen(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("shapes", ()):
            self.write(name, value.to(self.dtype))
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(shape)}" for name, shape in self.shapes.items())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self.shapes:
            destination[prefix + name] = self.read(name)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for name in self.shapes:
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                continue
            try:
                self.write(name, value.to(self.dtype))
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
        unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in self.shapes]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightModule:
        for child in self.children():
            child._apply(fn)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        device = checked_device(probe.device)
        if probe.dtype != self.dtype or device != self.device:
            check_dtype(probe.dtype)
            values, error = {}, self.error
            for name, stored in list(self._data.items()):
                if isinstance(stored, Tensor) or not stored.code:
                    values[name] = self.read(name).to(probe.dtype)
                    continue
                # What is quantized keeps its bytes, which are the same on every device.
                is_part = isinstance(stored, PackedPart)
                data = _ON_DEVICE.copy(stored.merged.data if is_part else stored.data, device)
                replace = stored.with_merged if is_part else stored._replace
                self.store(name, replace(data=data, value_dtype=probe.dtype))
                self.error = error
            object.__setattr__(self, "device", device)  # where write() packs
            for name, value in values.items():
                self.write(name, value)
            object.__setattr__(self, "dtype", probe.dtype)
            VERSION.count += 1
        return self


class Embedding(WeightModule):
    """Token table [V, E], packed, so that a tied output projection reads the very same memory."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__({"weight": (num_embeddings, embedding_dim)}, ("weight",), dtype)

    @property
    def num_embeddings(self) -> int:
        return self.shapes["weight"][0]

    @property
    def embedding_dim(self) -> int:
        return self.shapes["weight"][1]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows of the table: int64 [B, T] -> [B, T, E]."""
        return ops.embedding(input_ids, self.stored("weight"))


class PositionTable(WeightModule):
    """Position table [P, E], not packed: a few rows of it are read in a call."""

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__({"weight": (num_embeddings, embedding_dim)}, (), dtype)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.stored("weight")[position_ids]


class LayerNorm(WeightModule):
    """Weight and bias [E]. In a decoder block it runs inside the product that follows it."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__({"weight": (width,), "bias": (width,)}, (), dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.stored("weight"), self.stored("bias"), self.eps)


class Linear(WeightModule):
    """Weight [N, K] packed, optional bias [N]."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool = True) -> None:
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        if bias:
            shapes["bias"] = (out_features,)
        super().__init__(shapes, ("weight",), dtype)
        self.in_features, self.out_features = in_features, out_features

    def stored_bias(self) -> Tensor | None:
        return self.stored("bias") if "bias" in self.shapes else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.stored("weight")
        if isinstance(weight, PackedPart):
            weight = ops.pack(weight.unpack())
        return ops.linear(x, weight, self.stored_bias())


def merge_rows(*layers: Linear) -> PackedWeight:
    """The weights [N, K] of layers with one K as one [sum of N, K]; each then owns its range of it."""
    return _merge(0, layers)


def merge_columns(*layers: Linear) -> PackedWeight:
    """The weights [N, K] of layers with one N as one [N, sum of K]; each then owns its range of it."""
    return _merge(1, layers)


def _merge(dim: int, layers: Sequence[Linear]) -> PackedWeight:
    parts = [layer.stored("weight") for layer in layers]
    sizes = [(layer.out_features, layer.in_features)[dim] for layer in layers]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if all(isinstance(part, PackedPart) for part in parts):
        merged = parts[0].merged
        ranges = [(dim, start, size) for start, size in zip(starts, sizes, strict=True)]
        is_whole = merged[1 + dim] == sum(sizes) and [part[1:] for part in parts] == ranges
        if is_whole and all(part.merged.data is merged.data for part in parts):
            return merged
    with torch.inference_mode(False), torch.no_grad():
        merged = layers[0].format.pack(torch.cat([part.unpack() for part in parts], dim))
    if isinstance(merged.data, FakeTensor):
        raise RuntimeError("the first pass merges weights, which fake tensors do not let it: run the model before")
    share_merged(merged, dim, layers)
    return merged


def share_merged(merged: PackedWeight, dim: int, layers: Sequence[Linear]) -> None:
    """Gives each layer its range of a merged weight, of its rows (dim 0) or columns (1)."""
    start = 0
    for layer in layers:
        size = (layer.out_features, layer.in_features)[dim]
        layer._data["weight"] = PackedPart(merged, dim, start, size)
        layer.error = None
        object.__setattr__(layer, "dtype", merged.dtype)
        start += size


class Conv1D(Linear):
    """A :class:`Linear` whose checkpoint has the weight as (in, out), as GPT-2's has."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, dtype)
        self.shapes["weight"] = (in_features, out_features)

    def _from_checkpoint(self, value: Tensor) -> Tensor:
        return value.T if value.dim() == 2 else value

    def _to_checkpoint(self, value: Tensor) -> Tensor:
        return value.T.contiguous() if value.dim() == 2 else value


class QKV(Linear):
    """The query, key and value projections as one matrix with rows ``[q (H*D) | k (G*D) | v (G*D)]``.

    ``interleaved``: the checkpoint has rows (H, 3, D) instead, query, key and value of a head together (GPTBigCode's
    multi-head layout).
    """

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, interleaved: bool
    ) -> None:
        super().__init__(width, (num_heads + 2 * num_kv_heads) * head_dim, dtype)
        self.num_heads, self.head_dim, self.interleaved = num_heads, head_dim, interleaved

    def _from_checkpoint(self, value: Tensor) -> Tensor:
        if not self.interleaved:
            return value
        return value.unflatten(0, (self.num_heads, 3, self.head_dim)).transpose(0, 1).flatten(0, 2)

    def _to_checkpoint(self, value: Tensor) -> Tensor:
        if not self.interleaved:
            return value
        return value.unflatten(0, (3, self.num_heads, self.head_dim)).transpose(0, 1).flatten(0, 2)
