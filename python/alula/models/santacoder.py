"""bigcode/santacoder's original checkpoint layout, read as GPTBigCode's."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from alula.safetensors_file import TensorInfo
from alula.weights import TensorSource

__all__ = ["SantaCoderSource", "is_santacoder"]


def is_santacoder(source: TensorSource) -> bool:
    """Whether the tensors are named as the original files name them."""
    return any(name.endswith(".attn.kv_attn.weight") for name in source.names())


class SantaCoderSource:
    """bigcode/santacoder's original files as GPTBigCode names them.

    There every matrix of a block lies as Conv1D has it, (in, out), and the query (``q_attn``) stands apart from the
    shared key and value (``kv_attn``).
    """

    _conv1d = re.compile(r".*\bh\.\d+\.(attn|mlp)\.\w+\.weight")

    def __init__(self, source: TensorSource) -> None:
        self.path = source.path
        self._source = source
        self._parts: dict[str, tuple[str, ...]] = {}  # our name -> names in the source
        for name in source.names():
            if ".attn.kv_attn." in name:
                continue
            if ".attn.q_attn." in name:
                kv_name = name.replace(".q_attn.", ".kv_attn.")
                if kv_name not in source.names():
                    raise ValueError(f"{self.path} has {name!r} and no {kv_name!r}")
                self._parts[name.replace(".q_attn.", ".c_attn.")] = (name, kv_name)
            else:
                self._parts[name] = (name,)

    def names(self) -> list[str]:
        return list(self._parts)

    def info(self, name: str) -> TensorInfo:
        infos = [self._source.info(part) for part in self._parts[name]]
        shapes = [self._turned(name, info.shape) for info in infos]
        rows = sum(shape[0] for shape in shapes if shape)
        return TensorInfo(infos[-1].dtype, (rows, *shapes[0][1:]), 0, sum(info.nbytes for info in infos))

    def read(self, name: str) -> Tensor:
        parts = [self._source.read(part) for part in self._parts[name]]
        if self._conv1d.fullmatch(name):
            parts = [part.T for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def release(self, name: str) -> None:
        for part in self._parts[name]:
            self._source.release(part)

    def _turned(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if self._conv1d.fullmatch(name) else shape
