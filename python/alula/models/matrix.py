"""The matrices of a model as they are stored, and how each becomes a quantized one.

A matrix is what the kernels read as one: that of one layer, or several side by side (CodeGen's and BigBird's blocks
merge theirs), which are quantized together.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alula.gptq import SecondMoment, pack_calibrated
from alula.models.layers import DENSE, VERSION, PackedPart, WeightModule, share_merged
from alula.packed_weight import PackedWeight

__all__ = ["Matrix", "WeightWriter", "in_turn", "matrices"]

ERROR_ELEMENTS = 1 << 18  # dequantized at once where an error is measured


class Matrix(NamedTuple):
    """A matrix as it is stored. ``names``: of its layers' weights; ``dim``: 0, they lie below, 1, beside each other."""

    names: tuple[str, ...]
    layers: tuple[WeightModule, ...]
    dim: int

    @property
    def name(self) -> str:
        return "+".join(self.names)

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        sizes = [_rows_and_columns(layer) for layer in self.layers]
        total = sum(size[self.dim] for size in sizes)
        return (total, sizes[0][1]) if self.dim == 0 else (sizes[0][0], total)

    @property
    def is_quantized(self) -> bool:
        return self.layers[0].format != DENSE

    def stored(self) -> PackedWeight:
        """Of a quantized matrix."""
        weight = self.layers[0].stored("weight")
        return weight.merged if isinstance(weight, PackedPart) else weight

    def store(self, packed: PackedWeight, error: float | None) -> None:
        if len(self.layers) == 1:
            self.layers[0].store("weight", packed)
        else:
            share_merged(packed, self.dim, self.layers)
            VERSION.count += 1
        for layer in self.layers:
            layer.error = error

    def write(self, values: Sequence[Tensor], dtype: torch.dtype, inputs: SecondMoment | None = None) -> None:
        """Packs the layers' weights, given as checkpoints have them, for ``inputs`` where they are known; what is read
        out of it has ``dtype``."""
        with torch.inference_mode(False), torch.no_grad():
            parts = [layer._from_checkpoint(v.detach()) for layer, v in zip(self.layers, values, strict=True)]
            value = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
            try:
                if inputs is None:
                    packed = self.layers[0].format.pack(value)
                else:
                    packed = pack_calibrated(value, *self.layers[0].format, inputs.whole())
                packed = packed._replace(value_dtype=dtype)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{self.name} cannot be quantized: {error}") from None
            self.store(packed, relative_error(value, packed))
        del parts, value
        give_back_free_memory()


def give_back_free_memory() -> None:
    """Hands what was freed between two packed matrices back to the system, which the C library of Linux would keep."""
    if _trim is not None:
        _trim(0)


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _rows_and_columns(layer: WeightModule) -> tuple[int, int]:
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    return layer.num_embeddings, layer.embedding_dim


def relative_error(value: Tensor, packed: PackedWeight) -> float:
    """||dequantized - value|| / ||value|| in the Frobenius norm; a part at a time, so that it takes little memory."""
    off = total = 0.0
    panels = max(1, ERROR_ELEMENTS // (32 * packed.in_features))
    for first in range(0, packed.out_features, 32 * panels):
        rows = value[first : first + 32 * panels].float()
        part = packed.data[first // 32 : first // 32 + panels]
        found = PackedWeight(part, len(rows), packed.in_features, packed.code, torch.float32).unpack()
        total += float(rows.square().sum())
        off += float(found.sub_(rows).square_().sum())
    return (off / total) ** 0.5 if total else 0.0


def matrices(model: Any) -> list[Matrix]:
    """Every matrix of a model, in the order of its weights; a tied output projection is the table it is tied to."""
    names = {id(slot.module): name for name, slot in model.weight_slots().items() if slot.name == "weight"}
    groups = {}
    for module in model.modules():
        if hasattr(module, "merged_layers"):
            for dim, layers in module.merged_layers():
                group = Matrix(tuple(names[id(layer)] for layer in layers), tuple(layers), dim)
                groups.update(dict.fromkeys(group.names, group))
    found = {}
    for name, slot in model.weight_slots().items():
        if slot.name in slot.module._packed_names:
            matrix = groups.get(name) or Matrix((name,), (slot.module,), 0)
            found.setdefault(matrix.name, matrix)
    return list(found.values())


def in_turn(found: Sequence[Matrix], progress: Callable[[list[Matrix]], Iterable[Matrix]]) -> Iterator[Matrix]:
    """The matrices one after another, behind ``progress``. ValueError where it leaves one out or changes their order:
    a matrix that is passed over would stay dense in a model that says otherwise."""
    for matrix, given in itertools.zip_longest(found, progress(list(found))):
        if given is not matrix:
            raise ValueError(f"progress must give back all {len(found)} matrices that it was given, in their order")
        yield matrix


class WeightWriter:
    """Writes tensors of a checkpoint into a model: those that are quantized as one together."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._slots = model.weight_slots()
        self._dtype = dtype
        self._quantized = {name: m for m in matrices(model) if m.is_quantized for name in m.names}

    def together(self, names: Iterable[str]) -> list[list[str]]:
        """The names in their order, those of one matrix at the place of its first."""
        groups: dict[str, list[str]] = {}
        for name in names:
            matrix = self._quantized.get(name)
            groups.setdefault(name if matrix is None else matrix.name, []).append(name)
        return list(groups.values())

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Takes what one of :meth:`together` names; parts of a matrix that are not given stay what they are."""
        first = next(iter(values))
        matrix = self._quantized.get(first)
        if matrix is None:
            self._slots[first].write(values[first].to(self._dtype))
        else:
            given = [values[n] if n in values else self._slots[n].read() for n in matrix.names]
            matrix.write(given, self._dtype)
