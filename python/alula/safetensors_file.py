"""One safetensors file: read through a memory map whose pages can be given back, written tensor by tensor.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data. The
header is not trusted: every offset is checked against the file, the shape and its neighbours before a byte is read.
Reading here, and not with the safetensors package, is for memory: a tensor's pages leave the process once it is packed,
and a file is written without a second copy of the model.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SafetensorsFile", "TensorInfo", "refuse_pointer", "write_safetensors"]

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors package

_POINTER = b"version https://git-lfs"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """What a file says of a tensor. ``start`` and ``end`` are byte offsets in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def refuse_pointer(path: Path) -> None:
    """ValueError for what a clone without Git LFS has in place of a large file."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


class SafetensorsFile:
    """A safetensors file, mapped. ValueError, naming file and tensor, if anything in its header cannot be true."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        refuse_pointer(self.path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.tensors, self.metadata = self._parse(file, size)
            # A private, writable map: PyTorch takes no read-only memory. Nothing ever writes to it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the map (a copy only where the file has it misaligned)."""
        dtype, shape, start, end = self.tensors[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=end - start, offset=start)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start).view(shape)

    def release(self, name: str) -> None:
        """Gives the pages of a tensor back to the system; they are read again from the file if touched again."""
        info = self.tensors[name]
        if hasattr(mmap, "MADV_DONTNEED") and info.nbytes:
            first = info.start - info.start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, info.end - first)

    # --- the header -----------------------------------------------------------------------------------------

    def _fail(self, problem: str) -> ValueError:
        return ValueError(f"{self.path} is not a valid safetensors file: {problem}")

    def _parse(self, file, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if size < 8:
            raise self._fail(f"it has {size} bytes, fewer than the 8 of the header length")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER or length > size - 8:
            raise self._fail(f"its header claims {length} bytes, the file has {size} (truncated, or another format)")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=self._unique)
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            if str(error).startswith(str(self.path)):
                raise
            raise self._fail(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._fail("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise self._fail("__metadata__ is not a JSON object")
        data = 8 + length
        tensors = {name: self._entry(name, entry, data, size) for name, entry in header.items()}
        end, before = data, "the header"
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if info.start != end:
                what = "overlaps" if info.start < end else "leaves a hole after"
                raise self._fail(f"tensor {name!r} at bytes {info.start - data}..{info.end - data} {what} {before}")
            end, before = info.end, repr(name)
        if end != size:
            raise self._fail(f"{size - end} bytes after the last tensor belong to no tensor")
        return tensors, metadata

    def _unique(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise self._fail(f"its header has the key {twice!r} twice")
        return result

    def _entry(self, name: str, entry: object, data: int, size: int) -> TensorInfo:
        def natural(values: object) -> bool:
            return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self._fail(f"the entry of tensor {name!r} lacks dtype, shape or data_offsets")
        dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise self._fail(f"tensor {name!r} has dtype {entry['dtype']!r}; accepted: {', '.join(_DTYPES)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not natural(shape):
            raise self._fail(f"tensor {name!r} has shape {shape!r}")
        if not natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._fail(f"tensor {name!r} has data_offsets {offsets!r}")
        start, end = data + offsets[0], data + offsets[1]
        if end > size:
            raise self._fail(
                f"tensor {name!r} ends at byte {end}, but the file has {size} (truncated, or a header that lies)"
            )
        if math.prod(shape) * dtype.itemsize != end - start:
            raise self._fail(
                f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} needs "
                f"{math.prod(shape) * dtype.itemsize} bytes, its data_offsets hold {end - start}"
            )
        return TensorInfo(dtype, tuple(shape), start, end)


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file holding the named tensors in the order given. ``read(name)`` is called once for each, when its turn
    comes, and the result is dropped once written. The data begins at a multiple of 64 bytes, a cache line."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in header:
            if name != "__metadata__":
                file.write(read(name).contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
