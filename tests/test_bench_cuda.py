"""`alula bench cuda` and tests/gpu/prove.py on a CPU, at tiny sizes: that they work, not how fast anything is."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from alula.bench.cuda import models, quantized
from alula.bench.cuda.timing import Bench, Case, line_of, measure
from alula.bench.run import main
from alula.bench.run_cuda import MAKERS

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
ROOT = Path(__file__).resolve().parent.parent
BENCH = Bench(torch.device("cpu"), quick=True)
LIMITS = {"copy GB/s": 10.0, "bf16 product TFLOP/s": 1.0}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_cases_are_right(make) -> None:
    with torch.inference_mode():
        for case in make(BENCH):
            assert next(iter(case.contestants)) == "alula"
            row = measure(BENCH, case, 1, LIMITS)
            assert not row["wrong"]
            assert set(row["us"]) == set(case.contestants)
            assert case.name in line_of(row)


def test_a_wrong_result_is_not_timed() -> None:
    case = Case("wrong", {"alula": lambda _: torch.ones(3), "torch": lambda _: torch.zeros(3)}, 1, 1.0)
    row = measure(BENCH, case, 1, LIMITS)
    assert "differs by" in row["wrong"]
    assert not row["us"]
    assert "WRONG" in line_of(row)


def test_the_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "out.json"
    assert main(["cuda", "--device", "cpu", "--quick", "--rounds", "1", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert len(results["cases"]) == len(MAKERS) - 1 + 2 * len(quantized.FORMATS)
    engines = [sorted(row["ms"]) for row in results["models"]]
    assert engines == [["alula", "hf compiled", "hf eager", "hf sdpa"]] * 2 + [["alula", "alula bf16"]]
    assert results["models"][2]["logits differ by"] < 0.1
    assert "dry run" in capsys.readouterr().out
    assert main(["cuda", "--device", "cpu"]) == 2


def test_peers_that_fail_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    def fail(ids, count):
        raise TypeError("an argument that this version does not know")

    monkeypatch.setattr(models, "_hf_compiled", lambda *args: fail)
    row = models.run(BENCH, "tiny B1", LIMITS, float("inf"))[0]
    assert "argument that this version" in row["missing"]["hf compiled"]
    assert sorted(row["ms"]) == ["alula", "hf eager", "hf sdpa"]


@pytest.fixture
def prove() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prove", ROOT / "tests" / "gpu" / "prove.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_whole_proof_as_a_dry_run(prove: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def note_command(self, name, command, limit):
        commands.append((name, command))
        return self.note(name, True), "12 passed, 3 skipped"

    monkeypatch.setattr(prove.Proof, "run", note_command)
    out = tmp_path / "result.json"
    assert prove.main(["--dry-run", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["gpu"] == "No GPU (dry run)"
    assert results["tests"] == {"passed": 12, "skipped": 3}
    assert [step["step"] for step in results["steps"]] == ["tests", "benchmark of ops", "benchmark of models"]
    compile(commands[1][1][-1], "benchmark", "exec")
    if not torch.cuda.is_available():
        assert prove.main([]) == 2


@pytest.mark.parametrize("hears", [True, False])
def test_a_step_out_of_time_is_asked_for_what_it_knows(
    hears: bool, prove: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "GRACE", 30.0 if hears else 0.5)
    program = f"""if True:
        import signal, time
        print("begun", flush=True)
        signal.signal(signal.SIGINT, signal.{"default_int_handler" if hears else "SIG_IGN"})
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print("3 passed")
    """
    status, output = prove._run([sys.executable, "-c", program], 3.0)
    assert status == 124
    assert output.split("\n") == ["begun", *(["3 passed"] if hears else []), "", "stopped after 3 s"]
