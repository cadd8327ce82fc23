"""`alula bench model` with an encoder: checked against transformers, timed in turn, records and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alula.bench import encoder_rounds, limits, model_folder, presets, report, run_model
from alula.bench.engine import EngineError, EngineMissing
from alula.bench.peers import ENCODER_PEERS, base
from alula.bench.peers.encoders import AlulaEncoder, HFEncoder
from alula.bench.run import main
from alula.models import AutoModel

MEASURED = limits.Limits(read=10.0, copy=10.0, fp32_fma=100.0, bf16_dot=None)
FIELDS = {
    "kind", "preset", "phase", "dtype", "engine", "weights", "versions", "batch", "prompt_tokens", "correct",
    "max_error", "tolerance", "rounds", "samples", "median_s", "q25_s", "q75_s", "round_medians_s", "work", "rate",
    "unit", "limit", "limit_value", "limit_share", "alula_ratio",
}  # fmt: skip


class FakeEngine:
    """Hidden states that depend on the ids, and fixed times."""

    seconds = {"alula": 0.5, "hf-eager": 2.0, "reference": 1.0, "budget": 1.0}  # noqa: RUF012
    error = 0.0

    def __init__(self, name, work, *, threads, python=None, label=None):
        assert name.startswith("encoder:")
        self.name, self.label = name.removeprefix("encoder:"), label

    def load(self, **setup):
        if self.name == "openvino":
            raise EngineMissing("no module named openvino")
        self.facts = {"versions": {}, "weights": setup["dtype"]}

    def arrays(self, do, *, prompts):
        assert do == "hidden"
        hidden = np.sin(np.array(prompts, dtype=np.float32))[..., None].repeat(4, -1)
        return {"hidden": hidden + (self.error if self.label == "alula" else 0)}

    def ask(self, do, *, prompts):
        assert do == "encode"
        return {"seconds": self.seconds[self.label]}

    def close(self):
        pass


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(encoder_rounds, "Engine", FakeEngine)
    monkeypatch.setattr(run_model, "has_reference", lambda: True)
    monkeypatch.setattr(encoder_rounds, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(limits, "measure", lambda *_: MEASURED)

    def run(*argv: str) -> tuple[int, list[dict[str, Any]]]:
        path = tmp_path / "results.json"
        common = ["--preset", "bigbird-toy", "--dtype", "fp32", "--threads", "1", "--cache", str(tmp_path)]
        return main(["model", *common, "--json", str(path), *argv]), report.read_records(path)

    return run


def test_rounds_make_records_with_ratios(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, (header, *found) = bench("--peers", "hf-eager,openvino", "--rounds", "3")
    assert status == 0
    assert header["config"]["model_type"] == "big_bird"
    assert [(r["phase"], r["engine"], r["prompt_tokens"]) for r in found] == [
        ("encode", "alula", 512),
        ("encode", "hf-eager", 512),
    ]
    assert all(set(record) == FIELDS for record in found)
    assert [record["alula_ratio"] for record in found] == [None, 0.25]
    assert found[0]["rate"] == pytest.approx(found[0]["work"] / 0.5 / 1e9)
    captured = capsys.readouterr()
    assert "openvino: left out: no module named openvino" in captured.err
    assert "alula / it" in captured.out


def test_quantized_weights(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        model_folder, "dequantized", lambda folder, dtype, model: asked.append((dtype, model)) or folder
    )
    status, (_, *found) = bench("--dtype", "int8", "--rounds", "2")
    assert status == 0
    assert asked == [("int8", "AutoModel")]
    assert [(r["engine"], r["correct"], r["rounds"]) for r in found] == [("alula", True, 2), ("hf-eager", True, 2)]
    assert found[0]["limit"] == "int8_dot"


def test_a_wrong_encoder_is_not_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeEngine, "error", 1e-3)
    status, records = bench("--rounds", "1")
    assert status == 1
    assert not any("median_s" in record for record in records)
    assert "alula: wrong, not timed: hidden states differ by 0.001" in capsys.readouterr().err


def test_an_engine_that_fails_is_dropped(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(self, do, **_):
        if self.label == "hf-eager":
            raise EngineError("hf-eager ended in encode with status -9")
        return {"seconds": 1.0}

    monkeypatch.setattr(FakeEngine, "ask", ask)
    status, records = bench("--rounds", "2")
    assert status == 0
    assert [record.get("rounds") for record in records[1:]] == [2, None]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "llama.cpp"], "'llama.cpp' is none of hf-eager, hf-alula, openvino"),
        (["--prompt-tokens", "513"], "--prompt-tokens 513 exceeds the 512 positions of bigbird-toy"),
        (["--context", "9"], "--context is for decoders, and bigbird-toy is an encoder"),
        (["--left-pad"], "--left-pad is for decoders"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    ],
)
def test_arguments_that_cannot_be(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--preset", "bigbird-toy", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_engines_compute_the_same(tmp_path: Path) -> None:
    folder = model_folder.ensure(tmp_path, "bigbird-toy", "fp32")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    state = AutoModel.from_pretrained(folder).state_dict()
    assert {f"bert.{name}" for name in state} == set(index)
    assert sum(value.numel() for value in state.values()) == presets.parameters(presets.ENCODERS["bigbird-toy"])
    threads = torch.get_num_threads()
    setup = base.Setup(folder=folder, work=folder, dtype="fp32", threads=threads, max_tokens=512, batch=2)
    rows = [[7] * 300, list(range(5, 305))]
    ours, theirs = AlulaEncoder(setup), HFEncoder(setup)
    verdict = encoder_rounds.judge(ours.hidden(rows), theirs.hidden(rows), 2e-4)
    assert verdict.correct, verdict.reason

    # int8: near transformers on the values that the weights stand for.
    made = model_folder.dequantized(folder, "int8", "AutoModel")
    values = HFEncoder(dataclasses.replace(setup, folder=made)).hidden(rows)
    rounded = AlulaEncoder(dataclasses.replace(setup, dtype="int8"))
    peer = HFEncoder(dataclasses.replace(setup, dtype="int8"))
    assert (rounded.weights, peer.weights) == ("int8", "bf16")
    allowed = 2 * float(np.abs(values - theirs.hidden(rows)).max())
    verdict = encoder_rounds.judge(rounded.hidden(rows), values, allowed)
    assert verdict.correct, verdict.reason
    assert ours.time_encode(rows) > 0
    assert set(ours.versions) == {"alula", "torch"}
    assert ENCODER_PEERS["alula"] == ("encoders", "AlulaEncoder")
    assert not encoder_rounds.judge(np.zeros((1, 2, 3)), np.zeros((1, 2, 4)), 1.0).correct


def test_work_of_an_encoder() -> None:
    config = presets.ENCODERS["bigbird-base"]
    assert presets.parameters(config) == 127_468_800
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
    pairs = (64 + 4 + 60 * 5 + 4 + 64) * 64 * 64
    assert presets.encoder_flops(config, 4096, 1) == 2 * 4096 * matrices + 4 * pairs * 12 * 768
    assert presets.encoder_flops(config, 704, 2) == 2 * (2 * 704 * matrices + 4 * 704**2 * 12 * 768)
    with pytest.raises(ValueError, match="exceeds the 4096 positions"):
        run_model.make_encoder_workload(_arguments("--prompt-tokens", "4097"), config)


def _arguments(*argv: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    run_model.add_arguments(parser)
    return parser.parse_args(["--preset", "bigbird-base", *argv])
