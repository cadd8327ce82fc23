"""A small SentencePiece model laid out as BigBird's, and the writer of its file."""

from __future__ import annotations

import argparse
import functools
import json
import struct
from pathlib import Path

import tokenizers
from alula.tokenization.sentencepiece_file import CONTROL, Piece

CORPUS = [
    "Plants create energy through a process known as photosynthesis. The quick brown fox doesn't jump over it.",
    "def hello(world):\n    print('value', value)\n    return the_value_of_the_function\n",
    "naïve café — 東京 東京 😀 Привет мир שלום مرحبا ﬁ ½ \u0301\u202e",
]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def spiece(pieces: list[Piece], kind: int = 1) -> bytes:
    """A SentencePiece model file, with fields of all wire types that a reader has to skip."""
    out = b""
    for piece in pieces:
        body = field(1, piece.text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", piece.score)
        out += field(1, body + varint(3 << 3) + varint(piece.type) if piece.type != 1 else body)
    trainer = field(1, b"corpus.txt") + varint(3 << 3) + varint(kind) + varint(40 << 3) + varint(100)
    unknown = varint(99 << 3 | 1) + b"\x01" * 8 + varint(98 << 3) + varint(2**40)
    return out + field(2, trainer) + field(3, field(1, b"identity")) + unknown


@functools.cache
def pieces(special: int = CONTROL) -> list[Piece]:
    """BigBird's layout: <pad>, </s>, <s> first, [CLS] [SEP] [MASK] at 65 to 67, <unk> at 100."""
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
    )
    backend.train_from_iterator([*CORPUS * 4, *Path(argparse.__file__).read_text().splitlines()], trainer)
    learned = [Piece(text, score, 1) for text, score in json.loads(backend.to_str())["model"]["vocab"][1:]]
    named = {0: "<pad>", 1: "</s>", 2: "<s>", 65: "[CLS]", 66: "[SEP]", 67: "[MASK]", 100: "<unk>"}
    rows = []
    for index in range(len(learned) + len(named)):
        text = named.get(index)
        kind = 2 if text == "<unk>" else special if text and index > 2 else CONTROL
        rows.append(Piece(text, 0.0, kind) if text else learned[index - sum(i < index for i in named)])
    return rows
