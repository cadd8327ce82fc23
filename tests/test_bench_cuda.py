"""`alula bench cuda` and tests/gpu/prove.py on a CPU, at tiny sizes: that they work, not how fast anything is."""

import importlib.util
import json
import re
import subprocess
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
    peers = ["hf eager", "hf sdpa"]
    assert engines == [["alula", "hf compiled", *peers]] * 2 + [["alula", *peers], ["alula", "alula bf16"]]
    assert [row["model"] for row in results["models"]][2] == "tiny B3 T9 bf16 left-padded"
    assert results["models"][3]["logits differ by"] < 0.1
    assert "dry run" in capsys.readouterr().out
    assert main(["cuda", "--device", "cpu"]) == 2


def test_peers_that_fail_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    def fail(ids, count):
        raise TypeError("an argument that this version does not know")

    monkeypatch.setattr(models, "_hf_compiled", lambda *args: fail)
    row = next(models.run(BENCH, "tiny B1", LIMITS, float("inf")))
    assert "argument that this version" in row["missing"]["hf compiled"]
    assert sorted(row["ms"]) == ["alula", "hf eager", "hf sdpa"]


@pytest.mark.parametrize("only, large", [("", False), ("B1", False), ("starcoder", True), ("starcoder B1", True)])
def test_a_model_of_31_gb_is_made_only_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch, only: str, large: bool
) -> None:
    def fail(*args):
        raise RuntimeError("not made")

    for name in ("_contestants", "_dense"):
        monkeypatch.setattr(models, name, fail)
    rows = models.run(Bench(torch.device("cpu"), quick=False), only, LIMITS, float("inf"))
    names = [row["model"] for row in rows]
    assert ("starcoder B1 T128 bf16" in names) == large
    assert ("santacoder B1 T128 bf16" in names) == (not large)


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
        return self.note(name, True), "12 passed, 3 skipped in 1.00s"

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


def test_tests_go_on_behind_one_that_the_gpu_did_not_survive(
    prove: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = iter(
        [
            (
                False,
                "..F\n!! the GPU is lost after tests/gpu/test_ops.py::test_b[1-fp32] !!\n1 failed, 2 passed in 3.20s",
            ),
            (True, "....\n= GPU tests: 4 passed, 0 failed, none skipped =\n4 passed in 61.00s (0:01:01)"),
        ]
    )
    commands = []
    monkeypatch.setattr(prove.Proof, "run", lambda self, name, command, limit: commands.append(command) or next(said))
    out = tmp_path / "out.json"
    proof = prove.Proof(60, out, {"gpu": "some"})
    prove.tests(proof, is_dry=False)
    assert "--after" not in commands[0]
    files = [Path(argument).name for argument in commands[0] if argument.endswith(".py")]
    assert files[:2] == ["test_models.py", "test_ops.py"]
    assert set(files) == {file.name for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert commands[1][-2:] == ["--after", "tests/gpu/test_ops.py::test_b[1-fp32]"]
    assert json.loads(out.read_text()) == {"gpu": "some", "tests": {"failed": 1, "passed": 6}, "steps": []}


def test_a_lost_gpu_ends_the_tests_and_those_behind_are_found(tmp_path: Path) -> None:
    """pytest itself, over tests of which one leaves the GPU unusable."""
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text((ROOT / "tests" / "gpu" / "conftest.py").read_text())
    (folder / "test_some.py").write_text(
        "import torch\n"
        "def lost(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "torch.cuda.is_available, torch.cuda.synchronize = lambda: True, lambda: None\n"
        "from alula import _C\n"
        "_C.build_info = lambda: {'cuda': '13.0'}\n"
        "def test_a(): pass\n"
        "def test_b(): torch.cuda.synchronize = lost\n"
        "def test_c(): assert torch.cuda.synchronize is lost\n"
        "def test_d(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]

    def run(*options: str) -> str:
        return subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    first = run()
    lost = re.search(r"the GPU is lost after (\S+)", first)
    assert lost is not None, first
    assert lost[1] == "tests/gpu/test_some.py::test_b"
    assert "2 passed" in first
    assert "1 error" in first
    rest = run("--after", lost[1])
    assert "1 failed, 1 passed" in rest, "of the two behind it"


SANITIZER = """#!/bin/sh
case "$*" in
  */planted*) {planted} ;;
  *) echo 'every kernel has run' ;;
esac
"""


@pytest.mark.parametrize(
    "planted, expected",
    [
        ("echo 'Invalid __global__ write of size 4. Race reported'; exit 7", [True, True]),
        ("echo 'ERROR SUMMARY: 0 errors'", [False, False]),
        ("echo 'Invalid __global__ write of size 4'; exit 7", [True, False]),
        ("echo 'the device is not supported'; exit 7", [False, False]),
    ],
)
def test_compute_sanitizer_must_find_what_is_planted(
    planted: str, expected: list[bool], prove: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SANITIZER.format(planted=planted)
    for name, script in (("compute-sanitizer", text), ("nvcc", "#!/bin/sh\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    proof = prove.Proof(100.0)
    prove.sanitize(proof, 10.0)
    ok = {step["step"]: step["ok"] for step in proof.steps}
    assert [ok[f"{kind} finds its planted fault"] for kind in ("memcheck", "racecheck")] == expected
    assert ok["racecheck over every kernel"]
    late = prove.Proof(100.0)
    prove.sanitize(late, 99.0)
    assert not late.steps[-1]["ok"], "no time but what is reserved"


def test_compute_sanitizer_that_is_missing_is_no_success(prove: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove.shutil, "which", lambda *args, **options: None)
    proof = prove.Proof(100.0)
    prove.sanitize(proof, 0.0)
    assert [step["ok"] for step in proof.steps] == [False]


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
