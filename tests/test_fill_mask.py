"""`alula fill-mask`: what is printed, and what is said when something is wrong."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import alula
import pytest
import torch
from alula.cli import main

pytest.importorskip("tokenizers")

from spiece_cases import pieces, spiece

TEXT = "Plants create [MASK] through a process known as [MASK]."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random masked language model; its vocabulary is five larger than its tokenizer's."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "spiece.model").write_bytes(spiece(pieces()))
    torch.manual_seed(0)
    config = alula.BigBirdConfig(
        vocab_size=len(pieces()) + 5,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    alula.BigBirdForMaskedLM(config).save_pretrained(folder)
    return folder


def expected(folder: Path, text: str, count: int) -> list[list[tuple[int, float]]]:
    tokenizer = alula.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    logits = alula.AutoModelForMaskedLM.from_pretrained(folder)(ids).logits[ids == tokenizer.mask_token_id]
    best = logits.softmax(-1).topk(count)
    return [
        list(zip(tokens, values, strict=True))
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def test_a_table_for_each_mask(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fill-mask", TEXT, "--model", str(folder), "--top-k", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    want = expected(folder, TEXT, 3)
    tables = out.split("\n\n")
    assert len(tables) == len(want) == 2
    for number, (table, rows) in enumerate(zip(tables, want, strict=True), 1):
        lines = table.splitlines()
        assert lines[0] == f"mask {number}"
        assert lines[1].split() == ["probability", "token", "id"]
        assert [(int(line.split()[-1]), line.split()[0]) for line in lines[2:]] == [(t, f"{p:.4f}") for t, p in rows]
    assert main(["fill-mask", "Plants [MASK]", "--model", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("probability")
    assert len(lines) == 6


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(pieces()) + 5
    assert main(["fill-mask", TEXT, "--model", str(folder), "--top-k", "9999", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    report = json.loads(out)
    assert report["text"] == TEXT
    for mask, rows in zip(report["masks"], expected(folder, TEXT, count), strict=True):
        found = mask["candidates"]
        assert len(found) == count
        assert [row["token"] for row in found] == [token for token, _ in rows]
        assert sum(row["probability"] for row in found) == pytest.approx(1, abs=1e-4)
        assert {f"<id {i}>" for i in range(count - 5, count)} <= {row["token_str"] for row in found}
    first = report["masks"][0]["candidates"][0]
    assert re.fullmatch(r"Plants create .*through a process known as.*", first["sequence"])


def test_standard_input_and_dtype(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("-", None):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{TEXT}\n".encode())))
        args = ["fill-mask", *([text] if text else []), "--model", str(folder), "--dtype", "bf16", "--json"]
        assert main(args) == 0
        assert json.loads(capsys.readouterr().out)["text"] == TEXT


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("no mask here", [], r"the text holds no \[MASK\]; write it where a word is missing"),
        ("  ", [], r"the text is empty; write one with \[MASK\] in it"),
        ("[MASK]", ["--top-k", "0"], "--top-k must be at least 1, but is 0"),
        ("[MASK]", ["--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (
            "[MASK] " + "x " * 300,
            [],
            r"the text is \d+ tokens long, more than the 64 that this model takes; shorten it",
        ),
        ("[MASK]", ["--model", "nowhere/at-all"], "--model nowhere/at-all does not exist; .*hf download"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, options: list[str], message: str
) -> None:
    assert main(["fill-mask", text, "--model", str(folder), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match(f"alula: error: {message}", err), err


def test_other_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Path(alula.__file__).parent / "assets" / "tiny-python"
    assert main(["fill-mask", "[MASK]", "--model", str(tiny)]) == 2
    assert "is a gpt_bigcode model, which fills no masks; accepted: big_bird" in capsys.readouterr().err
    assert main(["fill-mask", "[MASK]"]) == 2
    assert "--model" in capsys.readouterr().err


def test_an_encoder_generates_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Plants", "--model", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "past_key_values is given to an encoder; it needs a configuration with is_decoder=True" in err
