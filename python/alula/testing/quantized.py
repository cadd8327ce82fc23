"""The meaning of quantized weights and of products with them, in plain PyTorch and float64.

A product with a quantized weight is the product with the dequantized weight (:func:`dequantize` reads the bytes as
csrc/cpu/weight_format.h has them), up to what the kernel rounds. With full activations that is what a dense product
rounds. With 8-bit activations each row x is cut into blocks b of K (the weight's group; 256 for int8) and becomes

    x^ = s_b * round(x / s_b),  s_b = max |x| in b / 127

so |x^ - x| <= s_b / 2 for each k, and the error of an output of the linear part is at most

    |sum_k w_k (x^_k - x_k)| <= sum_b s_b / 2 * sum_{k in b} |w_k|.                                            (1)

nf4 rounds its table too, to steps of 1/127 of a group's scale a_g, which adds at most

    sum_k |w^_k - w_k| |x^_k| <= sum_g a_g / 254 * sum_{k in g} |x^_k|.                                        (2)

:func:`activation_budget` is (1) + (2). An activation function multiplies it by its steepest slope, relu2, which has
none, by the sum of both values: :func:`through_activation`.
A block with NaN or infinity in it makes its whole row NaN.

N output features, K input features, g group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alula.packed_weight import PackedWeight

# Quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Bounds of the steepest slope of the functions of alula.activations, 1 where none is given. hardswish: (2 y + 3) / 6 at
# y = 3; laplace: 1 / (0.282095 sqrt(2 pi)) in the middle; those like gelu are steepest between 1 and 2.
STEEPEST_SLOPES = {
    "gelu": 1.13,
    "gelu_10": 1.13,
    "gelu_pytorch_tanh": 1.13,
    "silu": 1.1,
    "quick_gelu": 1.1,
    "mish": 1.09,
    "hardswish": 1.5,
    "laplace": 1.4143,
}


def block_size(packed: PackedWeight) -> int:
    """K that shares an activation's scale."""
    return packed.group_size or 256


def codes_and_scales(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """The stored integers [N padded to 32, K padded], scales and least values [N padded, K padded] (float64, a value
    for each weight), read byte by byte out of the panels."""
    panels = packed.data.shape[0]
    if packed.format == "int8":
        scale = packed.data[:, :128].contiguous().view(torch.float32)  # [panels, 32]
        codes = packed.data[:, 128:].reshape(panels, -1, 32, 4).transpose(1, 2).flatten(2)  # [panels, 32, K]
        scale = scale.double()[..., None].expand(codes.shape)
        return codes.flatten(0, 1).long(), scale.flatten(0, 1), torch.zeros_like(scale).flatten(0, 1)
    g, header = packed.group_size, 128 if packed.format == "int4_asymmetric" else 64
    groups = packed.data.view(panels, -1, header + g * 16)
    scale = groups[..., :64].contiguous().view(torch.float16)  # [panels, groups, 32]
    least = groups[..., 64:128].contiguous().view(torch.float16) if header == 128 else torch.zeros_like(scale)
    halves = groups[..., header:].reshape(panels, -1, g // 4, 16, 4)  # a byte: rows r (low half) and r + 16
    codes = torch.cat([halves & 15, halves >> 4], dim=3)  # [panels, groups, g / 4, 32, 4]
    codes = codes.permute(0, 3, 1, 2, 4).reshape(panels * 32, -1).long()

    def spread(x: Tensor) -> Tensor:
        return x.double().transpose(1, 2).reshape(panels * 32, -1).repeat_interleave(g, dim=1)

    return codes, spread(scale), spread(least)


def dequantize(packed: PackedWeight) -> Tensor:
    """The weight [N, K] in float64, exactly what the bytes mean, on their device."""
    codes, scale, least = codes_and_scales(packed)
    match packed.format:
        case "int8":
            w = (codes - 128) * scale
        case "int4":
            w = (codes - 8) * scale
        case "int4_asymmetric":
            w = codes * scale + least
        case "nf4":
            # The table is float32 in the kernels.
            w = torch.tensor(NF4, dtype=torch.float32, device=codes.device).double()[codes] * scale
        case _:
            raise ValueError(f"{packed.format} is not a quantized format")
    return w[: packed.out_features, : packed.in_features]


def levels(format: str) -> Tensor:
    """What the codes of a format stand for before scale and least value, float64, ascending."""
    match format:
        case "int8":
            return torch.arange(-127.0, 128.0, dtype=torch.float64)
        case "int4":
            return torch.arange(-8.0, 8.0, dtype=torch.float64)
        case "int4_asymmetric":
            return torch.arange(0.0, 16.0, dtype=torch.float64)
        case "nf4":
            return torch.tensor(NF4, dtype=torch.float32).double()
    raise ValueError(f"{format} is not a quantized format")


def nearest(weight: Tensor, scale: Tensor, least: Tensor, format: str) -> Tensor:
    """The value nearest to each weight [N, K] among those its scale [N, K] and least value [N, K] can make, float64."""
    w, at = weight.double(), levels(format)
    step = torch.where(scale == 0, 1.0, scale)
    above = torch.searchsorted(at, ((w - least) / step).contiguous()).clamp(1, len(at) - 1)
    below = above - 1
    values = [at[i] * scale + least for i in (below, above)]
    return torch.where((values[0] - w).abs() <= (values[1] - w).abs(), values[0], values[1])


def compensated(weight: Tensor, factor: Tensor, errors: Tensor) -> Tensor:
    """What each column of a group [N, c] had become when quantize_columns rounded it, float64: the errors of the
    columns before it, over the factor's diagonal as the op returns them, are taken out."""
    return weight.double() - errors.double() @ factor.double().triu(1)


def full_range(weight: Tensor, packed: PackedWeight) -> Tensor:
    """The weight [N, K] in the packed one's 4-bit format and group size, float64, with the scales (rounded to fp16)
    that everything in a group fits in: what a quantizer does that does not look for better ones."""
    k, g = weight.shape[1], packed.group_size
    padded = torch.nn.functional.pad(weight.double(), (0, -k % g), value=torch.nan).unflatten(1, (-1, g))
    low = padded.nan_to_num(torch.inf).amin(-1, keepdim=True)
    high = padded.nan_to_num(-torch.inf).amax(-1, keepdim=True)
    least = torch.zeros_like(low)
    if packed.format == "int4_asymmetric":
        scale, least = (high - low) / 15, low
    elif packed.format == "int4":
        scale = torch.where(-low >= high, low, high) / -8
    else:
        scale = torch.maximum(-low, high)
    scale, least = (t.half().double().expand(padded.shape).flatten(1)[:, :k] for t in (scale, least))
    return nearest(weight, scale, least, packed.format)


def round_activations(x: Tensor, packed: PackedWeight) -> Tensor:
    """x^ of the module's docstring: x [..., K] as 8-bit activations see it, float64. Rounds in float32 as the kernels
    do, so an x that is not normed first gives the very integers they use."""
    g, k = block_size(packed), x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -k % g)).unflatten(-1, (-1, g))
    largest = padded.abs().amax(-1, keepdim=True)
    # A tensor over a tensor: a number over a tensor is rounded twice, as a reciprocal and as a product.
    quotient = torch.where(largest > 2.0**-100, torch.full_like(largest, 127.0) / largest, 0.0)
    integers = (padded * quotient).round()
    rounded = integers.double() * (largest / 127.0).double()
    return rounded.flatten(-2)[..., :k]


def stored_table(packed: PackedWeight) -> Tensor:
    """The weight [N, K] as 8-bit activations meet it: nf4 has its table in steps of 1/127, others are exact."""
    if packed.format != "nf4":
        return dequantize(packed)
    codes, scale, _ = codes_and_scales(packed)
    table = (torch.tensor(NF4, dtype=torch.float64) * 127).round() / 127
    return (table[codes] * scale)[: packed.out_features, : packed.in_features]


def activation_budget(x: Tensor, packed: PackedWeight) -> Tensor:
    """(1) + (2) of the module's docstring: the largest error that 8-bit activations may cost each output, [..., N].

    x: [..., K], after the layer norm where there is one.
    """
    if packed.activations == "full":
        return torch.zeros(*x.shape[:-1], packed.out_features, dtype=torch.float64)
    g, k = block_size(packed), x.shape[-1]
    w = dequantize(packed).abs()
    padded = torch.nn.functional.pad(x.double(), (0, -k % g)).unflatten(-1, (-1, g))
    half_step = (padded.abs().amax(-1) / 127 / 2).repeat_interleave(g, dim=-1)[..., :k]
    budget = half_step @ w.T
    if packed.format == "nf4":
        scale = codes_and_scales(packed)[1][: packed.out_features, :k]
        budget = budget + (x.double().abs() + half_step) @ (scale / 254).T
    return budget


def through_activation(budget: Tensor, y: Tensor, activation: str) -> Tensor:
    """The largest error of activation(y), a name of :data:`alula.activations.FORMULAS`, where y may be wrong by
    ``budget``; all of one shape. relu2 is as steep as y is large: |a^2 - b^2| = |a - b| (a + b) for a, b >= 0."""
    if activation == "relu2":
        return budget * (2 * y.relu() + budget)
    return budget * STEEPEST_SLOPES.get(activation, 1.0)
