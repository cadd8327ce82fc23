"""What a quantized model is: its format, as config.json has it under ``quantization_config``, and its report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from alula.packed_weight import ACTIVATION_MODES, FORMATS, format_code

__all__ = ["QuantizationConfig", "QuantizationReport", "QuantizationRow"]

QUANTIZED_FORMATS = tuple(name for name in FORMATS if name != "dense")
METHOD = "alula"  # quant_method in config.json
_HINTS = {  # quant_method of other libraries -> how to get at plain weights
    "bitsandbytes": "save the model that was quantized in float16 or bfloat16 instead, or load it in transformers and "
    "save model.dequantize()",
    "gptq": "load the original checkpoint, which was quantized to it",
    "awq": "load the original checkpoint, which was quantized to it",
}
_NAMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}


@dataclass(frozen=True)
class QuantizationConfig:
    """How a model's matrices are stored.

    Attributes:
        format: "int8", "int4", "int4_asymmetric" or "nf4", see :func:`alula.ops.pack`.
        group_size: K per scale; 0 for int8, which has a scale for each output row.
        activations: "int8" or "full".
        keep: names of the matrices that stay as they are.
    """

    format: str
    group_size: int
    activations: str = "int8"
    keep: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        format: str,
        group_size: int | None = None,
        keep: str | Iterable[str] = (),
        activations: str | None = None,
    ) -> QuantizationConfig:
        """From what a user says; ``group_size`` None is the format's default. ValueError for what no format has."""
        if not isinstance(format, str) or format not in QUANTIZED_FORMATS:
            raise ValueError(f"quantize={format!r}; accepted: {', '.join(QUANTIZED_FORMATS)}")
        names = (keep,) if isinstance(keep, str) else tuple(keep)
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"keep={keep!r}; accepted: names of modules, such as ['lm_head']")
        activations = "int8" if activations is None else activations
        code = format_code(format, group_size, activations)
        return cls(format, code >> 8, activations, names)

    @property
    def suffix(self) -> str:
        """What the names of packed tensors end in: "int8", "int4_64", ..."""
        return f"{self.format}_{self.group_size}" if self.group_size else self.format

    def to_dict(self) -> dict[str, Any]:
        """As it goes into config.json."""
        return {
            "quant_method": METHOD,
            "format": self.format,
            "group_size": self.group_size,
            "activations": self.activations,
            "modules_to_not_convert": list(self.keep),
        }

    @classmethod
    def from_dict(cls, values: Any, where: str | os.PathLike) -> QuantizationConfig:
        """From config.json's ``quantization_config``. ValueError for one of another library, naming it."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: quantization_config is a {type(values).__name__}, expected an object")
        method = values.get("quant_method")
        if method is None and ("load_in_8bit" in values or "load_in_4bit" in values):
            method = "bitsandbytes"
        if method != METHOD:
            hint = _HINTS.get(method, "load the checkpoint before it was quantized")
            raise ValueError(
                f"{where} was quantized by another library ({_NAMES.get(method, repr(method))}), whose weights alula "
                f"does not read; {hint}, and quantize that with alula (quantize=..., or `alula quantize`)"
            )
        try:
            return cls.of(
                values.get("format"),
                values.get("group_size"),
                values.get("modules_to_not_convert") or (),
                values.get("activations"),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: quantization_config cannot be read: {error}") from None

    @classmethod
    def of_arguments(
        cls,
        stored: QuantizationConfig | None,
        quantize: str | None,
        group_size: int | None,
        keep: str | Iterable[str],
        activations: str | None,
        where: str | os.PathLike,
    ) -> QuantizationConfig | None:
        """What from_pretrained is to do: ``stored`` is what the folder holds, the rest its arguments."""
        if quantize is None:
            if group_size is not None or keep:
                name = "keep" if group_size is None else "group_size"
                raise ValueError(f"{name} goes with quantize, one of {', '.join(QUANTIZED_FORMATS)}")
            if activations is None:
                return stored
            if stored is None:
                raise ValueError(f"activations={activations!r} goes with quantized weights; give quantize, too")
            return cls.of(stored.format, stored.group_size, stored.keep, activations)
        if stored is not None:
            raise ValueError(
                f"{where} is quantized already ({stored.suffix}), and cannot be quantized twice; leave quantize out, "
                "or give the original checkpoint"
            )
        return cls.of(quantize, group_size, keep, activations)


@dataclass(frozen=True)
class QuantizationRow:
    """One matrix: ``shape`` is [N, K] as stored, ``bytes`` what it takes, ``relative_error`` the Frobenius norm of what
    quantizing changed over that of the matrix (None: not known, the matrix was set since)."""

    layer: str
    format: str
    shape: tuple[int, int]
    bytes: int
    relative_error: float | None


class QuantizationReport:
    """The matrices of a model, and the sum of them and of what is not a matrix. ``print`` gives a table."""

    def __init__(self, rows: list[QuantizationRow], other_bytes: int, dense_bytes: int) -> None:
        self.rows = rows
        self.other_bytes = other_bytes  # layer norms, biases, positions
        self.dense_bytes = dense_bytes  # of the same model, not quantized

    @property
    def total_bytes(self) -> int:
        return sum(row.bytes for row in self.rows) + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(row) for row in self.rows],
            "other_bytes": self.other_bytes,
            "total_bytes": self.total_bytes,
            "dense_bytes": self.dense_bytes,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [("layer", "format", "shape", "bytes", "relative error")]
        for row in self.rows:
            error = "-" if row.relative_error is None else f"{row.relative_error:.5f}"
            lines.append((row.layer, row.format, f"{row.shape[0]} x {row.shape[1]}", f"{row.bytes}", error))
        lines.append(("layer norms, biases, positions", "", "", f"{self.other_bytes}", ""))
        share = self.total_bytes / max(1, self.dense_bytes)
        lines.append(("total", f"{share:.3f} of {self.dense_bytes}", "", f"{self.total_bytes}", ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            cells = [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
            cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
            text.append("  ".join(cells).rstrip())
        return "\n".join(text)

    __repr__ = __str__


def check_activations(activations: str) -> str:
    """``activations`` itself if there is such a mode, else ValueError."""
    if activations not in ACTIVATION_MODES:
        raise ValueError(f"unknown activations {activations!r}; accepted: {', '.join(ACTIVATION_MODES)}")
    return activations
