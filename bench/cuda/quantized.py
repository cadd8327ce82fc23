"""Cases of products with quantized weights, x in bf16: few rows (memory) and many (arithmetic).

The first peer is PyTorch's dense product with the values that the bytes stand for, in bf16: what is compared, and what
the smaller weight is to beat. PyTorch's own products with 8-bit and 4-bit weights, where this version has them on this
device, hold other bytes for the same matrix and are only timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from alula import ops
from torch import Tensor

from .timing import Bench, Case, Function

FORMATS = (("int8", None), ("int4", 64), ("int4_asymmetric", 64), ("nf4", None))
FEW = [(1, 2304, 2048), (1, 8192, 2048), (1, 2048, 8192), (1, 49280, 2048), (16, 8192, 2048)]  # rows, out, in
MANY = [(128, 8192, 2048), (2048, 8192, 2048)]


def cases(bench: Bench) -> list[Case]:
    """Every format at each shape."""
    shapes = bench.choose(FEW + MANY, [(1, 96, 128), (40, 96, 128)])
    return [_case(bench, *shape, *form) for shape in shapes for form in FORMATS]


def _case(bench: Bench, rows: int, n: int, k: int, format: str, group_size: int | None) -> Case:
    weight = torch.randn(n, k, device=bench.device) / k**0.5
    first = ops.pack(weight, format, group_size)
    nbytes = float(first.nbytes)
    count = bench.copies_of(nbytes)
    packed = [first, *(first._replace(data=first.data.clone()) for _ in range(count - 1))]
    dense = first.unpack(torch.bfloat16)
    copies = [dense, *(dense.clone() for _ in range(min(count, bench.copies_of(2.0 * n * k)) - 1))]
    x = bench.rand(rows, k)
    contestants: dict[str, Function] = {
        "alula": lambda i: ops.linear(x, packed[i]),
        "torch bf16": lambda i: F.linear(x, copies[i % len(copies)]),
    }
    make = {"int8": _torch_int8, "int4": _torch_int4}.get(format)
    if make is not None and bench.is_gpu:
        contestants[f"torch {format}"] = _made_at_first_call(lambda: make(weight, x, group_size, count))
    name = f"linear {rows}x{n}x{k} {format}{f' g{group_size}' if group_size else ''}"
    few = rows <= 16
    return Case(name, contestants, count, nbytes if few else 0.0, 0.0 if few else 2.0 * rows * n * k)


def _made_at_first_call(make: Callable[[], Function]) -> Function:
    made: list[Function] = []

    def call(i: int) -> Tensor:
        if not made:
            made.append(make())
        return made[0](i)

    return call


def _torch_int8(weight: Tensor, x: Tensor, group_size: int | None, count: int) -> Function:
    """A scale for each row."""
    scales = weight.abs().amax(1) / 127
    codes = (weight / scales.unsqueeze(1)).round().to(torch.int8)
    copies, scales = [codes.clone() for _ in range(count)], scales.to(torch.bfloat16)
    return lambda i: torch._weight_int8pack_mm(x, copies[i], scales)


def _torch_int4(weight: Tensor, x: Tensor, group_size: int, count: int) -> Function:
    """Scale and offset for each group of a row."""
    n, k = weight.shape
    scales = weight.view(n, -1, group_size).abs().amax(2) / 7
    codes = (weight.view(n, -1, group_size) / scales.unsqueeze(2)).round().clamp(-8, 7).view(n, k).to(torch.int32) + 8
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    copies = [packed.clone() for _ in range(count)]
    groups = torch.stack([scales, torch.zeros_like(scales)], dim=2).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda i: torch._weight_int4pack_mm(x, copies[i], group_size, groups)
