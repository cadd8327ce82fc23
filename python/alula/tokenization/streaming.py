"""Ids to text one by one, at a constant cost and without ever giving half a character away."""

from __future__ import annotations

import codecs
from typing import Any, Protocol

__all__ = ["Decoder", "decoder_for", "incremental_decoder"]

# A decoder that has seen this many tokens without a whole character gives away what it has.
_MAX_PENDING = 24
_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """Turns ids into text, one at a time."""

    def push(self, token: int) -> str:
        """Return the text that `token` completes: "" while a character is still missing some of its bytes."""

    def flush(self) -> str:
        """Return what is left at the end of the text: U+FFFD for a character that never became whole."""


def incremental_decoder(backend: Any, skip_special_tokens: bool = True) -> Decoder:
    """A new incremental decoder of a `tokenizers.Tokenizer`: the pieces it gives, joined, are what its `decode` returns
    for all the ids.
    """
    skipped = _special_ids(backend) if skip_special_tokens else frozenset()
    if type(backend.decoder).__name__ == "ByteLevel":
        return _ByteLevelDecoder(backend, skipped)
    return _WindowDecoder(backend, skipped)


def decoder_for(tokenizer: Any) -> tuple[Decoder, frozenset[int]]:
    """An incremental decoder that keeps special tokens, and the ids of these, for any kind of tokenizer.

    Takes alula's and transformers' tokenizers, a `tokenizers.Tokenizer`, or anything with `decode(ids)`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "get_added_tokens_decoder"):
        return incremental_decoder(backend, skip_special_tokens=False), _special_ids(backend)
    if not callable(getattr(tokenizer, "decode", None)):
        raise ValueError(f"`tokenizer` must have a decode(ids) method, but {type(tokenizer).__name__} has none")
    return _WindowDecoder(tokenizer, frozenset()), frozenset(getattr(tokenizer, "all_special_ids", ()))


def _special_ids(backend: Any) -> frozenset[int]:
    return frozenset(index for index, token in backend.get_added_tokens_decoder().items() if token.special)


class _ByteLevelDecoder:
    """Byte-level BPE: each token stands for bytes, and these are decoded as UTF-8 as they come."""

    def __init__(self, backend: Any, skipped: frozenset[int]) -> None:
        self._id_to_token = backend.id_to_token
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        piece = self._id_to_token(token)
        return "" if piece is None else self._utf8.decode(_bytes_of(piece))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowDecoder:
    """Any other tokenizer: decode the last few ids again and give away what the newest added."""

    def __init__(self, tokenizer: Any, skipped: frozenset[int]) -> None:
        self._decode = tokenizer.decode
        self._skipped = skipped
        self._ids: list[int] = []
        self._num_shown = 0

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._ids.append(token)
        return self._take(is_last=len(self._ids) - self._num_shown > _MAX_PENDING)

    def flush(self) -> str:
        text = self._take(is_last=True)
        self._ids, self._num_shown = [], 0
        return text

    def _take(self, is_last: bool) -> str:
        # The ids already shown stay in front as context: many decoders treat the first token of a text differently.
        shown = self._decode(self._ids[: self._num_shown], skip_special_tokens=False)
        text = self._decode(self._ids, skip_special_tokens=False)
        if not is_last and (len(text) <= len(shown) or text.endswith(_REPLACEMENT)):
            return ""
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return text[len(shown) :]


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes as (introduced with GPT-2)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


def _bytes_of(piece: str) -> bytes:
    try:
        return bytes([_BYTES[char] for char in piece])
    except KeyError:  # an added token with a space or another character outside the alphabet: it stands for itself
        return piece.encode("utf-8")
