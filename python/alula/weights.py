"""Checkpoint folders: finding the files, matching names, loading with little memory, saving.

Files are looked for in this order: model.safetensors, model.safetensors.index.json (+ shards), pytorch_model.bin,
pytorch_model.bin.index.json. A model is loaded by packing one tensor after another out of a memory map and giving its
pages back, so the process holds little more than the packed model.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from alula.config import read_json
from alula.safetensors_file import SafetensorsFile, TensorInfo, refuse_pointer, write_safetensors

__all__ = [
    "Checkpoint",
    "RenamedSource",
    "StateDictSource",
    "TensorSource",
    "check_dtype",
    "load_weights",
    "save_weights",
]

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def check_dtype(dtype: torch.dtype, what: str = "dtype") -> torch.dtype:
    """``dtype`` itself if weights may have it, else ValueError."""
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{what} {dtype} is not supported; accepted: float32, bfloat16, float16")
    return dtype


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    def names(self) -> list[str]: ...
    def info(self, name: str) -> TensorInfo: ...
    def read(self, name: str) -> Tensor: ...
    def release(self, name: str) -> None: ...


class StateDictSource:
    """A dict of tensors as a :class:`TensorSource`."""

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "the state dict") -> None:
        self.path = label
        self._tensors = dict(tensors)
        for name, tensor in self._tensors.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{label}: {name!r} is a {type(tensor).__name__}, expected a tensor")

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.dtype.itemsize)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def release(self, name: str) -> None:
        pass


class RenamedSource:
    """A source under other names: ``present`` maps new names to the source's own; the rest keep theirs."""

    def __init__(self, source: TensorSource, present: Mapping[str, str]) -> None:
        self.path = source.path
        self.absent = getattr(source, "absent", {})
        self._source = source
        old = set(present.values())
        self._names = {name: name for name in source.names() if name not in old}
        for name, own in present.items():
            if name in self._names:
                raise ValueError(f"{self.path} has both {name!r} and {own!r}, which are one weight")
            self._names[name] = own

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        return self._source.info(self._names[name])

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])

    def release(self, name: str) -> None:
        self._source.release(self._names[name])


def _unpickling_problem(error: Exception) -> str:
    """What was wrong, without PyTorch's advice to load the file without its safeguard."""
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found:
        return (
            f"it holds a {found[1]}, and alula runs no code of a checkpoint. If you trust the file, load it with its "
            "own library and save the weights alone: torch.save(model.state_dict(), path)"
        )
    if "Unsupported operand" in text:
        return "it is no file of torch.save"
    return text.splitlines()[0] if text else type(error).__name__


class TorchFile(StateDictSource):
    """A pytorch_model.bin, mapped where its format allows it. Only tensors are unpickled (``weights_only``)."""

    def __init__(self, path: Path) -> None:
        refuse_pointer(path)
        self._mapped = True
        try:
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
                self._mapped = False
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as tensors only: {_unpickling_problem(error)}") from None
        if not isinstance(tensors, Mapping):
            raise ValueError(f"{path} holds a {type(tensors).__name__}, expected a dict of tensors")
        super().__init__(tensors, str(path))

    def release(self, name: str) -> None:
        tensor = self._tensors.pop(name)
        if self._mapped and tensor.is_contiguous() and hasattr(mmap, "MADV_DONTNEED"):
            # Private pages that nothing wrote to: dropping them loses nothing.
            first = tensor.data_ptr() - tensor.data_ptr() % mmap.PAGESIZE
            length = tensor.data_ptr() + tensor.nbytes - first
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


class Checkpoint:
    """All tensors of a checkpoint folder, one :class:`TensorSource` over one or many files."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder (alula reads local folders; it downloads nothing)")
        self._where: dict[str, SafetensorsFile | TorchFile] = {}
        self.absent: dict[str, str] = {}  # listed in the index, not in the shard: name -> shard
        for name, open_file in ((SINGLE, SafetensorsFile), (BIN_SINGLE, TorchFile)):
            index = INDEX if name == SINGLE else BIN_INDEX
            if (self.path / name).is_file():
                file = open_file(self.path / name)
                self._where = dict.fromkeys(file.names(), file)
                return
            if (self.path / index).is_file():
                self._open_shards(self.path / index, open_file)
                return
        raise FileNotFoundError(f"{folder} has no weights; looked for {SINGLE}, {INDEX}, {BIN_SINGLE} and {BIN_INDEX}")

    def _open_shards(self, index: Path, open_file: type) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        files: dict[str, SafetensorsFile | TorchFile] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+", shard) or shard in (".", ".."):
                raise ValueError(
                    f"{index} places {name!r} in {shard!r}; accepted: the plain name of a file in the same folder"
                )
            if shard not in files:
                if not (self.path / shard).is_file():
                    raise FileNotFoundError(f"{self.path / shard} is missing; {index.name} places {name!r} in it")
                files[shard] = open_file(self.path / shard)
        for name, shard in weight_map.items():
            if name in files[shard].names():
                self._where[name] = files[shard]
            else:
                self.absent[name] = shard
        for shard, file in files.items():  # tensors that the index forgot
            for name in file.names():
                if name in self.absent:
                    raise ValueError(f"{index} places {name!r} in {self.absent[name]}, but it is in {shard}")
                self._where.setdefault(name, file)

    def names(self) -> list[str]:
        return list(self._where)

    def info(self, name: str) -> TensorInfo:
        return self._where[name].info(name)

    def read(self, name: str) -> Tensor:
        return self._where[name].read(name)

    def release(self, name: str) -> None:
        self._where[name].release(name)

    def metadata_objects(self, key: str) -> dict[str, Any]:
        """The JSON objects under ``key`` in the files' metadata as one; what is none is left out."""
        found: dict[str, Any] = {}
        for file in dict.fromkeys(self._where.values()):
            try:
                value = json.loads(file.metadata[key]) if isinstance(file, SafetensorsFile) else {}
            except (KeyError, TypeError, ValueError):
                continue
            found |= value if isinstance(value, dict) else {}
        return found

    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights' bytes; float32 for a checkpoint without floating-point tensors."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.names():
            info = self.info(name)
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=sizes.get) if sizes else torch.float32


# --- loading --------------------------------------------------------------------------------------------


class LoadReport:
    """Names that had no counterpart: ``missing`` in the source, ``unexpected`` in the model."""

    def __init__(self, missing: list[str], unexpected: list[str]) -> None:
        self.missing, self.unexpected = missing, unexpected


class _Match:
    """Which tensor of the source fills which of the model's, decided before anything is read."""

    def __init__(self, model: Any, source: TensorSource, loaded: Collection[str]) -> None:
        prefix = model.base_model_prefix + "."
        slots = {name: slot for name, slot in model.weight_slots().items() if name not in loaded}
        by_short = {name.removeprefix(prefix): name for name in slots}
        aliases = {a.removeprefix(prefix): target.removeprefix(prefix) for a, target in model.tied_aliases().items()}
        found: dict[str, str] = {}
        self.unexpected: list[str] = []
        self.alias_names: dict[str, str] = {}  # tied alias in the source -> short name of what it repeats
        for name in source.names():
            short = name.removeprefix(prefix)
            if short in found:
                raise ValueError(f"{source.path} has both {found[short]!r} and {name!r}, which are one weight")
            if short in by_short:
                found[short] = name
            elif short in aliases:
                self.alias_names[name] = aliases[short]
            elif not model.is_ignored_tensor(short):
                self.unexpected.append(name)
        for name, short in list(self.alias_names.items()):
            if short not in found:  # only the alias was saved: it is the weight
                found[short] = name
                del self.alias_names[name]
        self.pairs = {by_short[short]: name for short, name in found.items()}
        self.duplicates = {name: found[short] for name, short in self.alias_names.items()}
        self.missing = [name for name in slots if name not in self.pairs]
        self._check(slots, source)

    def _check(self, slots: Mapping[str, Any], source: TensorSource) -> None:
        problems = []
        for target, name in self.pairs.items():
            info = source.info(name)
            expected = slots[target].shape
            if info.dtype not in WEIGHT_DTYPES:
                problems.append(f"{name} has dtype {info.dtype}, accepted: float32, bfloat16, float16")
            if info.shape != expected:
                problems.append(f"{name} has shape {list(info.shape)}, the configuration asks for {list(expected)}")
        for name, kept in self.duplicates.items():
            if source.info(name).shape != source.info(kept).shape:
                problems.append(
                    f"{name} has shape {list(source.info(name).shape)}, but is tied to {kept} of shape "
                    f"{list(source.info(kept).shape)}"
                )
        if problems:
            raise ValueError(f"{source.path} does not fit the model:\n  " + "\n  ".join(problems))


def load_weights(
    model: Any,
    source: TensorSource,
    dtype: torch.dtype,
    *,
    optional: Iterable[str] = (),
    strict: bool = False,
    loaded: Collection[str] = (),
) -> LoadReport:
    """Fills a model from a source, everything checked before the first weight changes.

    Args:
        model: has ``weight_slots()``, ``tied_aliases()``, ``is_ignored_tensor()``, ``base_model_prefix`` and
            ``weight_writer()``.
        source: the tensors. The base model's prefix may be there or not.
        dtype: what the weights become.
        optional: prefixes of names that may be missing (the heads of other tasks).
        strict: unexpected tensors are an error instead of a warning.
        loaded: names that have their values already.

    Raises ValueError naming every tensor that is missing, unexpected (``strict``), of a wrong shape or dtype.
    """
    match = _Match(model, source, loaded)
    missing = [name for name in match.missing if not name.startswith(tuple(optional) or "\0")]
    problems = []
    if missing:
        absent = getattr(source, "absent", {})
        names = [f"{n} (the index places it in {absent[n]}, which lacks it)" if n in absent else n for n in missing]
        problems.append("missing: " + ", ".join(names))
    if strict and match.unexpected:
        problems.append("unexpected: " + ", ".join(match.unexpected))
    if problems:
        raise ValueError(f"{source.path} does not fit {type(model).__name__}; " + "; ".join(problems))
    if match.unexpected:
        warnings.warn(
            f"{source.path}: tensors not used by {type(model).__name__}: {', '.join(match.unexpected)}", stacklevel=3
        )
    for name, kept in match.duplicates.items():
        if not torch.equal(source.read(name), source.read(kept)):
            warnings.warn(
                f"{source.path}: {name} differs from {kept}, to which it is tied; {kept} is used", stacklevel=3
            )
        source.release(name)

    # Largest first: while a big tensor is mapped and packed at once, little else is in memory yet.
    order = sorted(match.pairs, key=lambda target: -source.info(match.pairs[target]).nbytes)
    writer = model.weight_writer(dtype)
    for targets in _progress(writer.together(order)):
        writer.write({target: source.read(match.pairs[target]) for target in targets})
        for target in targets:
            source.release(match.pairs[target])
    return LoadReport(match.missing, match.unexpected)


def _progress(items: list[Any]) -> Iterator[Any]:
    """The items, behind a progress bar if standard error is a terminal, tqdm is there and it takes over 2 s."""
    if not sys.stderr.isatty():
        return iter(items)
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc="loading weights", unit="tensor", delay=2.0, leave=False))


# --- saving ---------------------------------------------------------------------------------------------


def parse_size(size: int | str) -> int:
    """Bytes from a number or a text such as "5GB", "200MB", "1GiB"."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = size if isinstance(size, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size={size!r}; accepted: a positive number of bytes or a text such as '5GB'")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into shards of at most ``limit`` bytes (a larger tensor has one of its own)."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def save_weights(
    slots: Mapping[str, Any],
    folder: str | os.PathLike,
    max_shard_size: int | str = "50GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ``{name: slot}`` as safetensors, in shards with an index where they pass ``max_shard_size``; each file has
    the ``metadata``.

    Everything is written under temporary names and renamed at the end; weight files of an earlier save are removed.
    """
    folder = Path(folder)
    limit = parse_size(max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    shards = plan_shards({name: slot.nbytes for name, slot in slots.items()}, limit)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    written: list[tuple[Path, Path]] = []
    try:
        for file_name, members in zip(names, shards, strict=True):
            temporary = folder / f".{file_name}.{os.getpid()}.tmp"
            written.append((temporary, folder / file_name))
            entries = [(name, slots[name].dtype, slots[name].shape) for name in members]
            write_safetensors(temporary, entries, lambda name: slots[name].read().cpu(), metadata or {})
        if count > 1:
            temporary = folder / f".{INDEX}.{os.getpid()}.tmp"
            written.append((temporary, folder / INDEX))
            temporary.write_text(_index_text(slots, names, shards), encoding="utf-8")
        for temporary, final in written:
            os.replace(temporary, final)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
    kept = {final.name for _, final in written}
    for file in folder.iterdir():
        if file.name not in kept and re.fullmatch(
            r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json", file.name
        ):
            file.unlink()


def _index_text(slots: Mapping[str, Any], names: list[str], shards: list[list[str]]) -> str:
    weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
    total = sum(slot.nbytes for slot in slots.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
