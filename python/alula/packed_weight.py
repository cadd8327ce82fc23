"""Weights as the kernels read them: packed, dense or quantized.

The byte layout of each format stands in csrc/cpu/weight_format.h, its meaning in ``alula.testing.quantized``.

N output features, K input features, g group size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors

__all__ = ["ACTIVATION_MODES", "FORMATS", "PackedWeight", "format_code", "pack", "refuse_grad"]

# Name -> (code in csrc/cpu/weight_format.h, accepted group sizes, the default first).
FORMATS: dict[str, tuple[int, tuple[int, ...]]] = {
    "dense": (0, (0,)),
    "int8": (1, (0,)),
    "int4": (2, (64, 32, 128)),
    "int4_asymmetric": (3, (64, 32, 128)),
    "nf4": (4, (64,)),
}
_NAMES = list(FORMATS)
# "int8": activations are rounded to 8 bits per row and block of K and multiplied as integers, on the CPU alone; "full":
# as they are, which is what CUDA's kernels do in either mode.
ACTIVATION_MODES = ("int8", "full")


def format_code(format: str, group_size: int | None = None, activations: str = "int8") -> int:
    """What the ops take as ``format``: kind + 16 * (full activations) + 256 * group size.

    ValueError for an unknown format or activation mode, or a group size the format does not have.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown weight format {format!r}; accepted: {', '.join(FORMATS)}")
    kind, sizes = FORMATS[format]
    if activations not in ACTIVATION_MODES:
        raise ValueError(f"unknown activations {activations!r}; accepted: {', '.join(ACTIVATION_MODES)}")
    size = sizes[0] if group_size is None else group_size
    if size not in sizes:
        accepted = "none, it has no groups" if sizes == (0,) else ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"group_size {size} does not go with format {format!r}; accepted: {accepted}")
    if kind == 0:
        return 0
    return kind + 16 * (activations == "full") + 256 * size


class PackedWeight(NamedTuple):
    """A weight [N, K] in the layout the kernels read: panels of 32 output rows, input features outermost.

    ``data`` is opaque: its layout depends on the dtype, or, of a quantized weight, on ``code`` (uint8
    ``[ceil(N / 32), bytes of a panel]``). ``out_features`` is N, ``in_features`` is K. ``code`` says how the weight is
    stored and multiplied, see :func:`format_code`; 0 is dense. ``value_dtype`` is the dtype a quantized weight was made
    from: that of :meth:`unpack` and of rows read out of it. It multiplies activations of any dtype. A quantized weight
    has the same bytes on every device: ``packed._replace(data=packed.data.cuda())`` moves it.
    """

    data: Tensor
    out_features: int
    in_features: int
    code: int = 0
    value_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype if self.value_dtype is None else self.value_dtype

    @property
    def format(self) -> str:
        return _NAMES[self.code & 15]

    @property
    def group_size(self) -> int:
        """K per scale; 0: one scale for a row."""
        return self.code >> 8

    @property
    def activations(self) -> str:
        """ "int8" or "full", see ``ACTIVATION_MODES``; of a dense weight, and on CUDA, always "full"."""
        return "int8" if self.code and not self.code & 16 and not self.data.is_cuda else "full"

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def with_activations(self, activations: str) -> PackedWeight:
        """The same bytes, to be multiplied with activations "int8" or "full"."""
        if not self.code:
            raise ValueError("a dense weight is multiplied with full activations; pack it with another format first")
        return self._replace(code=format_code(self.format, self.group_size, activations))

    @raises_torch_errors
    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K]: dense, as it was packed, bit for bit; quantized, dequantized and rounded to ``dtype``
        (that of the weight it was made from)."""
        if self.code:
            return torch.ops.alula.dequantize_weight(
                self.data, self.out_features, self.in_features, self.code, dtype or self.dtype
            )
        weight = torch.ops.alula.unpack_weight(self.data, self.out_features, self.in_features)
        return weight if dtype is None else weight.to(dtype)


def refuse_grad(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    "alula has no backward yet: an input requires grad. "
                    "Call under torch.no_grad() or torch.inference_mode(), or detach() the input."
                )


@raises_torch_errors
def pack(
    weight: Tensor, format: str = "dense", group_size: int | None = None, *, activations: str = "int8"
) -> PackedWeight:
    """Pack a weight [N, K] (out, in; float32, bfloat16 or float16; any strides) for ``linear``, ``qkv_projection`` and
    ``embedding``.

    Args:
        format: "dense"; "int8", symmetric with an fp32 scale per output row; "int4", symmetric, and
            "int4_asymmetric", with fp16 scales (and least values) per group of K; "nf4" (Dettmers et al. 2023, QLoRA)
            with an fp16 scale per 64 of K.
        group_size: 32, 64 (the default) or 128 for the 4-bit integers; fixed for the others. A K that it does not
            divide is padded: the last group is shorter.
        activations: how a quantized weight is multiplied on the CPU: "int8", x rounded to 8 bits per row and group of K
            (256 for int8 weights), or "full", x as it is, more accurate and slower. On CUDA it is "full" always.

    A weight on CUDA is quantized on the CPU, to the same bytes, and these are copied back.

    Raises ValueError for an unknown format or group size; RuntimeError for a weight to be quantized that holds NaN,
    infinity, or values beyond the range of fp16 scales.
    """
    refuse_grad(weight)
    if weight.dim() != 2:
        raise ValueError(f"pack takes a weight of two dimensions [out, in], not shape {list(weight.shape)}")
    code = format_code(format, group_size, activations)
    if code == 0:
        return PackedWeight(torch.ops.alula.pack_weight(weight), weight.shape[0], weight.shape[1])
    data = torch.ops.alula.quantize_weight(weight, code)
    return PackedWeight(data, weight.shape[0], weight.shape[1], code, weight.dtype)


# --- shapes without data -------------------------------------------------------------------------------------------


def _packed_shape(n: int, k: int, dtype: torch.dtype, device: torch.device) -> list[int]:
    if device.type == "cuda":  # csrc/cuda/weight_layout.h
        step = 16 // dtype.itemsize
        return [n, (k + step - 1) // step * step]
    panels = (n + 31) // 32
    return [panels, (k + 1) // 2, 32, 2] if dtype == torch.bfloat16 else [panels, k, 32]


def panel_bytes(code: int, k: int) -> int:
    """Bytes of a panel of 32 rows of a quantized weight [N, K]."""
    kind, group = code & 15, code >> 8
    if kind == 1:
        return 128 + (k + 3) // 4 * 128
    return (k + group - 1) // group * ((128 if kind == 3 else 64) + group * 16)


@torch.library.register_fake("alula::pack_weight")
def _(weight):
    return weight.new_empty(_packed_shape(weight.shape[0], weight.shape[1], weight.dtype, weight.device))


@torch.library.register_fake("alula::unpack_weight")
def _(packed, out_features, in_features):
    return packed.new_empty([out_features, in_features])


@torch.library.register_fake("alula::quantize_weight")
def _(weight, format):
    n, k = weight.shape
    return weight.new_empty([(n + 31) // 32, panel_bytes(format, k)], dtype=torch.uint8)


@torch.library.register_fake("alula::dequantize_weight")
def _(packed, out_features, in_features, format, dtype):
    return packed.new_empty([out_features, in_features], dtype=dtype)
