"""The benchmarks: wrong results are rejected and not timed, records and tables have their form."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from alula.bench import limits, measure, model_check, model_folder, model_rounds, presets, report, run_model, run_ops
from alula.bench.cases import OPS, linear
from alula.bench.engine import Engine, EngineError, EngineMissing
from alula.bench.plot import collect
from alula.bench.run import main

MEASURED = limits.Limits(read=10.0, copy=10.0, fp32_fma=100.0, bf16_dot=None)
OP_FIELDS = {
    "kind", "op", "case", "dtype", "engine", "correct", "median_s", "q25_s", "q75_s", "samples",
    "work", "rate", "unit", "limit", "limit_value", "limit_share", "alula_ratio",
}  # fmt: skip
MODEL_FIELDS = {
    "kind", "preset", "phase", "dtype", "engine", "weights", "versions", "batch", "left_pad", "prompt_tokens",
    "context", "new_tokens", "correct", "max_error", "tolerance", "equal_tokens", "rounds", "samples",
    "median_s", "q25_s", "q75_s", "round_medians_s", "work", "rate", "unit", "limit", "limit_value",
    "limit_share", "alula_ratio",
}  # fmt: skip


# ---- measuring


def test_contestants_take_turns_after_a_warm_up():
    calls = []
    timings = measure.interleave(
        {name: lambda name=name: calls.append(name) for name in "ab"}, seconds=0.0, min_rounds=3, warmup=1
    )
    assert "".join(calls) == "ab" + "ababab"
    assert {len(timing.samples) for timing in timings.values()} == {3}


def test_summary_is_median_and_quartiles_and_the_ratio_is_paired():
    timing = measure.Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 4.0))
    assert timing.spread == pytest.approx(1 / 3)
    drifting = measure.Timing((2.0, 4.0, 6.0, 8.0, 200.0))
    assert measure.paired_ratio(timing, drifting) == 0.5


def test_limits_are_positive_and_a_missing_peak_is_said(monkeypatch):
    assert limits.copy_bandwidth(2, 0.01, buffer_bytes=1 << 20) > 0
    assert "bf16 dot n/a" in MEASURED.line()
    assert limits.peak_gflops("fp32_fma", 2, 0.01) > 0
    monkeypatch.setattr("alula._C.peak_gflops", lambda kind, seconds: 0.0)  # no such instruction
    assert limits.peak_gflops("bf16_dot", 2, 0.01) is None


# ---- ops


def quick_case():
    return linear.cases(True)[0]


def records_of(case):
    args = run_ops_arguments("--quick")
    return list(run_ops.measure_case(case, MEASURED, args))


def run_ops_arguments(*argv):
    import argparse

    parser = argparse.ArgumentParser()
    run_ops.add_arguments(parser)
    return parser.parse_args([*argv])


def test_a_right_op_is_timed_with_its_share_of_the_limit():
    ours, torchs = records_of(quick_case())
    assert set(ours) == set(torchs) == OP_FIELDS
    assert (ours["engine"], ours["correct"], ours["alula_ratio"]) == ("alula", True, None)
    assert ours["limit_share"] > torchs["limit_share"] / 100 > 0
    assert torchs["alula_ratio"] > 0


def test_memory_is_looked_at_before_each_block_of_rounds(monkeypatch):
    case = quick_case()
    assert case.bound == "read"
    times = iter([{"alula": (2.0, 4.0, 6.0), "torch": (8.0,) * 3}, {"alula": (1.0, 1.0, 5.0), "torch": (8.0,) * 3}])

    def interleave(contestants, **_):
        return {name: measure.Timing(taken) for name, taken in next(times).items()}

    rates = iter([3.0, 12.0])
    monkeypatch.setattr(run_ops, "interleave", interleave)
    monkeypatch.setattr(limits.Yardstick, "rate", lambda self: next(rates))
    ours, torchs = records_of(case)
    assert (ours["samples"], ours["median_s"], ours["limit_value"]) == (6, 3.0, 7.5)
    work = case.work / 1e9
    assert ours["limit_share"] == pytest.approx((work / 4 / 3 + work / 1 / 12) / 2)
    assert torchs["limit_share"] == pytest.approx((work / 8 / 3 + work / 8 / 12) / 2)


def test_arithmetic_is_held_against_the_peak_of_the_run(monkeypatch):
    case = dataclasses.replace(quick_case(), bound="fp32_fma")
    ours, _ = records_of(case)
    assert ours["limit_value"] == MEASURED.fp32_fma
    assert ours["limit_share"] == pytest.approx(ours["work"] / ours["median_s"] / 1e9 / MEASURED.fp32_fma)


@pytest.mark.parametrize(("bound", "times"), [("read", 1), ("copy", 2)])
def test_a_yardstick_moves_its_bytes(bound, times):
    yardstick = limits.yardstick(bound, 2, quick=True)
    assert yardstick.work == times * limits.QUICK_BUFFER_BYTES
    assert len(yardstick.ways) == 2
    assert yardstick.rate() > 0
    assert limits.yardstick("bf16_dot", 2) is None


@pytest.mark.parametrize("off_by", [1e-3, float("nan")])
def test_a_wrong_op_is_reported_and_not_timed(off_by, monkeypatch, capsys, tmp_path):
    case = quick_case()
    right = case.prepare["alula"]

    def wrong(inputs):
        call = right(inputs)

        def add_an_error():
            y = call()
            y[..., 3] += off_by
            return y

        return add_an_error

    broken = dataclasses.replace(case, prepare={**case.prepare, "alula": wrong})
    monkeypatch.setitem(OPS, "linear", lambda quick: [broken])
    path = tmp_path / "results.json"
    assert main(["ops", "--op", "linear", "--quick", "--threads", "1", "--json", str(path)]) == 1
    header, ours, torchs = report.read_records(path)
    assert header["kind"] == "run"
    assert not ours["correct"]
    assert "median_s" not in ours
    assert "median_s" not in torchs
    assert "alula" in ours["error"]
    assert "WRONG" in capsys.readouterr().out


def test_a_wrong_peer_is_left_out():
    case = quick_case()
    broken = dataclasses.replace(case, prepare={**case.prepare, "torch": lambda inputs: lambda: torch.zeros(1, 512)})
    ours, torchs = records_of(broken)
    assert "median_s" in ours
    assert not torchs["correct"]
    assert "median_s" not in torchs


def test_buffers_rotate_where_memory_is_the_bound(monkeypatch):
    monkeypatch.setattr(run_ops, "last_level_cache_bytes", lambda: 1 << 20)
    case = quick_case()
    seen = []
    counting = dataclasses.replace(case, prepare={"alula": lambda inputs: lambda: seen.append(inputs["x"].data_ptr())})
    call = run_ops.rotating(counting, "alula", case.make(torch.Generator()))
    for _ in range(16):
        call()
    assert len(set(seen)) == 8  # 4 MiB of buffers of 0.5 MiB each


def test_every_op_has_cases_in_both_dtypes_and_names_are_unique():
    for op, cases in OPS.items():
        for quick in (False, True):
            found = cases(quick)
            assert {case.op for case in found} == {op}
            assert {case.dtype_name for case in found} == {"fp32", "bf16"}
            assert len({(case.name, case.dtype) for case in found}) == len(found)
    names = {case.name for case in linear.cases(False)}
    assert {"many rows 512x2048x8192", "one row 1x8192x8192", "8 rows 8x8192x8192"} <= names


# ---- presets and folders


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_family_counts_what_its_tensors_hold(name):
    config = presets.PRESETS[name]
    of = presets.family(config)
    specs = [spec for group in of.tensors(config) for spec in group]
    assert len({spec.name for spec in specs}) == len(specs)
    matrices = {spec.name: int(np.prod(spec.shape)) for spec in specs if len(spec.shape) == 2}
    table = matrices.pop("transformer.wte.weight")
    assert matrices.pop("lm_head.weight", table) == table == of.head_elements(config)
    matrices.pop("transformer.wpe.weight", None)
    assert sum(matrices.values()) == of.matrix_elements(config)


def test_published_sizes():
    assert presets.parameters(presets.PRESETS["santacoder"]) == 1_124_886_528
    assert presets.parameters(presets.PRESETS["starcoder"]) == 15_517_456_384
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, size in {**sizes, "codegen-350m": 356_712_448, "codegen-2b": 2_779_356_160}.items():
        assert presets.parameters(presets.PRESETS[name]) == size, name


def test_work_of_a_step_and_of_a_prompt():
    config = presets.PRESETS["toy"]  # L2 E64 H4 F256 V512, one key/value head of 16
    matrices = 2 * 64 * (64 + 32 + 64 + 2 * 256)
    assert presets.step_bytes(config, 2, batch=3, context=10) == 2 * (matrices + 512 * 64 + 3 * 10 * 2 * 32)
    block = matrices // 2  # of the last one, keys and values for all tokens and the rest for one
    products = 5 * block + 5 * 64 * 32 + (block - 64 * 32)
    assert presets.prefill_flops(config, [5]) == 2 * products + 4 * (5 * 6 // 2 + 5) * 64 + 2 * 512 * 64


def test_a_folder_is_a_checkpoint_and_is_the_same_every_time(tmp_path):
    from safetensors.torch import load_file

    first = model_folder.ensure(tmp_path / "a", "toy", "bf16")
    second = model_folder.ensure(tmp_path / "b", "toy", "bf16")
    index = json.loads((first / "model.safetensors.index.json").read_text())
    weights = load_file(first / index["weight_map"]["transformer.wte.weight"])
    assert set(index["weight_map"]) == set(weights)
    assert sum(tensor.numel() for tensor in weights.values()) == presets.parameters(presets.PRESETS["toy"])
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    for file in first.glob("*.safetensors"):
        assert file.read_bytes() == (second / file.name).read_bytes()


# ---- models: the check


def logits_and_tokens(steps=3, batch=2, vocabulary=7):
    logits = np.random.default_rng(0).normal(size=(steps, batch, vocabulary)).astype(np.float32)
    return logits, logits.argmax(-1)


def test_equal_logits_and_tokens_are_right():
    logits, tokens = logits_and_tokens()
    verdict = model_check.judge(logits + 1e-4, tokens, logits, tokens, 2e-4)
    assert verdict.correct
    assert (verdict.equal_tokens, verdict.tokens) == (6, 6)


@pytest.mark.parametrize("error", [1e-3, np.nan, np.inf])
def test_one_logit_that_is_off_is_wrong(error):
    scored, tokens = logits_and_tokens()
    logits = scored.copy()
    logits[1, 1, 4] += error
    verdict = model_check.judge(logits, tokens, scored, tokens, 2e-4)
    assert not verdict.correct
    assert "logits differ" in verdict.reason


def test_a_token_that_is_not_the_best_is_wrong():
    scored, tokens = logits_and_tokens()
    other = tokens.copy()
    other[2, 0] = scored[2, 0].argmin()
    verdict = model_check.judge(scored, other, scored, tokens, 2e-4)
    assert not verdict.correct
    assert "greedy token" in verdict.reason


def test_another_shape_is_wrong():
    logits, tokens = logits_and_tokens()
    assert not model_check.judge(logits[..., :-1], tokens, logits, tokens, 1.0).correct


def test_alula_is_held_to_more_than_its_peers():
    assert model_check.tolerance("alula", "fp32", 0.0, 5.0) == 2e-4
    for dtype in ("fp32", "bf16"):
        ours, theirs = (model_check.tolerance(name, dtype, 0.02, 5.0) for name in ("alula", "hf-sdpa"))
        assert ours < theirs


# ---- models: the rounds, with engines that are not there


class FakeEngine:
    """Logits are a function of the last token; `alula` is wrong by `error`; steps take as long as `seconds` says."""

    error = 0.0
    seconds = {"alula": 0.5, "hf-sdpa": 2.0}  # noqa: RUF012
    started = []  # noqa: RUF012

    def __init__(self, name, work, *, threads, python=None, label=None):
        self.name, self.label = name, label or name
        self.started.append(self.label)

    def load(self, **setup):
        if self.name == "openvino":
            raise EngineMissing("no module named openvino")
        self.facts = {"versions": {}, "weights": setup["dtype"]}

    def arrays(self, do, *, prompts=None, steps=None, sequences=None, last=None):
        def row(token):
            return np.roll(np.linspace(0, 3, 512, dtype=np.float32), 7 * token)

        if do == "score":
            return {"logits": np.stack([np.stack([row(t) for t in s[-last:]]) for s in sequences], axis=1)}
        tokens, logits = [prompt[-1] for prompt in prompts], []
        chosen = []
        for _ in range(steps + 1):
            logits.append(np.stack([row(token) for token in tokens]))
            tokens = [int(r.argmax()) for r in logits[-1]]
            chosen.append(tokens)
        return {"logits": np.stack(logits) + (self.error if self.name == "alula" else 0), "tokens": np.array(chosen)}

    def ask(self, do, *, prompts, steps=None):
        taken = self.seconds[self.name]
        return {"seconds": 10 * taken if do == "prefill" else [taken] * steps}

    def close(self):
        pass


@pytest.fixture
def fake_engines(monkeypatch, tmp_path):
    monkeypatch.setattr(model_rounds, "Engine", FakeEngine)
    monkeypatch.setattr(run_model, "has_reference", lambda: True)
    monkeypatch.setattr(model_rounds, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(limits, "measure", lambda *_: MEASURED)
    monkeypatch.setattr(limits, "read_bandwidth", lambda *_: 8.0)

    def bench(*argv):
        path = tmp_path / "results.json"
        common = ["--preset", "toy", "--dtype", "fp32", "--threads", "1", "--cache", str(tmp_path), "--json", str(path)]
        return main(["model", *common, *argv]), report.read_records(path)

    return bench


def test_rounds_make_records_with_ratios(fake_engines, capsys):
    status, records = fake_engines("--peers", "hf-sdpa,openvino", "--rounds", "3", "--prompt-tokens", "16")
    header, *found = records
    assert status == 0
    assert header["limits"]["read"] == 10.0
    assert [(r["phase"], r["engine"]) for r in found] == [
        (phase, engine) for phase in ("decode", "prefill") for engine in ("alula", "hf-sdpa")
    ]
    assert all(set(record) == MODEL_FIELDS for record in found)
    assert [record["alula_ratio"] for record in found] == [None, 0.25, None, 0.25]
    assert found[0]["median_s"] == 0.5
    assert found[0]["limit_value"] == 10.0
    captured = capsys.readouterr()
    assert "openvino: left out: no module named openvino" in captured.err
    assert "alula / it" in captured.out


def test_without_transformers_nothing_begins(fake_engines, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_model, "has_reference", lambda: False)
    common = ["--preset", "toy", "--dtype", "fp32", "--threads", "1", "--cache", str(tmp_path / "cache")]
    assert main(["model", *common]) == 2
    assert "compares with transformers, which is missing" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_reference_that_fails_is_said(fake_engines, monkeypatch, capsys):
    def fail(engine, **setup):
        raise EngineError("reference failed in load: no memory")

    monkeypatch.setattr(FakeEngine, "load", fail)
    status, (header,) = fake_engines("--peers", "hf-sdpa", "--rounds", "1", "--prompt-tokens", "16")
    assert status == 2
    assert header["preset"] == "toy"
    assert "alula bench model: reference failed in load: no memory" in capsys.readouterr().err


def test_several_contexts_are_timed_in_turn(fake_engines, monkeypatch, capsys):
    asked = []

    def ask(self, do, *, prompts, steps=None):
        asked.append((self.name, do, len(prompts[0])))
        taken = self.seconds[self.name] * (1.0 if len(prompts[0]) < 40 else 1.25)
        return {"seconds": taken if do == "prefill" else [taken] * steps}

    monkeypatch.setattr(FakeEngine, "ask", ask)
    flags = ["--rounds", "3", "--prompt-tokens", "16", "--context", "8,40,8"]
    status, records = fake_engines("--peers", "hf-sdpa", *flags)
    assert status == 0
    assert asked[-8:] == [
        (name, *call)
        for name in ("alula", "hf-sdpa")
        for call in (("prefill", 16), ("prefill", 16), ("decode", 8), ("decode", 40))
    ]
    assert [(r["phase"], r["context"], r["engine"], r["median_s"]) for r in records[1:]] == [
        ("decode", 8, "alula", 0.5),
        ("decode", 8, "hf-sdpa", 2.0),
        ("decode", 40, "alula", 0.625),
        ("decode", 40, "hf-sdpa", 2.5),
        ("prefill", 8, "alula", 0.5),
        ("prefill", 8, "hf-sdpa", 2.0),
    ]
    assert [r["alula_ratio"] for r in records[1:]] == [None, 0.25] * 3
    assert records[3]["work"] > records[1]["work"]
    out = capsys.readouterr().out
    assert "decode @ 40" in out
    for name in ("alula", "hf-sdpa"):
        assert f"{name}: a step after 40 tokens takes 1.250 x the time of one after 8" in out


def test_a_wrong_model_is_not_timed(fake_engines, monkeypatch, capsys):
    monkeypatch.setattr(FakeEngine, "error", 1e-3)
    status, records = fake_engines("--peers", "hf-sdpa", "--rounds", "1")
    assert status == 1
    assert [record["correct"] for record in records[1:] if record["engine"] == "alula"] == [False, False]
    assert not any("median_s" in record for record in records)
    captured = capsys.readouterr()
    assert "alula: wrong, not timed: logits differ" in captured.err
    assert "WRONG" in captured.out


def test_an_engine_that_fails_while_it_is_timed_is_dropped(fake_engines, monkeypatch, capsys):
    asked = []
    working = FakeEngine.ask

    def ask(self, do, **arguments):
        asked.append(self.name)
        if self.name == "hf-sdpa" and asked.count("hf-sdpa") == 5:
            raise EngineError("hf-sdpa ended in decode with status -9")
        return working(self, do, **arguments)

    monkeypatch.setattr(FakeEngine, "ask", ask)
    status, records = fake_engines("--peers", "hf-sdpa", "--rounds", "3")
    assert status == 0
    assert [record.get("rounds") for record in records[1:]] == [3, None, 3, None]
    assert "hf-sdpa: failed: hf-sdpa ended" in capsys.readouterr().err


def test_an_interrupt_keeps_the_whole_rounds(fake_engines, monkeypatch, capsys):
    asked = []

    def ask(self, do, **arguments):
        asked.append(do)
        if len(asked) == 20:  # in the second round after the warm-up
            raise KeyboardInterrupt
        return {"seconds": 1.0 if do == "prefill" else [1.0]}

    monkeypatch.setattr(FakeEngine, "ask", ask)
    status, records = fake_engines("--peers", "hf-sdpa", "--rounds", "9")
    assert status == 130
    assert {record["rounds"] for record in records[1:]} == {2}
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "hf-sdpa,tgi"], "'tgi' is none of"),
        (["--prompt-tokens", "4096"], "exceed the 2048 positions"),
        (["--preset", "gpt2", "--context", "128,1000"], "4 more) exceed the 1024 positions of gpt2"),
        (["--context", "128,0"], "--context must be at least 1, not 0"),
        (["--batch", "0"], "--batch must be at least 1, not 0"),
        (["--no-alula", "--peers", "none"], "nothing to time"),
    ],
)
def test_arguments_that_cannot_be(argv, message, capsys):
    assert main(["model", *argv]) == 2
    assert message in capsys.readouterr().err


def test_engines_are_grouped_by_memory():
    config = presets.PRESETS["santacoder"]
    names = ["alula", "hf-sdpa", "llama.cpp", "ctranslate2"]
    assert model_rounds.plan_groups(names, config, "bf16", 64 << 30) == [names]
    tight = model_rounds.plan_groups(names, config, "bf16", 18 << 30)
    assert all(group[0] == "alula" for group in tight)
    assert [name for group in tight for name in group[1:]] == names[1:]
    assert len(tight) > 1
    assert model_rounds.plan_groups(["alula"], config, "bf16", 0) == [["alula"]]


def test_prompts_are_unequal_only_when_padded():
    import argparse

    parser = argparse.ArgumentParser()
    run_model.add_arguments(parser)
    for flags, lengths in ((["--batch", "4"], {64}), (["--batch", "4", "--left-pad"], None)):
        args = parser.parse_args([*flags, "--prompt-tokens", "64", "--context", "64"])
        workload = run_model.make_workload(args, presets.PRESETS["toy"])
        found = {len(prompt) for prompt in workload.prompts}
        assert found == lengths if lengths else len(found) > 1
        assert max(found) == 64
        assert workload.prompts == run_model.make_workload(args, presets.PRESETS["toy"]).prompts


# ---- models: real engines


def test_an_engine_that_is_not_installed_is_missing(tmp_path):
    pytest.importorskip("transformers")
    folder = model_folder.ensure(tmp_path, "toy", "fp32")
    setup = {"folder": folder, "work": folder, "dtype": "fp32", "threads": 1, "max_tokens": 32, "batch": 2}
    with Engine("llama.cpp", tmp_path, threads=1) as engine, pytest.raises(EngineMissing):
        engine.load(**setup)  # not installed, or asked for a batch that it does not do


def test_alula_against_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    path = tmp_path / "results.json"
    flags = ["--preset", "toy", "--dtype", "fp32", "--batch", "2", "--left-pad", "--prompt-tokens", "24", "--quick"]
    status = main(["model", *flags, "--peers", "none", "--threads", "1", "--cache", str(tmp_path), "--json", str(path)])
    assert status == 0, capsys.readouterr().err
    decode, prefill = report.read_records(path)[1:]
    assert decode["correct"]
    assert decode["max_error"] < 2e-4
    assert prefill["median_s"] > 0


# ---- reports


def test_table_is_of_fixed_width():
    text = report.table(("case", "time"), [("a", "1 ms"), (), ("longer", "20 ms")])
    assert text.splitlines() == ["case     time", "------  -----", "a        1 ms", "", "longer  20 ms"]


def test_units():
    assert [report.seconds(value) for value in (1.5, 0.0123456, 4.2e-6)] == ["1.5 s", "12.35 ms", "4.2 us"]
    assert (report.share(0.905), report.share(None)) == ("90 %", "n/a")
    assert (report.times(0.4), report.times(None)) == ("0.400", "-")


def test_a_file_that_holds_no_records_is_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text('{"kind": "run"}\nnot json\n')
    with pytest.raises(ValueError, match=r"line 2: not JSON"):
        report.read_records(path)
    assert main(["plot", str(path), "--out", str(tmp_path / "out.png")]) == 2
    assert "line 2" in capsys.readouterr().err


def test_charts(tmp_path):
    path = tmp_path / "results.json"
    recorder = report.Recorder(path)
    for record in [{"kind": "run"}, *records_of(quick_case())]:
        recorder.add(record)
    recorder.close()
    panels = collect(report.read_records(path))
    groups, unit = panels["linear"]
    assert unit == "% of the limit"
    assert [[bar[0] for bar in bars] for bars in groups.values()] == [["alula", "torch"]]
    pytest.importorskip("matplotlib")
    assert main(["plot", str(path), "--out", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
