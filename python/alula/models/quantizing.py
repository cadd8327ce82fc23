"""Quantized models: which matrices become what, written while loading or later, saved packed and mapped back.

A matrix is what the kernels read as one: that of one layer, or several side by side (CodeGen's and BigBird's blocks
merge theirs), which are quantized together. On disk it is one tensor of bytes, exactly as in memory, under the names of
its layers' weights joined by "+" and the format: ``transformer.h.0.attn.c_proj.weight.int4_64``.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alula.gptq import SecondMoment, pack_calibrated
from alula.models.calibrating import calibrate, check_calibration, rows_of
from alula.models.layers import DENSE, VERSION, PackedPart, WeightFormat, WeightModule, share_merged
from alula.packed_weight import PackedWeight, format_code, panel_bytes
from alula.quantization import (
    QUANTIZED_FORMATS,
    QuantizationConfig,
    QuantizationReport,
    QuantizationRow,
    check_activations,
)
from alula.weights import Checkpoint

__all__ = ["Quantizable", "StoredMatrices", "WeightWriter", "stored_quantization"]

LEAST_ROWS = 32  # a matrix with fewer output rows than a panel has stays as it is
ERROR_ELEMENTS = 1 << 18  # dequantized at once where an error is measured
_PACKED_NAME = re.compile(rf"(.+)\.((?:{'|'.join(QUANTIZED_FORMATS)})(?:_\d+)?)")
_ERRORS = "alula.relative_errors"  # in the metadata of a safetensors file


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


# --- folders -------------------------------------------------------------------------------------------------------


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
        errors = self._source.metadata_objects(_ERRORS)
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


def refuse_rounded_activations(activations: str | None, device: torch.device) -> None:
    """ValueError where 8-bit activations are asked for on a GPU, which does not round activations."""
    if activations == "int8" and device.type == "cuda":
        raise ValueError(
            f'activations "int8" are for the CPU; kernels on {device} never round activations: '
            'leave activations out, or say "full"'
        )


# --- models --------------------------------------------------------------------------------------------------------


class Quantizable:
    """What a model offers: :meth:`quantize`, :meth:`dequantize`, :meth:`quantization_report`."""

    config: Any

    @property
    def is_quantized(self) -> bool:
        return any(isinstance(m, WeightModule) and m.format != DENSE for m in self.modules())

    def weight_writer(self, dtype: torch.dtype) -> WeightWriter:
        return WeightWriter(self, dtype)

    def quantize(
        self,
        format: str = "int8",
        *,
        group_size: int | None = None,
        keep: str | Sequence[str] = (),
        activations: str = "int8",
        calibration: Tensor | Sequence[int] | None = None,
        progress: Callable[[list[Matrix]], Iterable[Matrix]] = iter,
    ) -> Any:
        """Quantizes the matrices in place, one after another, and gives the model back.

        Args:
            format: "int8", "int4", "int4_asymmetric" or "nf4", see :func:`alula.ops.pack`.
            group_size: 32, 64 (default) or 128, for int4 and int4_asymmetric.
            keep: modules that stay as they are, by their names or parts of them ("lm_head", "h.0", "mlp.c_proj");
                "embeddings" is the table of tokens. A tied output projection and its table are one; matrices that are
                stored as one are kept together.
            activations: "int8" rounds what is multiplied to 8 bits, too; "full" does not, and is slower. On a GPU
                activations are never rounded; the choice is kept for the CPU.
            calibration: token ids of a text, int64 [n] or [rows, n]: the 4-bit formats choose their codes for what the
                matrices multiply on it (GPTQ), see :func:`alula.calibration.calibration_ids`. At least as many tokens
                as the widest matrix has inputs. Takes minutes, and the memory of five float32 K x K matrices.
            progress: wraps the list of matrices.

        Layer norms, biases, positions and matrices with fewer than 32 output rows (heads with few labels) stay as they
        are. Raises ValueError for formats and names that there are not, for a model that is quantized already, and for
        a text, a format (int8) or a model (BigBird, cross-attention, on a GPU) that is not calibrated. After an error
        or an interrupt the matrices that were not reached are dense, as if kept.
        """
        if self.is_quantized:
            raise ValueError("the model is quantized already, and cannot be quantized twice; load the original again")
        quantization = QuantizationConfig.of(format, group_size, keep, activations)
        rows = None
        if calibration is not None:
            check_calibration(self, format)
            rows = rows_of(self, calibration)
        dtype = self.dtype
        self.base_model._bind()  # merges what is quantized as one
        self._set_formats(quantization)
        found = [matrix for matrix in matrices(self) if matrix.is_quantized]
        try:
            if rows is None:
                for matrix in progress(found):
                    matrix.write([layer.read("weight") for layer in matrix.layers], dtype)
            else:
                with torch.inference_mode(False), torch.no_grad():
                    calibrate(self, found, rows, dtype, progress)
        except BaseException:
            self._keep_dense(found)
            raise
        self.base_model._bind()
        return self

    def _keep_dense(self, found: Sequence[Matrix]) -> None:
        """Makes those of the matrices that are still dense ones that were to be kept."""
        dense = [matrix for matrix in found if not matrix.stored().code]
        for matrix in dense:
            for layer in matrix.layers:
                layer.format = DENSE
        values = self.config.quantization_config
        kept = [*values["modules_to_not_convert"], *(name for matrix in dense for name in matrix.names)]
        self.config.quantization_config = {**values, "modules_to_not_convert": kept}
        if not self.is_quantized:
            self._forget_quantization()

    def dequantize(self) -> Any:
        """Makes the matrices dense again, with the values that they stand for, rounded to the model's dtype."""
        for matrix in matrices(self):
            if matrix.is_quantized:
                values = [layer.read("weight") for layer in matrix.layers]
                for layer, value in zip(matrix.layers, values, strict=True):
                    layer.format, layer.error = DENSE, None
                    layer.write("weight", value)
        self._forget_quantization()
        return self

    def set_activations(self, activations: str) -> None:
        """Multiplies from now on with activations "int8" or "full"; the weights stay what they are. On a GPU, where
        activations are never rounded, "int8" is a ValueError."""
        if not self.is_quantized:
            raise ValueError("the model is not quantized: its activations are full")
        check_activations(activations)
        refuse_rounded_activations(activations, self.device)
        for matrix in matrices(self):
            if matrix.is_quantized:
                for layer in matrix.layers:
                    layer.format = layer.format._replace(activations=activations)
                matrix.store(matrix.stored().with_activations(activations), matrix.layers[0].error)
        self.config.quantization_config = {**self.config.quantization_config, "activations": activations}

    def quantization_report(self) -> QuantizationReport:
        """Layer, format, bytes and relative error of every matrix; ``print`` it for a table."""
        rows, dense = [], 0
        found = matrices(self)
        for matrix in found:
            shape, layer = matrix.shape, matrix.layers[0]
            size = shape[0] * shape[1] * self.dtype.itemsize
            dense += size
            if matrix.is_quantized:
                packed = matrix.stored()
                name = f"{packed.format}, groups of {packed.group_size}" if packed.group_size else packed.format
                rows.append(QuantizationRow(matrix.name, name, shape, packed.nbytes, layer.error))
            else:
                name = str(layer.dtype).removeprefix("torch.")
                rows.append(QuantizationRow(matrix.name, name, shape, size, 0.0))
        is_matrix = {name for matrix in found for name in matrix.names}
        other = sum(slot.nbytes for name, slot in self.weight_slots().items() if name not in is_matrix)
        return QuantizationReport(rows, other, dense + other)

    # --- for loading and saving -------------------------------------------------------------------------------------

    def _set_formats(self, quantization: QuantizationConfig, *, is_stored: bool = False) -> None:
        """Sets what every matrix is to become; ``is_stored``: ``keep`` has full names, perhaps of other classes."""
        found = matrices(self)
        kept = _kept(self, found, quantization.keep, is_stored)
        for matrix in found:
            if matrix.name not in kept and matrix.shape[0] >= LEAST_ROWS:
                for layer in matrix.layers:
                    layer.format = WeightFormat(quantization.format, quantization.group_size, quantization.activations)
        names = quantization.keep if is_stored else tuple(n for m in found if m.name in kept for n in m.names)
        self.config.quantization_config = {**quantization.to_dict(), "modules_to_not_convert": list(names)}

    def _forget_quantization(self) -> None:
        if getattr(self.config, "quantization_config", None) is not None:
            del self.config.quantization_config

    def _stored_slots(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What goes into safetensors, packed tensors first (so that all begin at multiples of 64 bytes), and the
        metadata beside it."""
        quantized = [matrix for matrix in matrices(self) if matrix.is_quantized]
        if not quantized:
            return self.weight_slots(), {}
        suffix = QuantizationConfig.from_dict(self.config.quantization_config, "the model").suffix
        slots: dict[str, Any] = {f"{matrix.name}.{suffix}": PackedSlot(matrix) for matrix in quantized}
        errors = {name: slot.matrix.layers[0].error for name, slot in slots.items()}
        packed = {name for matrix in quantized for name in matrix.names}
        slots.update((name, slot) for name, slot in self.weight_slots().items() if name not in packed)
        known = {name: error for name, error in errors.items() if error is not None}
        return slots, {_ERRORS: json.dumps(known)} if known else {}


def _kept(model: Any, found: list[Matrix], keep: Sequence[str], is_stored: bool) -> set[str]:
    """Names of the matrices that ``keep`` names. ValueError for a name that is none, unless it comes from a folder."""
    aliases = {alias.removesuffix(".weight"): name for alias, name in model.tied_aliases().items()}
    special = {"embeddings": model.get_input_embeddings()}
    head = model.get_output_embeddings()
    if head is not None:
        special["lm_head"] = head._source[0] if head.is_tied else head
    prefix = model.base_model_prefix + "."
    kept = set()
    for pattern in keep:
        wanted = f".{pattern.removeprefix(prefix)}."
        hits = {
            matrix.name
            for matrix in found
            for name, layer in zip(matrix.names, matrix.layers, strict=True)
            if layer is special.get(pattern)
            or wanted in f".{name}."
            or any(wanted in f".{alias}." for alias, target in aliases.items() if target == name)
        }
        if not hits and not is_stored:
            raise ValueError(
                f"keep names {pattern!r}, which is no matrix of {type(model).__name__}; accepted: embeddings, lm_head, "
                f"or names and parts of names such as {found[-1].names[-1].removesuffix('.weight')}"
            )
        kept |= hits
    return kept
