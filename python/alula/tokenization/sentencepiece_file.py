"""The pieces of a SentencePiece model file (spiece.model), read without the sentencepiece or protobuf packages.

Such a file is a protocol-buffer message (sentencepiece_model.proto): field 1, repeated, is a piece (1: text, 2: score,
3: type); field 2 says how it was trained (3: kind of model). Other fields are skipped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["CONTROL", "USER_DEFINED", "Piece", "read_pieces"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_UNIGRAM = 1
_KINDS = {2: "BPE", 3: "word", 4: "character"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """A token, its score (a log probability), and its type: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    6 byte."""

    text: str
    score: float
    type: int


def read_pieces(path: str | os.PathLike) -> list[Piece]:
    """The pieces of a unigram model, in the order of their ids.

    Raises FileNotFoundError without the file, ValueError for one that is cut, no SentencePiece model, or of another
    kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a SentencePiece model")
    pieces: list[Piece] = []
    kind = _UNIGRAM
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif field == 2 and isinstance(value, bytes):
                kind = next((v for number, v in _fields(value) if number == 3), kind)
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is no SentencePiece model, or was cut: {error}") from None
    if not pieces:
        raise ValueError(f"{path} is no SentencePiece model: it holds no pieces")
    if kind != _UNIGRAM:
        raise ValueError(f"{path} is a {_KINDS.get(kind, kind)} model; accepted: unigram")
    return pieces


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field in (1, 2, 3) and isinstance(value, bytes) != (field < 3):
            raise ValueError(f"field {field} of a piece is of the wrong type")
        if field == 1:
            text = value.decode("utf-8")
        elif field == 2:
            (score,) = struct.unpack("<f", value)
        elif field == 3:
            kind = value
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: an integer, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"byte {at}: wire type {wire}")
        if at + size > len(data):
            raise ValueError(f"byte {at}: {size} bytes announced, {len(data) - at} left")
        yield field, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"byte {at}: a number of more than 64 bits")
