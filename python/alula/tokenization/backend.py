"""What alula asks of the `tokenizers` library: import it, build a byte-level BPE from checked vocabulary and merges."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alula.config import read_json

__all__ = ["byte_level_bpe", "load_backend", "read_merges", "read_vocab", "require_tokenizers"]

# A file cut at the end of a line still parses; it shows in tokens that no merge makes. A few are normal
# (placeholders in the vocabulary); more than this share of the tokens longer than one character are not.
_MAX_UNREACHABLE = 0.05


def require_tokenizers() -> Any:
    """The `tokenizers` module; ImportError saying how to install it where it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "turning text into tokens needs the `tokenizers` package: pip install 'alula[text]'"
        ) from error
    return tokenizers


def load_backend(path: str | os.PathLike) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, exactly as the file says. ValueError if it cannot be read."""
    library = require_tokenizers()
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a tokenizer.json")
    try:
        return library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error


def byte_level_bpe(
    vocab: str | Mapping[str, int] | None,
    merges: str | Sequence[str | Sequence[str]] | None,
    *,
    add_prefix_space: bool,
) -> Any:
    """A `tokenizers.Tokenizer` with GPT-2's pipeline: byte-level splitting, BPE, byte-level decoding.

    Args:
        vocab: token -> id, or the path of a vocab.json. None: no tokens.
        merges: pairs of tokens (each a pair or one string with a space between), best first, or the path of a
            merges.txt. None: no merges.
        add_prefix_space: a space goes in front of a text that does not begin with white space.

    Raises ValueError, naming file and place, where the two are malformed or contradict each other.
    """
    library = require_tokenizers()
    if not isinstance(add_prefix_space, bool):
        raise ValueError(f"add_prefix_space must be True or False, got {add_prefix_space!r}")
    vocab_name, merges_name = "vocab", "merges"
    if isinstance(vocab, (str, os.PathLike)):
        vocab, vocab_name = read_vocab(vocab), str(vocab)
    else:
        vocab = dict(vocab or {})
        _check_vocab(vocab, vocab_name)
    if isinstance(merges, (str, os.PathLike)):
        merges, merges_name = read_merges(merges), str(merges)
    else:
        merges = [_pair(merge, i, merges_name) for i, merge in enumerate(merges or [])]
    _check_merges(merges, merges_name, vocab, vocab_name)
    try:
        model = library.models.BPE(
            vocab=vocab,
            merges=merges,
            dropout=None,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
    except Exception as error:  # lone surrogates in a token, ids beyond 32 bits
        raise ValueError(f"{vocab_name} and {merges_name} do not make a BPE: {error}") from error
    backend = library.Tokenizer(model)
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = library.decoders.ByteLevel()
    return backend


def read_vocab(path: str | os.PathLike) -> dict[str, int]:
    """The token -> id map of a vocab.json. ValueError if it is cut, no such map, or gives two tokens one id."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a vocab.json")
    vocab = read_json(path)
    _check_vocab(vocab, str(path))
    return vocab


def read_merges(path: str | os.PathLike) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, best first. ValueError naming the line that is not two tokens."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a merges.txt")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    merges = []
    # Only "#version" is a comment: "# #" is a merge of GPT-2. Tokens hold no line ends, but may hold what
    # str.splitlines takes for one.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line and not line.startswith("#version"):
            merges.append(_pair(line, number, f"{path}, line"))
    return merges


def check_reachable(backend: Any, exempt: Iterable[str], vocab_name: str, merges_name: str) -> None:
    """Complains about tokens of a vocab.json that no merge of a merges.txt makes: one of the files was cut or swapped.

    `exempt` are added tokens, which need no merge. ValueError where there are many, a warning where there are few.
    """
    model = json.loads(backend.to_str())["model"]
    made = {"".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]}
    long = {token for token in model["vocab"] if len(token) > 1}.difference(exempt)
    lost = sorted(long - made, key=model["vocab"].__getitem__)
    if not lost:
        return
    message = (
        f"{len(lost)} of the {len(long)} tokens longer than one character in {vocab_name} are made by no merge of "
        f"{merges_name} (the first is {lost[0]!r})"
    )
    if len(lost) > _MAX_UNREACHABLE * len(long):
        raise ValueError(f"{message}; the merges were cut short, or the two files are not of one tokenizer")
    warnings.warn(f"{message}; no text becomes them", stacklevel=2)


def _check_vocab(vocab: dict[str, int], name: str) -> None:
    token_of: dict[int, str] = {}
    for token, index in vocab.items():
        if not isinstance(token, str) or isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"{name} must map tokens to ids that are at least 0, but has {token!r}: {index!r}")
        if not 0 <= index < 2**32:
            raise ValueError(f"{name} gives the token {token!r} id {index}; accepted: 0 to {2**32 - 1}")
        if not token.isascii() and any("\ud800" <= character <= "\udfff" for character in token):
            raise ValueError(
                f"{name} has the token {token!r}, which is no Unicode text: a surrogate stands alone in it"
            )
        if index in token_of:
            raise ValueError(f"{name} gives id {index} to two tokens, {token_of[index]!r} and {token!r}")
        token_of[index] = token


def _check_merges(merges: list[tuple[str, str]], name: str, vocab: dict[str, int], vocab_name: str) -> None:
    for i, (left, right) in enumerate(merges):
        if left not in vocab or right not in vocab or left + right not in vocab:
            missing = next(token for token in (left, right, left + right) if token not in vocab)
            raise ValueError(
                f"merge {i + 1} of {name} is {left!r} + {right!r}, but {vocab_name} has no token {missing!r}; one of "
                "them was cut, or they are not of one tokenizer"
            )


def _pair(merge: Any, number: int, name: str) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, (list, tuple)) and len(parts) == 2 and all(isinstance(p, str) and p for p in parts):
        return parts[0], parts[1]
    raise ValueError(f"{name} {number}: expected two tokens with a space between, found {merge!r}")
