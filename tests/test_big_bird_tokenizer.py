"""BigBird's tokenizer from spiece.model and tokenizer.json, against transformers' class; files that cannot be right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import alula
import pytest
from alula.tokenization.sentencepiece_file import CONTROL, USER_DEFINED, Piece, read_pieces
from spiece_cases import CORPUS, pieces, spiece

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

HOSTILE = [
    "",
    " ",
    "\n",
    "\x00",
    "Plants create [MASK] through a process known as photosynthesis.",
    "[MASK]",
    "a [MASK][MASK]  [MASK] b[MASK]c",
    "[CLS] x [SEP] y [SEP][PAD] <pad> <s>z</s> <unk>",
    "  two  spaces   three    ",
    "\t\r\n \u00a0\u2003\u3000\u200b\ufeff" * 20,
    "\u2581already \u2581\u2581here\u2581",
    "ﬁ ½ Ⅷ e\u0301 é İ ß ǆ",
    "x" * 2000,
    " " * 3000 + "x",
    "\ufffd\uffff\U0010ffff\ue000",
    "東京😀👩‍👩‍👧‍👦🏳️‍🌈",
    *CORPUS,
]


@pytest.fixture(scope="module", params=["control", "user-defined", "normal"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """spiece.model and the two files beside it; the bracketed tokens are of the named type."""
    folder = tmp_path_factory.mktemp("spiece")
    kind = {"control": CONTROL, "user-defined": USER_DEFINED, "normal": 1}[request.param]
    (folder / "spiece.model").write_bytes(spiece(pieces(kind)))
    (folder / "config.json").write_text(json.dumps({"model_type": "big_bird"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 4096}))
    return folder


def theirs_of(folder: Path) -> Any:
    """transformers' tokenizer, as its own reader of spiece.model makes it (that needs protobuf: here it is given what
    such a reader gives)."""
    read = read_pieces(folder / "spiece.model")
    extra = [
        tokenizers.AddedToken(piece.text, normalized=False, special=piece.type == CONTROL)
        for piece in read
        if piece.type in (CONTROL, USER_DEFINED)
    ]
    vocab = [(piece.text, piece.score) for piece in read]
    return transformers.BigBirdTokenizer(vocab=vocab, additional_special_tokens=extra, model_max_length=4096)


def sample() -> list[str]:
    draw = random.Random(7)
    parts = [
        "[MASK]",
        "[SEP]",
        "<s>",
        "the ",
        "process",
        " ",
        "  ",
        "\t",
        "é",
        "東",
        "😀",
        "\u2581",
        "\u0301",
        "z",
        "Q.",
    ]
    return HOSTILE + ["".join(draw.choices(parts, k=draw.randrange(1, 40))) for _ in range(150)]


def assert_same(ours: Any, theirs: Any) -> None:
    texts = sample()
    for text in texts:
        for pair in (None, "a second [MASK] text"):
            mine, want = (t(text, pair, return_token_type_ids=True) for t in (ours, theirs))
            assert mine["input_ids"] == want["input_ids"], (text, pair)
            assert mine["token_type_ids"] == want["token_type_ids"], (text, pair)
        ids = mine["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    a, b = (t(texts[:9], padding=True, truncation=True, max_length=24, return_tensors="pt") for t in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(a[key].tolist() == b[key].tolist() for key in a)
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    assert {i: repr(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: repr(t) for i, t in theirs.added_tokens_decoder.items()
    }


def test_from_spiece_model(folder: Path) -> None:
    ours = alula.AutoTokenizer.from_pretrained(folder)
    assert type(ours) is alula.BigBirdTokenizer
    assert (ours.pad_token_id, ours.eos_token_id, ours.bos_token_id, ours.unk_token_id) == (0, 1, 2, 100)
    assert (ours.cls_token_id, ours.sep_token_id, ours.mask_token_id) == (65, 66, 67)
    assert_same(ours, theirs_of(folder))
    assert ours("a", "b", return_token_type_ids=True)["token_type_ids"][-2:] == [1, 1]
    assert (
        alula.BigBirdTokenizer(vocab_file=folder / "spiece.model")("a b c")["input_ids"] == ours("a b c")["input_ids"]
    )


def test_from_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    theirs_of(folder).save_pretrained(tmp_path / "theirs")
    theirs = transformers.BigBirdTokenizer.from_pretrained(tmp_path / "theirs")
    ours = alula.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert type(ours) is alula.BigBirdTokenizer
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert_same(ours, transformers.BigBirdTokenizer.from_pretrained(tmp_path / "ours"))
    assert_same(alula.AutoTokenizer.from_pretrained(tmp_path / "ours"), theirs)


def test_options(folder: Path, tmp_path: Path) -> None:
    theirs_of(folder).save_pretrained(tmp_path)
    for options in ({"add_prefix_space": False}, {"padding_side": "left"}, {"mask_token": "<extra>"}):
        ours = alula.BigBirdTokenizer.from_pretrained(tmp_path, **options)
        assert_same(ours, transformers.BigBirdTokenizer.from_pretrained(tmp_path, **options))
    assert alula.BigBirdTokenizer().get_vocab() == transformers.BigBirdTokenizer().get_vocab()


def test_files_that_cannot_be_right(tmp_path: Path) -> None:
    whole = spiece(pieces())
    file = tmp_path / "spiece.model"

    def load(data: bytes) -> Any:
        file.write_bytes(data)
        return alula.BigBirdTokenizer.from_pretrained(tmp_path)

    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json and no spiece\.model"):
        alula.BigBirdTokenizer.from_pretrained(tmp_path)
    for data in (
        whole[:-3],
        whole[:100],
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0f",
        b"\x0a\x02\x0a",
    ):
        with pytest.raises(ValueError, match=r"spiece\.model is no SentencePiece model, or was cut"):
            load(data)
    with pytest.raises(ValueError, match="it holds no pieces"):
        load(b"")
    with pytest.raises(ValueError, match="is a BPE model; accepted: unigram"):
        load(spiece(pieces(), kind=2))
    with pytest.raises(ValueError, match="no unknown token '<unk>' with a score of 0"):
        load(spiece([Piece("a", -1.0, 1), Piece("b", -2.0, 1)]))
    file.unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    with pytest.raises(ValueError, match=r"BigBirdTokenizer needs a unigram model; .* holds a BPE model"):
        alula.BigBirdTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a"]]}}))
    with pytest.raises(ValueError, match=r"must be a list of pairs \[token, score\]"):
        alula.BigBirdTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab must be a list"):
        alula.BigBirdTokenizer(vocab={"a": 0})
