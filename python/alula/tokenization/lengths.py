"""Padding and truncation: what the arguments mean, and padding of ids that are already there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from alula.tokenization.encoding import BatchEncoding, check_return_tensors

__all__ = ["PADDING", "SIDES", "TRUNCATION", "UNLIMITED", "Lengths", "pad_encoded", "resolve_lengths"]

PADDING = ("longest", "max_length", "do_not_pad")
TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
SIDES = ("right", "left")
# model_max_length of a tokenizer that knows no limit, and the value above which a limit counts as none.
UNLIMITED = int(1e30)
_LARGE = int(1e20)


class Lengths(NamedTuple):
    """The decided strategies: names from PADDING and TRUNCATION, and the length they go by."""

    padding: str
    truncation: str
    max_length: int | None


def resolve_lengths(
    tokenizer: Any,
    padding: bool | str = False,
    truncation: bool | str | None = None,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    verbose: bool = True,
) -> Lengths:
    """What the arguments of a call mean; ValueError, before anything is done, for those that mean nothing.

    As in transformers, except that padding to, or truncation at, a length that neither `max_length` nor
    `model_max_length` gives is an error, where transformers does nothing.
    """
    padding = getattr(padding, "value", padding)  # transformers' enums
    truncation = getattr(truncation, "value", truncation)
    _check_count("max_length", max_length, least=0)
    _check_count("pad_to_multiple_of", pad_to_multiple_of, least=1)
    if padding_side is not None and padding_side not in SIDES:
        raise ValueError(f"padding_side={padding_side!r} is unknown; accepted: {', '.join(SIDES)}")
    if max_length is not None and padding is False and truncation is None:
        truncation = "longest_first"
    if padding is True and verbose and max_length is not None and truncation in (None, False, "do_not_truncate"):
        warnings.warn(
            "`max_length` is ignored with `padding=True` and no truncation; padding='max_length' pads to it",
            stacklevel=4,
        )
    padding = {True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(padding, padding)
    truncation = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}.get(truncation, truncation)
    if padding not in PADDING:
        raise ValueError(f"padding={padding!r} is unknown; accepted: True, False, {', '.join(PADDING)}")
    if truncation not in TRUNCATION:
        raise ValueError(f"truncation={truncation!r} is unknown; accepted: True, False, {', '.join(TRUNCATION)}")
    if max_length is None and (padding == "max_length" or truncation != "do_not_truncate"):
        if tokenizer.model_max_length > _LARGE:
            what = f"truncation={truncation!r}" if truncation != "do_not_truncate" else "padding='max_length'"
            raise ValueError(f"{what} needs max_length: this tokenizer has no model_max_length to go by")
        max_length = int(tokenizer.model_max_length)
    if padding != "do_not_pad" and tokenizer.pad_token_id is None:
        raise ValueError(
            "padding needs a padding token, and this tokenizer has none; set one (tokenizer.pad_token = "
            "tokenizer.eos_token) or add one (tokenizer.add_special_tokens({'pad_token': '<pad>'}))"
        )
    if (
        padding != "do_not_pad"
        and truncation != "do_not_truncate"
        and pad_to_multiple_of is not None
        and max_length is not None
        and max_length % pad_to_multiple_of
    ):
        raise ValueError(
            f"truncation at max_length={max_length} and padding to multiples of {pad_to_multiple_of} contradict each "
            "other; max_length must be such a multiple"
        )
    return Lengths(padding, truncation, max_length)


def pad_encoded(
    tokenizer: Any,
    encoded: Any,
    padding: bool | str = True,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_attention_mask: bool | None = None,
    return_tensors: str | None = None,
    verbose: bool = True,
) -> BatchEncoding:
    """Pads ids that are already there: one row, a batch, or a list of rows (as a DataLoader's `collate_fn` gets them).

    Lists, numpy arrays and torch tensors are taken; without `return_tensors` the kind that came in is returned.
    """
    check_return_tensors(return_tensors)
    if isinstance(encoded, (list, tuple)):
        if encoded and not all(isinstance(row, Mapping) and row.keys() == encoded[0].keys() for row in encoded):
            raise ValueError("the rows to pad must be dicts with the same names")
        encoded = {key: [row[key] for row in encoded] for key in (encoded[0] if encoded else ())}
    name = tokenizer.model_input_names[0]
    if name not in encoded:
        raise ValueError(f"pad needs `{name}`, but was given {', '.join(encoded) or 'nothing'}")
    if return_attention_mask is None:
        return_attention_mask = "attention_mask" in tokenizer.model_input_names
    kind = return_tensors or _kind_of(encoded[name])
    rows = {key: _as_lists(value) for key, value in encoded.items()}
    ids = rows[name]
    if not ids:
        return BatchEncoding({**rows, "attention_mask": []} if return_attention_mask else rows, tensor_type=kind)
    how = resolve_lengths(tokenizer, padding, None, max_length, None, padding_side, verbose)
    _check_count("pad_to_multiple_of", pad_to_multiple_of, least=1)
    is_batch = isinstance(ids[0], (list, tuple))
    if not is_batch:
        rows, ids = {key: [value] for key, value in rows.items()}, [ids]
    for key, value in rows.items():
        if len(value) != len(ids):
            raise ValueError(f"`{key}` has {len(value)} rows, but `{name}` has {len(ids)}")
    if return_attention_mask and "attention_mask" not in rows:
        rows["attention_mask"] = [[1] * len(row) for row in ids]
    if how.padding != "do_not_pad":
        length = max(len(row) for row in ids) if how.padding == "longest" else how.max_length
        if pad_to_multiple_of is not None:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        fill = {
            name: tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        is_left = (padding_side or tokenizer.padding_side) == "left"
        counts = [length - len(row) for row in ids]
        for key in fill.keys() & rows.keys():
            extra = [[fill[key]] * count for count in counts]
            rows[key] = [[*pad, *row] if is_left else [*row, *pad] for row, pad in zip(rows[key], extra, strict=True)]
    return BatchEncoding(rows if is_batch else {key: value[0] for key, value in rows.items()}, tensor_type=kind)


def _kind_of(value: Any) -> str | None:
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
    return "pt" if isinstance(value, torch.Tensor) else "np" if isinstance(value, np.ndarray) else None


def _as_lists(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_as_lists(item) for item in value] if value and not isinstance(value[0], int) else list(value)
    return value


def _check_count(name: str, value: Any, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be an integer of at least {least}, or None; got {value!r}")
