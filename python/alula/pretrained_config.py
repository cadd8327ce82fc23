"""What every family's configuration is made of: reading, checking and writing Hugging Face's keys.

A configuration keeps every key of its config.json, known or not, and writes all of them back. Values that cannot be
right (wrong types, numbers that contradict each other, features that no kernel has) are refused when it is made.
"""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import torch

from alula.activations import ACCEPTED, ACTIVATIONS

__all__ = ["PretrainedConfig", "parse_dtype", "read_json", "without_downloading"]

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
SUMMARY_TYPES = ("last", "first", "mean", "cls_index")
ATTENTION_TYPES = ("block_sparse", "original_full")


# Arguments of transformers' from_pretrained that are about what alula never does: downloading, and running code of a
# checkpoint.
_DOWNLOADING = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token", "trust_remote_code"}


def without_downloading(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a from_pretrained that are not about downloading, which is asked of folders in vain."""
    return {name: value for name, value in options.items() if name not in _DOWNLOADING}


def parse_dtype(dtype: torch.dtype | str, what: str = "dtype") -> torch.dtype:
    """A floating-point torch.dtype from itself or from its name; ValueError for anything else."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if isinstance(found, torch.dtype) and found.is_floating_point:
            return found
    elif isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise ValueError(f"{what}={dtype!r} is not a floating-point dtype; accepted: float32, bfloat16, float16")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError if there is none, ValueError if it is not a JSON object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


# kind of value -> (is it one, what is accepted)
# Sizes are counted in 32 bits by the kernels; positions have tables that are made with the model, of 8 bytes and more.
MAX_COUNT, MAX_POSITIONS = 2**31 - 1, 2**24

_KINDS = {
    "count": (lambda v: _is_int(v) and 0 < v <= MAX_COUNT, f"a positive integer up to {MAX_COUNT}"),
    "count?": (
        lambda v: v is None or (_is_int(v) and 0 < v <= MAX_COUNT),
        f"a positive integer up to {MAX_COUNT}, or null",
    ),
    "count or 0": (lambda v: _is_int(v) and 0 <= v <= MAX_COUNT, f"an integer that is not negative, up to {MAX_COUNT}"),
    "positions": (lambda v: _is_int(v) and 0 < v <= MAX_POSITIONS, f"a positive integer up to {MAX_POSITIONS}"),
    "id?": (lambda v: v is None or _is_int(v), "an integer or null"),
    "ids?": (
        lambda v: v is None or _is_int(v) or (isinstance(v, list) and all(map(_is_int, v))),
        "an integer, a list of integers or null",
    ),
    "bool": (lambda v: isinstance(v, bool), "true or false"),
    "bool?": (lambda v: v is None or isinstance(v, bool), "true, false or null"),
    "rate": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "rate?": (lambda v: v is None or (_is_number(v) and 0 <= v <= 1), "a number from 0 to 1, or null"),
    "positive": (lambda v: _is_number(v) and v > 0, "a positive number"),
    "scale": (lambda v: _is_number(v) and v >= 0, "a number that is not negative"),
    "activation": (
        lambda v: isinstance(v, str) and v in ACTIVATIONS,
        f"one of {ACCEPTED}",
    ),
    "activation?": (
        lambda v: v is None or (isinstance(v, str) and v in ACTIVATIONS),
        f"null or one of {ACCEPTED}",
    ),
    "attention": (lambda v: v in ATTENTION_TYPES, "one of " + ", ".join(ATTENTION_TYPES)),
    "summary": (lambda v: v in SUMMARY_TYPES, "one of " + ", ".join(SUMMARY_TYPES)),
    "problem?": (lambda v: v is None or v in PROBLEM_TYPES, "null or one of " + ", ".join(PROBLEM_TYPES)),
    "names?": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(n, str) for n in v)),
        "a list of class names or null",
    ),
}


class PretrainedConfig:
    """What every family's configuration shares. Subclasses give ``fields``: key -> (kind of value, default).

    Keyword arguments are the keys of config.json. Unknown ones are kept as attributes and written back. ``aliases``
    maps a common name to the family's own (``hidden_size`` -> ``n_embd``): both read and write the same value.
    """

    model_type: ClassVar[str] = ""
    fields: ClassVar[dict[str, tuple[str, Any]]] = {}
    aliases: ClassVar[dict[str, str]] = {}
    _common: ClassVar[dict[str, tuple[str, Any]]] = {
        "tie_word_embeddings": ("bool", True),
        "use_cache": ("bool", True),
        "return_dict": ("bool", True),
        "output_hidden_states": ("bool?", False),
        "output_attentions": ("bool?", False),
        "bos_token_id": ("id?", None),
        "eos_token_id": ("ids?", None),
        "pad_token_id": ("id?", None),
        "architectures": ("names?", None),
        "problem_type": ("problem?", None),
    }

    def __init__(self, **kwargs: Any) -> None:
        fields = {**self._common, **self.fields}
        given_type = kwargs.pop("model_type", self.model_type)
        if given_type != self.model_type:
            raise ValueError(
                f"{type(self).__name__} reads model_type {self.model_type!r}, but the configuration says {given_type!r}"
            )
        for alias, name in self.aliases.items():
            if alias in kwargs:
                value = kwargs.pop(alias)
                if kwargs.setdefault(name, value) != value:
                    raise ValueError(f"{alias}={value!r} and {name}={kwargs[name]!r} name one value but differ")
        for name, (_, default) in fields.items():
            setattr(self, name, kwargs.pop(name, default))

        legacy_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None)
        dtype = legacy_dtype if dtype is None else dtype
        self.dtype: torch.dtype | None = None if dtype is None else parse_dtype(dtype, "dtype in the configuration")
        self._set_labels(kwargs.pop("num_labels", None), kwargs.pop("id2label", None), kwargs.pop("label2id", None))
        derived = {name for name in kwargs if isinstance(getattr(type(self), name, None), property)}
        for name, value in kwargs.items():
            if name in derived:
                continue
            if not isinstance(name, str) or hasattr(type(self), name):
                raise ValueError(f"the configuration has a key {name!r}, a name of {type(self).__name__} itself")
            setattr(self, name, value)
        self.validate()
        for name in derived:  # stated in the file, yet a function of other keys (head_dim ...): must agree
            if kwargs[name] is not None and kwargs[name] != getattr(self, name):
                raise ValueError(
                    f"{name}={kwargs[name]!r} contradicts the other values, which make it {getattr(self, name)}"
                )

    def __getattr__(self, name: str) -> Any:
        target = type(self).aliases.get(name)
        if target is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self, target)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, type(self).aliases.get(name, name), value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    # --- labels ---------------------------------------------------------------------------------------------

    def _set_labels(self, num_labels: Any, id2label: Any, label2id: Any) -> None:
        if num_labels is not None and not (_is_int(num_labels) and num_labels > 0):
            raise ValueError(f"num_labels={num_labels!r} in the configuration; accepted: a positive integer")
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            try:
                self.id2label = {int(key): str(value) for key, value in id2label.items()}
            except (AttributeError, TypeError, ValueError):
                raise ValueError(f"id2label={id2label!r} in the configuration; accepted: {{id: name}}") from None
            if num_labels is not None and num_labels != len(self.id2label):
                raise ValueError(f"num_labels={num_labels} contradicts id2label, which has {len(self.id2label)} labels")
            self.label2id = {name: key for key, name in self.id2label.items()}
        if label2id is not None:
            if not isinstance(label2id, dict) or not all(_is_int(value) for value in label2id.values()):
                raise ValueError(f"label2id={label2id!r} in the configuration; accepted: {{name: id}}")
            self.label2id = dict(label2id)

    @property
    def num_labels(self) -> int:
        """Number of labels of a classification head: the length of ``id2label``."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        self.label2id = {name: key for key, name in self.id2label.items()}

    # --- checks ---------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises ValueError naming the first value that is of a wrong type or contradicts another."""
        for name, (kind, _) in {**self._common, **self.fields}.items():
            accepts, accepted = _KINDS[kind]
            value = getattr(self, name)
            if not accepts(value):
                raise ValueError(f"{name}={value!r} in {type(self).__name__}; accepted: {accepted}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("problem_type='single_label_classification' needs num_labels >= 2, not 1")

    # --- files ----------------------------------------------------------------------------------------------

    @classmethod
    def get_config_dict(cls, path: str | os.PathLike) -> dict[str, Any]:
        """The raw config.json of a folder, or of the file itself."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            wanted = "has no config.json" if path.is_dir() else "is neither a model folder nor a config file"
            raise FileNotFoundError(f"{path} {wanted} (alula reads local folders; it downloads nothing)")
        return read_json(file)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **overrides: Any) -> PretrainedConfig:
        """Reads config.json from a folder (or the file itself); ``overrides`` replace its values. Arguments about
        downloading, such as ``revision``, are taken and change nothing."""
        return cls.from_dict(cls.get_config_dict(path), **without_downloading(overrides))

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> PretrainedConfig:
        values = copy.deepcopy(values)
        for name, value in overrides.items():
            own = cls.aliases.get(name, name)
            for key in (own, *(alias for alias, target in cls.aliases.items() if target == own)):
                values.pop(key, None)
            if name == "num_labels":  # a new count makes the stored names meaningless
                values.pop("id2label", None)
                values.pop("label2id", None)
            if name in ("dtype", "torch_dtype"):
                values.pop("dtype", None)
                values.pop("torch_dtype", None)
            values[name] = value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every key, known and unknown, as it goes into config.json."""
        values = {"model_type": self.model_type}
        values.update({k: copy.deepcopy(v) for k, v in vars(self).items() if k != "dtype"})
        if self.dtype is not None:
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.num_labels == 2 and self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            del values["id2label"], values["label2id"]
        return values

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n"

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes ``folder/config.json`` (through a temporary file, so that it is never half-written)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".config.json.{os.getpid()}.tmp"
        try:
            temporary.write_text(self.to_json_string(), encoding="utf-8")
            os.replace(temporary, folder / "config.json")
        finally:
            temporary.unlink(missing_ok=True)
