"""`alula bench model --through transformers`: which engines run, what is said of them, and that they are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from alula.bench import model_check, model_folder, presets, through
from alula.bench.engine import Engine
from alula.bench.peers import ENCODER_PEERS, PEERS


def test_which_engines() -> None:
    assert through.engine_names(presets.config_of("santacoder"), False) == ["hf-alula", "hf-sdpa"]
    assert through.engine_names(presets.config_of("codegen-350m"), False) == ["hf-alula", "hf-eager"]
    assert through.engine_names(presets.config_of("bigbird-base"), True) == ["hf-alula", "hf-eager"]
    assert "hf-alula" in PEERS
    assert "hf-alula" in ENCODER_PEERS


def test_it_is_held_to_what_alula_is_held_to() -> None:
    for dtype in ("fp32", "bf16"):
        ours, theirs = (model_check.tolerance(name, dtype, 0.01, 8.0) for name in ("hf-alula", "hf-sdpa"))
        assert ours == model_check.tolerance("alula", dtype, 0.01, 8.0) < theirs


def test_summary() -> None:
    def record(engine: str, *medians: float) -> dict:
        return {"phase": "decode", "engine": engine, **({"round_medians_s": list(medians)} if medians else {})}

    lines = through.summary([record("alula", 0.9, 1.8, 2.7), record("hf-alula", 1, 2, 3), record("hf-sdpa", 3, 6, 9)])
    assert lines == [
        "decode: accelerated runs at 0.90 x the speed of alula's own class",
        "decode: accelerated runs at 3.00 x the speed of hf-sdpa, plain",
    ]
    assert through.summary([record("alula", 1.0), record("hf-alula")]) == []


@pytest.mark.parametrize("preset", ["toy"])
def test_the_engine_computes_the_model(preset: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = model_folder.ensure(tmp_path, preset, "fp32")
    setup = {"folder": folder, "work": folder, "dtype": "fp32", "threads": 1, "max_tokens": 32, "batch": 2}
    prompts = [[5, 6, 7, 8], [9, 10]]
    found = {}
    for name in ("hf-alula", "hf-eager"):
        with Engine(name, tmp_path, threads=1) as engine:
            facts = engine.load(**setup)
            found[name] = engine.arrays("greedy", prompts=prompts, steps=4)
            assert ("alula" in facts["versions"]) == (name == "hf-alula")
    assert (found["hf-alula"]["tokens"] == found["hf-eager"]["tokens"]).all()
    assert abs(found["hf-alula"]["logits"] - found["hf-eager"]["logits"]).max() < model_check.FP32_TOLERANCE
