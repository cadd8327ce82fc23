"""Quantized matrices in a folder: written as they lie in memory, and mapped back.

On disk a matrix is one tensor of bytes under the names of its layers' weights joined by "+" and the format:
``transformer.h.0.attn.c_proj.weight.int4_64``.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alula.models.matrix import Matrix, matrices
from alula.packed_weight import PackedWeight, format_code, panel_bytes
from alula.quantization import QUANTIZED_FORMATS, QuantizationConfig
from alula.weights import Checkpoint

__all__ = ["ERRORS", "PackedSlot", "StoredMatrices", "stored_quantization"]

ERRORS = "alula.relative_errors"  # in the metadata of a safetensors file
_PACKED_NAME = re.compile(rf"(.+)\.((?:{'|'.join(QUANTIZED_FORMATS)})(?:_\d+)?)")


def stored_quantization(config: Any, checkpoint: Checkpoint) -> QuantizationConfig | None:
    """What a folder holds. ValueError for another library's format, and for packed tensors that config.json is silent
    about."""
    values = getattr(config, "quantization_config", None)
    if values is not None:
        return QuantizationConfig.from_dict(values, checkpoint.path)
    for name in checkpoint.names():
        if checkpoint.info(name).dtype == torch.uint8 and _PACKED_NAME.fullmatch(name):
            raise ValueError(
                f"{checkpoint.path} holds packed tensors ({name}), but its config.json has no quantization_config; "
                "write the folder again with `alula quantize`"
            )
    return None


class PackedSlot(NamedTuple):
    """A quantized matrix as :func:`alula.weights.save_weights` takes it."""

    matrix: Matrix
    dtype: torch.dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.stored().data.shape)

    @property
    def nbytes(self) -> int:
        return self.matrix.stored().nbytes

    def read(self) -> Tensor:
        return self.matrix.stored().data


class StoredMatrices:
    """The packed tensors of a folder, matched with a model before anything is taken; a source of the others.

    Args:
        model: with its formats set. source: the folder. quantization: what its config.json says.

    Raises ValueError naming every tensor that is packed otherwise, truncated, or there twice.
    """

    def __init__(self, model: Any, source: Checkpoint, quantization: QuantizationConfig) -> None:
        self.path, self.absent = source.path, source.absent
        self._source, self._quantization = source, quantization
        prefix = model.base_model_prefix + "."

        def short(name: str) -> str:
            return "+".join(part.removeprefix(prefix) for part in name.split("+"))

        packed: dict[str, tuple[str, str]] = {}  # short name of a matrix -> name and suffix in the folder
        self._plain = []
        for name in source.names():
            match = _PACKED_NAME.fullmatch(name)
            if match is None:
                self._plain.append(name)
            elif short(match[1]) in packed:
                raise ValueError(f"{self.path} has both {packed[short(match[1])][0]!r} and {name!r}, one matrix")
            else:
                packed[short(match[1])] = (name, match[2])
        plain = {short(name): name for name in self._plain}
        self._found: list[tuple[Matrix, str]] = []
        problems = []
        for matrix in matrices(model):
            name, suffix = packed.pop(short(matrix.name), (None, None))
            others = [plain[short(part)] for part in matrix.names if short(part) in plain]
            if name is None:
                if matrix.is_quantized and others:
                    problems.append(f"{others[0]} is not packed, and config.json says {quantization.suffix}")
            elif others:
                problems.append(f"{name} is packed, and there is also {others[0]}")
            elif not matrix.is_quantized:
                problems.append(f"{name} is packed, and config.json says that it is not")
            elif suffix != quantization.suffix:
                problems.append(f"{name} is {suffix}, and config.json says {quantization.suffix}")
            else:
                problems += self._misfit(matrix, name)
                self._found.append((matrix, name))
        if problems:
            raise ValueError(
                f"{self.path} mixes or lacks packed tensors; write it again with `alula quantize`:\n  "
                + "\n  ".join(problems)
            )
        self.unexpected = [name for name, _ in packed.values()]
        self.loaded = {part for matrix, _ in self._found for part in matrix.names}

    def _misfit(self, matrix: Matrix, name: str) -> list[str]:
        info = self._source.info(name)
        rows, columns = matrix.shape
        code = format_code(self._quantization.format, self._quantization.group_size)
        expected = (-(-rows // 32), panel_bytes(code, columns))
        if info.dtype == torch.uint8 and info.shape == expected:
            return []
        return [f"{name} is {info.dtype} {list(info.shape)}, expected torch.uint8 {list(expected)} (truncated?)"]

    def load(self, dtype: torch.dtype) -> None:
        """Points the model's matrices at the mapped file; nothing is converted."""
        errors = self._source.metadata_objects(ERRORS)
        for matrix, name in self._found:
            layer = matrix.layers[0]
            code = format_code(*layer.format)
            packed = PackedWeight(self._source.read(name), *matrix.shape, code, dtype)
            error = errors.get(name)
            matrix.store(packed, error if isinstance(error, float) else None)

    # What is not packed, as a TensorSource.

    def names(self) -> list[str]:
        return self._plain

    def info(self, name: str) -> Any:
        return self._source.info(name)

    def read(self, name: str) -> Tensor:
        return self._source.read(name)

    def release(self, name: str) -> None:
        self._source.release(name)
