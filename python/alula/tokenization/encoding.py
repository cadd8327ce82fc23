"""BatchEncoding: what a tokenizer returns. Lists or tensors by name, and maps between tokens, words and characters."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["BatchEncoding", "CharSpan", "TokenSpan", "check_return_tensors"]


class CharSpan(NamedTuple):
    """Characters `start` to `end - 1` of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens `start` to `end - 1` of a row."""

    start: int
    end: int


def check_return_tensors(kind: str | None) -> None:
    """ValueError unless `kind` is None, "pt" or "np"."""
    if kind not in (None, "pt", "np"):
        raise ValueError(
            f'return_tensors={kind!r} is not supported; accepted: "pt" (torch), "np" (numpy), None (lists)'
        )


class BatchEncoding(UserDict):
    """`input_ids`, `attention_mask` ... by name (also as attributes), ready to be passed as `model(**encoding)`.

    Args:
        data: name -> list (one text) or list of lists (a batch).
        encoding: the `tokenizers.Encoding`, or one per row; an integer index returns it.
        tensor_type: "pt" or "np" turns the lists into int64 tensors [B, T]; ValueError where rows differ in length.
        prepend_batch_axis: put a batch of one around every list first.
    """

    def __init__(
        self,
        data: dict[str, Any] | None = None,
        encoding: Any = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
    ) -> None:
        super().__init__(data)
        self._encodings = encoding if encoding is None or isinstance(encoding, Sequence) else [encoding]
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, item: int | str | slice) -> Any:
        if isinstance(item, str):
            return self.data[item]
        if self._encodings is not None:
            return self._encodings[item]
        if isinstance(item, slice):
            return {key: value[item] for key, value in self.data.items()}
        raise KeyError(f"{item!r}: give a name ({', '.join(self.data)}), or a slice of the rows")

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})
        if name not in data:
            raise AttributeError(f"BatchEncoding has no {name!r}; it holds {', '.join(data) or 'nothing'}")
        return data[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "_encodings": self._encodings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def encodings(self) -> list[Any] | None:
        """The `tokenizers.Encoding` of each row, or None."""
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether it has the rows' encodings, which the maps below need."""
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """Sequences in a row: 1, or 2 for pairs; None where it is not known."""
        return self._encodings[0].n_sequences if self._encodings else None

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Turns the lists into torch ("pt") or numpy ("np") tensors, in place, and returns itself."""
        check_return_tensors(tensor_type)
        if tensor_type is None:
            return self
        for key, value in self.items():
            if prepend_batch_axis:
                value = [value]
            if not isinstance(value, torch.Tensor if tensor_type == "pt" else np.ndarray):
                self[key] = _to_torch(key, value) if tensor_type == "pt" else _to_numpy(value)
        return self

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Moves the tensors to a device, in place, and returns itself."""
        if not isinstance(device, (str, torch.device, int)):
            raise TypeError(f"BatchEncoding.to takes a device, got {device!r}; ids stay int64")
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                self[key] = value.to(device=device, non_blocking=non_blocking)
        return self

    # --- maps; `batch_index` may be left out for row 0 ------------------------------------------------------------

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row."""
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the number of its word, None for special tokens."""
        return self._row(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token 0 or 1, the sequence of the pair it comes from, None for special tokens."""
        return self._row(batch_index).sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The sequence of a pair that a token comes from."""
        row, index = self._place(batch_or_token_index, token_index)
        return row.token_to_sequence(index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The word that a token belongs to."""
        row, index = self._place(batch_or_token_index, token_index)
        return row.token_to_word(index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters of the text that a token stands for."""
        row, index = self._place(batch_or_token_index, token_index)
        span = row.token_to_chars(index)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word."""
        row, index = self._place(batch_or_word_index, word_index)
        span = row.word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan:
        """The characters of a word."""
        row, index = self._place(batch_or_word_index, word_index)
        return CharSpan(*row.word_to_chars(index, sequence_index))

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that a character is in."""
        row, index = self._place(batch_or_char_index, char_index)
        return row.char_to_token(index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that a character is in."""
        row, index = self._place(batch_or_char_index, char_index)
        return row.char_to_word(index, sequence_index)

    def _row(self, index: int) -> Any:
        if not self._encodings:
            raise ValueError("this BatchEncoding was made without a tokenizer's encodings, which its maps need")
        return self._encodings[index]

    def _place(self, first: int, second: int | None) -> tuple[Any, int]:
        return (self._row(0), first) if second is None else (self._row(first), second)


def _to_torch(key: str, value: Any) -> torch.Tensor:
    try:
        tensor = torch.tensor(value)
    except (ValueError, TypeError) as error:
        lengths = sorted({len(row) for row in value if isinstance(row, (list, tuple))})
        raise ValueError(
            f"`{key}` makes no tensor: its rows have {lengths} entries; padding=True, truncation=True and max_length "
            f"give all rows one length ({error})"
        ) from error
    return tensor.to(torch.int64) if tensor.numel() == 0 else tensor


def _to_numpy(value: Any) -> np.ndarray:
    rows = value if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)) else []
    if len({len(row) for row in rows}) > 1:  # as in transformers: an array of arrays
        array = np.empty(len(rows), dtype=object)
        array[:] = [np.asarray(row) for row in rows]
        return array
    array = np.asarray(value)
    return array.astype(np.int64) if array.size == 0 else array
