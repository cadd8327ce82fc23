"""Text to ids and back: a thin wrapper over the `tokenizers` library, for a folder that holds a tokenizer.json.

`Tokenizer.decoder()` turns ids into text one by one at a constant cost, and never gives half a character away.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Decoder", "Tokenizer", "decoder_for", "load"]

# A decoder that has seen this many tokens without a whole character gives away what it has.
_MAX_PENDING = 24
_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """Turns ids into text, one at a time."""

    def push(self, token: int) -> str:
        """Return the text that `token` completes: "" while a character is still missing some of its bytes."""

    def flush(self) -> str:
        """Return what is left at the end of the text: U+FFFD for a character that never became whole."""


def load(folder: str | Path) -> Tokenizer:
    """Load the tokenizer.json (and, if there, the tokenizer_config.json) of a model folder; it neither cuts nor pads.

    Raises ImportError where the `tokenizers` package is missing, FileNotFoundError where the folder holds no
    tokenizer.json, ValueError where the file cannot be read as a tokenizer; each says what to do.
    """
    folder = Path(folder)
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "turning text into tokens needs the `tokenizers` package: pip install 'alula[text]'"
        ) from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json; put the one of the checkpoint there "
            "(transformers writes it with `tokenizer.save_pretrained`)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(backend, eos_token=_read_eos_token(folder / "tokenizer_config.json"))


class Tokenizer:
    """Encodes text and decodes ids with a `tokenizers.Tokenizer`, whose settings it leaves as they are."""

    def __init__(self, backend: Any, *, eos_token: str | None = None) -> None:
        self.backend = backend
        self.eos_token = eos_token
        self.eos_token_id: int | None = None if eos_token is None else backend.token_to_id(eos_token)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._is_byte_level = type(backend.decoder).__name__ == "ByteLevel"

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included.  A model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` leaves out unless told otherwise."""
        return self._special_ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the special tokens that the tokenizer.json puts around a text, if any."""
        return self.backend.encode(text).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text, unpadded."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids` (a sequence or a 1-D tensor of integers)."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decoder(self, skip_special_tokens: bool = True) -> Decoder:
        """Return a new incremental decoder: the pieces it gives, joined, are what `decode` returns for all the ids."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        if self._is_byte_level:
            return _ByteLevelDecoder(self.backend, skipped)
        return _WindowDecoder(self, skipped)


def decoder_for(tokenizer: Any) -> tuple[Decoder, frozenset[int]]:
    """Return an incremental decoder that keeps special tokens, and the ids of these, for any kind of tokenizer.

    Takes an alula `Tokenizer`, a `tokenizers.Tokenizer`, a transformers tokenizer, or anything with `decode(ids)`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer) and hasattr(backend, "get_added_tokens_decoder"):
        backend = Tokenizer(backend)
    if isinstance(backend, Tokenizer):
        return backend.decoder(skip_special_tokens=False), backend.special_ids
    if not callable(getattr(tokenizer, "decode", None)):
        raise ValueError(f"`tokenizer` must have a decode(ids) method, but {type(tokenizer).__name__} has none")
    return _WindowDecoder(tokenizer, frozenset()), frozenset(getattr(tokenizer, "all_special_ids", ()))


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


def _read_eos_token(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    return token.get("content") if isinstance(token, dict) else token


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
