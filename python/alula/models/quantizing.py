"""What a model offers to have its matrices quantized, and which of them become what."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from alula.models.calibrating import calibrate, check_calibration, rows_of
from alula.models.layers import DENSE, WeightFormat, WeightModule
from alula.models.matrix import Matrix, WeightWriter, in_turn, matrices
from alula.models.stored_matrices import ERRORS, PackedSlot
from alula.quantization import QuantizationConfig, QuantizationReport, QuantizationRow, check_activations

__all__ = ["Quantizable", "refuse_rounded_activations"]

LEAST_ROWS = 32  # a matrix with fewer output rows than a panel has stays as it is


def refuse_rounded_activations(activations: str | None, device: torch.device) -> None:
    """ValueError where 8-bit activations are asked for on a GPU, which does not round activations."""
    if activations == "int8" and device.type == "cuda":
        raise ValueError(
            f'activations "int8" are for the CPU; kernels on {device} never round activations: '
            'leave activations out, or say "full"'
        )


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
            progress: wraps the list of matrices, as tqdm does; it must give back each of them in turn.

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
                for matrix in in_turn(found, progress):
                    matrix.write([layer.read("weight") for layer in matrix.layers], dtype)
            else:
                with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
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
        return slots, {ERRORS: json.dumps(known)} if known else {}


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
