"""A tokenizer's call: texts, pairs, batches and words to ids, masks and the rest, padded and truncated as asked."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

from alula.tokenization.encoding import BatchEncoding, check_return_tensors
from alula.tokenization.lengths import pad_encoded, resolve_lengths

__all__ = ["TextCalls", "Turn"]

_ACCEPTED = (
    "a text, a list of texts, a list of pairs of texts; with is_split_into_words=True a list of words, a list of such "
    "lists, or a list of pairs of them"
)


class Turn:
    """`with turn:` one thread at a time. A copy, and a forked process, has a turn of its own that nobody has taken."""

    def __init__(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():  # whoever held it did not come along
            self.__init__()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()


class TextCalls:
    """The half of a tokenizer that turns text into ids. `_tokenizer` is the `tokenizers.Tokenizer` behind it, `_turn`
    whose call it serves: between setting how it cuts and pads and encoding, no other thread may do the same."""

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Turns texts into ids.

        Args:
            text: a text, or a list of texts; a list of pairs (text, second text) is a batch of pairs.
            text_pair: the second text, or one per text.
            text_target, text_pair_target: their ids are returned as `labels` (alone: as `input_ids`).
            add_special_tokens: whether the post-processor puts its special tokens around the texts.
            padding: True or "longest": to the longest row of the batch; "max_length": to `max_length`.
            truncation: True or "longest_first", "only_first", "only_second": cut to `max_length`.
            max_length: without it, the tokenizer's `model_max_length`. Alone it means truncation.
            stride: tokens that overflowing rows share with the row before.
            is_split_into_words: a text is a list of words.
            pad_to_multiple_of: padded rows become a multiple of this long.
            padding_side: "right" or "left"; without it the tokenizer's.
            return_tensors: "pt" (torch) or "np" (numpy), int64 [B, T]; None: lists, without a batch for one text.
            return_token_type_ids, return_attention_mask: whether to return these; None: as `model_input_names` says.
            return_overflowing_tokens: what truncation cut off comes as further rows, numbered in
                `overflow_to_sample_mapping`.
            return_special_tokens_mask, return_offsets_mapping, return_length: whether to return these.
            split_special_tokens: special tokens in a text are split like any text; None: the tokenizer's.
        """
        if text is None and text_target is None:
            raise ValueError("there is no text: give `text`, `text_target`, or both")
        options = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "text", "text_pair", "text_target", "text_pair_target")
        }
        if text_target is None:
            return self._encode(text, text_pair, **options)
        target = self._encode(text_target, text_pair_target, **options)
        if text is None:
            return target
        encoding = self._encode(text, text_pair, **options)
        encoding["labels"] = target["input_ids"]
        return encoding

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        """The ids of a text: `tokenizer(text, ...)["input_ids"]`, with the arguments of a call."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def tokenize(self, text: Any, pair: Any = None, add_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """The tokens of a text."""
        return self(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    def _encode(
        self,
        text: Any,
        text_pair: Any,
        *,
        add_special_tokens: bool,
        stride: int,
        is_split_into_words: bool,
        padding_side: str | None,
        pad_to_multiple_of: int | None,
        return_tensors: str | None,
        return_overflowing_tokens: bool,
        split_special_tokens: bool | None,
        verbose: bool,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        **returned: bool | None,
    ) -> BatchEncoding:
        check_return_tensors(return_tensors)
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        how = resolve_lengths(self, padding, truncation, max_length, pad_to_multiple_of, padding_side, verbose)
        batch, is_batch, has_pairs = _make_batch(text, text_pair, is_split_into_words)
        for row, item in enumerate(batch):
            _check_unicode(row, item)
        if how.truncation != "do_not_truncate":
            self._check_truncation(how, stride, has_pairs, add_special_tokens)
        with self._turn:
            encodings = self._encode_batch(
                batch,
                how,
                # It shapes overflowing rows alone, and the library panics where it is too large for one of a pair.
                stride=stride if return_overflowing_tokens else 0,
                is_split_into_words=is_split_into_words,
                add_special_tokens=add_special_tokens,
                split_special_tokens=split_special_tokens,
                padding_side=padding_side or self.padding_side,
                pad_to_multiple_of=pad_to_multiple_of,
            )
        samples = range(len(encodings))
        if return_overflowing_tokens:
            samples = [i for i, e in enumerate(encodings) for _ in range(1 + len(e.overflowing))]
            encodings = [row for e in encodings for row in (e, *e.overflowing)]
        data = self._columns(encodings, **returned)
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = list(samples)
        if how.max_length is None and verbose:
            self._warn_about_length(data["input_ids"])
        if not is_batch and return_tensors is None and not return_overflowing_tokens:
            data = {key: value[0] if isinstance(value[0], list) else value for key, value in data.items()}
        return BatchEncoding(data, encodings, return_tensors)

    def _encode_batch(
        self,
        batch: list[Any],
        how: Any,
        *,
        stride: int,
        is_split_into_words: bool,
        add_special_tokens: bool,
        split_special_tokens: bool,
        padding_side: str,
        pad_to_multiple_of: int | None,
    ) -> list[Any]:
        """The library's encodings of texts. How they are cut and padded is state of the tokenizer there."""
        backend = self._tokenizer
        if how.truncation != "do_not_truncate":
            backend.enable_truncation(
                how.max_length, stride=stride, strategy=how.truncation, direction=self.truncation_side
            )
        if how.padding != "do_not_pad":
            backend.enable_padding(
                direction=padding_side,
                pad_id=self.pad_token_id,
                pad_type_id=self.pad_token_type_id,
                pad_token=self.pad_token,
                length=how.max_length if how.padding == "max_length" else None,
                pad_to_multiple_of=pad_to_multiple_of,
            )
        backend.encode_special_tokens = split_special_tokens
        try:
            return backend.encode_batch(
                batch, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise ValueError(f"{error}; accepted: {_ACCEPTED}") from None
        except BaseException as error:
            # The library raises plain Exception, and pyo3's PanicException, which is no Exception.
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"truncation={how.truncation!r} at max_length={how.max_length} with stride={stride}: {error}"
            ) from None
        finally:
            backend.no_truncation()
            backend.no_padding()

    def _columns(
        self,
        encodings: list[Any],
        return_token_type_ids: bool | None,
        return_attention_mask: bool | None,
        return_special_tokens_mask: bool,
        return_offsets_mapping: bool,
        return_length: bool,
    ) -> dict[str, list[Any]]:
        """The asked-for lists, one entry per encoding."""
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        data = {"input_ids": [row.ids for row in encodings]}
        for name, source, is_wanted in (
            ("token_type_ids", "type_ids", return_token_type_ids),
            ("attention_mask", "attention_mask", return_attention_mask),
            ("special_tokens_mask", "special_tokens_mask", return_special_tokens_mask),
            ("offset_mapping", "offsets", return_offsets_mapping),
        ):
            if is_wanted:
                data[name] = [getattr(row, source) for row in encodings]
        if return_length:
            data["length"] = [len(row.ids) for row in encodings]
        return data

    def _check_truncation(self, how: Any, stride: int, has_pairs: bool, add_special_tokens: bool) -> None:
        """The library panics, or returns rows that are too long, on what is refused here."""
        num_special = self.num_special_tokens_to_add(has_pairs) if add_special_tokens else 0
        room = how.max_length - num_special
        if room < 0:
            raise ValueError(f"max_length={how.max_length} has no room for the {num_special} special tokens of a row")
        if isinstance(stride, bool) or not isinstance(stride, int) or not 0 <= stride < max(room, 1):
            raise ValueError(
                f"stride must be an integer from 0 to {max(room, 1) - 1}, less than the {room} tokens that "
                f"max_length={how.max_length} leaves for text; got {stride!r}"
            )

    def _warn_about_length(self, rows: list[list[int]]) -> None:
        longest = max(map(len, rows), default=0)
        if longest > self.model_max_length > 0 and "length" not in self._warned:
            self._warned.add("length")
            warnings.warn(
                f"a text has {longest} tokens, more than the {self.model_max_length} that the model takes", stacklevel=4
            )

    def pad(self, encoded_inputs: Any, padding: bool | str = True, **kwargs: Any) -> BatchEncoding:
        """Pads rows of ids that are already there; see :func:`alula.tokenization.lengths.pad_encoded`."""
        return pad_encoded(self, encoded_inputs, padding, **kwargs)


def _make_batch(text: Any, text_pair: Any, is_split_into_words: bool) -> tuple[list[Any], bool, bool]:
    """What `encode_batch` takes; whether the caller gave a batch; whether its rows are pairs."""
    _check_texts("text", text)
    if text_pair is not None:
        _check_texts("text_pair", text_pair)
    is_batch = isinstance(text, (list, tuple))
    if is_split_into_words:
        is_batch = is_batch and len(text) > 0 and isinstance(text[0], (list, tuple))
    if not is_batch:  # an empty second text is none, as in transformers
        return [(text, text_pair)] if text_pair else [text], False, bool(text_pair)
    if text_pair is not None:
        if isinstance(text_pair, str) or len(text_pair) != len(text):
            count = "one text" if isinstance(text_pair, str) else f"{len(text_pair)}"
            raise ValueError(f"`text` is a batch of {len(text)}, so `text_pair` must be one too, but it is {count}")
        return list(zip(text, text_pair, strict=True)), True, True
    inner = [row[0] if row else "" for row in text] if is_split_into_words else text
    return list(text), True, any(isinstance(row, (list, tuple)) for row in inner)


def _check_texts(name: str, value: Any) -> None:
    depth = 0
    while isinstance(value, (list, tuple)) and depth < 3:
        if not value:
            return
        value, depth = value[0], depth + 1
    if not isinstance(value, str):
        raise ValueError(f"`{name}` holds {value!r}; accepted: {_ACCEPTED}")


def _check_unicode(row: int, item: Any) -> None:
    """The library says not where a text is none, and its older releases write U+FFFD for a lone surrogate."""
    if isinstance(item, (list, tuple)):
        for part in item:
            _check_unicode(row, part)
    elif not isinstance(item, str):
        raise ValueError(f"row {row} of the batch holds {item!r}; accepted: {_ACCEPTED}")
    elif not item.isascii():
        try:
            item.encode("utf-8")
        except UnicodeEncodeError as broken:
            raise ValueError(
                f"row {row} of the batch is not Unicode text: character {broken.start} is the lone surrogate "
                f"U+{ord(item[broken.start]):04X}"
            ) from None
