"""`alula quantize`, `alula evaluate`, and `alula generate --quantize`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import alula
import alula.cache
import pytest
import torch
from alula.cli import main
from alula.evaluation import bits_per_byte, windows_of
from alula.tokenization import AutoTokenizer

pytest.importorskip("tokenizers")

TINY = Path(alula.__file__).parent / "assets" / "tiny-python"
TEXT = '''class Queue:
    """A queue of items; the first in is the first out."""

    def __init__(self, items=()):
        self._items = list(items)

    def put(self, item):
        self._items.append(item)

    def get(self):
        if not self._items:
            raise IndexError("the queue is empty")
        return self._items.pop(0)
'''


@pytest.fixture(autouse=True)
def leave_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "queue.py"
    file.write_text(TEXT * 4)
    return file


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return json.loads(captured.out)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return line


# --- quantize --------------------------------------------------------------------------------------------------------


def test_writes_a_folder_that_loads_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "int4"
    assert main(["quantize", str(TINY), str(out), "--format", "int4", "--group-size", "32", "--keep", "lm_head"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    lines = captured.out.splitlines()
    assert lines[0].startswith("layer ")
    assert lines[1].split()[:2] == ["transformer.wte.weight", "bfloat16"]
    assert "int4, groups of 32" in lines[2]
    assert {file.name for file in TINY.iterdir()} == {file.name for file in out.iterdir()}
    assert (out / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["int4"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "alula",
        "format": "int4",
        "group_size": 32,
        "activations": "int8",
        "modules_to_not_convert": ["transformer.wte.weight"],
    }
    ids = torch.arange(5, 40)[None]
    loaded = alula.AutoModelForCausalLM.from_pretrained(out)
    here = alula.AutoModelForCausalLM.from_pretrained(TINY, quantize="int4", group_size=32, keep="lm_head")
    assert torch.equal(loaded(ids).logits, here(ids).logits)
    assert main(["generate", "def f(x):", "--model", str(out), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    from_folder = capsys.readouterr().out
    options = ["--quantize", "int4", "--group-size", "32", "--keep", "lm_head", "--temperature", "0"]
    assert main(["generate", "def f(x):", *options, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == from_folder


def test_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(TINY), str(tmp_path / "q"), "--format", "int8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"layers", "other_bytes", "total_bytes", "dense_bytes"}
    assert {row["format"] for row in report["layers"]} == {"int8"}
    assert all(0 < row["relative_error"] < 0.02 for row in report["layers"])
    size = (tmp_path / "q" / "model.safetensors").stat().st_size
    assert report["total_bytes"] < size < report["total_bytes"] + 16384


def test_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = alula.BigBirdConfig(vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    alula.BigBirdForTokenClassification(config).save_pretrained(tmp_path / "in")
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "int8"]) == 0
    assert "classifier" in capsys.readouterr().out
    assert alula.BigBirdForTokenClassification.from_pretrained(tmp_path / "out").is_quantized


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there"
    there.mkdir()
    assert "exists; give a folder that does not" in error_of(capsys, "quantize", TINY, there, "--format", "int8")
    missing = tmp_path / "no" / "out"
    assert "make it first" in error_of(capsys, "quantize", TINY, missing, "--format", "int8")
    new = tmp_path / "new"
    assert "--format is missing" in error_of(capsys, "quantize", TINY, new)
    assert "invalid choice: 'int3'" in error_of(capsys, "quantize", TINY, new, "--format", "int3")
    line = error_of(capsys, "quantize", TINY, new, "--format", "int4", "--group-size", "7")
    assert "group_size 7 does not go with format 'int4'; accepted: 32, 64, 128" in line
    line = error_of(capsys, "quantize", tmp_path / "nothing", new, "--format", "int8")
    assert f"error: IN {tmp_path / 'nothing'} does not exist; give a folder" in line
    assert main(["quantize", str(TINY), str(new), "--format", "int8"]) == 0
    capsys.readouterr()
    twice = error_of(capsys, "quantize", new, tmp_path / "twice", "--format", "int4")
    assert "quantized already (int8), and cannot be quantized twice" in twice
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "there"]
    line = error_of(capsys, "generate", "x", "--group-size", "32")
    assert "--group-size goes with --quantize FORMAT" in line


def test_a_failure_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("shutil.copyfile", fail)
    line = error_of(capsys, "quantize", TINY, tmp_path / "out", "--format", "int8")
    assert line.endswith(f"error: {tmp_path / 'out'} cannot be written: disk full")
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "quantize", TINY, "/proc/model", "--format", "int8")
    assert line.endswith("error: /proc/model cannot be written: No such file or directory")


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_windows_score_every_token_once() -> None:
    for count in (1, 5, 8, 9, 23):
        for window, stride in ((8, 4), (8, 8), (8, 1), (3, 2)):
            scored = []
            for first, end, new in windows_of(count, window, stride):
                assert 0 < new <= end - first <= window
                assert first == 0 or end - first - new >= window - stride
                scored += range(end - new, end)
            assert scored == list(range(count))


def test_bits_per_byte_is_the_likelihood(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = alula.AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(TEXT)]])
    nats = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="sum")
    score = bits_per_byte(model, tokenizer, TEXT)
    assert (score.tokens, score.bytes) == (ids.shape[1] - 1, len(TEXT))
    assert score.bits_per_byte == pytest.approx(nats.item() / math.log(2) / len(TEXT), rel=1e-6)
    # In pieces: with less context, a little more.
    pieces = bits_per_byte(model, tokenizer, TEXT, window=32, stride=8)
    assert (pieces.tokens, pieces.bytes) == (score.tokens, score.bytes)
    assert score.bits_per_byte < pieces.bits_per_byte < 1.5 * score.bits_per_byte
    tokenizer.bos_token = tokenizer.eos_token = None  # then the first token is given, and is not scored
    rest = bits_per_byte(model, tokenizer, TEXT)
    first = tokenizer.decode(tokenizer.encode(TEXT)[:1])
    assert (rest.tokens, rest.bytes) == (score.tokens - 1, len(TEXT) - len(first))
    report = evaluate(capsys, "--text", text, text)
    assert report["tokens"] == 2 * len(tokenizer.encode(text.read_text()))
    assert report["bytes"] == 2 * text.stat().st_size
    assert (report["weights"], report["activations"]) == ("bfloat16", "full")
    assert main(["evaluate", "--text", str(text), str(text)]) == 0
    assert capsys.readouterr().out.startswith(f"{report['bits_per_byte']:.4f} bits per byte ({report['tokens']} tokens")


def test_formats_cost_little(capsys: pytest.CaptureFixture[str]) -> None:
    """Code that the model has not seen and that repeats nothing; less of it than the held-out files, so the bounds are
    wider than what is claimed of those."""
    text = alula.cache.__file__
    plain = evaluate(capsys, "--text", text)["bits_per_byte"]
    for options, rise in ((["int8"], 0.003), (["int4_asymmetric", "--group-size", "32"], 0.02), (["nf4"], 0.04)):
        report = evaluate(capsys, "--text", text, "--quantize", *options)
        assert abs(report["bits_per_byte"] / plain - 1) < rise
        assert report["weights"].startswith(options[0])
        assert report["weight_bytes"] < 4e6


def test_evaluate_refusals(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("")
    binary.write_bytes(b"ab\xff")
    assert "is empty" in error_of(capsys, "evaluate", "--text", empty)
    assert "is not UTF-8 text: byte 0xff at 2" in error_of(capsys, "evaluate", "--text", binary)
    assert "cannot be read" in error_of(capsys, "evaluate", "--text", tmp_path / "none")
    assert "window is 513; accepted: 1 to 512" in error_of(capsys, "evaluate", "--text", text, "--window", "513")
    assert "stride is 65" in error_of(capsys, "evaluate", "--text", text, "--window", "64", "--stride", "65")
