"""Everything that needs a GPU, in one command: `make gpu`.

Tests, compute-sanitizer with a planted fault as a control, the benchmark; one file of results in bench/results. Each
step has a limit; one that fails does not keep the others from running. The exit status is 1 where any failed. All that
the steps print is kept beside the results, with the suffix .log.

    prove.py [--seconds N] [--out FILE] [--only STEPS] [--dry-run]

`--dry-run` goes through the same steps on a CPU (what needs a GPU is skipped, sizes are tiny), to test this very file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = Path(__file__).with_name("sanitizer_cases.py")
PLANTED = Path(__file__).with_name("planted.cu")
STEPS = ("tests", "sanitizer", "ops", "models")
TESTED_FIRST = ("test_models.py", "test_ops.py")  # where the time ends early, the others are missing
MOST_LOST = 5  # processes for the tests: one more for each time that the GPU is lost
FOR_BENCHMARKS = 150.0  # seconds that compute-sanitizer leaves to them
GRACE = 10.0  # seconds to say what is known, once the time is over


def _run(command: list[str], limit: float) -> tuple[int, str]:
    """Exit status (124: out of time) and output. Ctrl-C comes before the end: pytest then says what has passed."""
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=limit)
        return child.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGINT)
        try:
            output, _ = child.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
        return 124, f"{output}\nstopped after {limit:.0f} s"
    finally:
        if child.poll() is None:  # Ctrl-C here: the child is in a session of its own and does not hear of it
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


class Proof:
    """The steps so far, what is left of the time, and where results and everything that is printed go.

    `about`: what the results are of, to be filled; written with the steps after each of them, so that whoever stops the
    whole has what was seen.
    """

    def __init__(self, seconds: float, out: Path | None = None, about: dict[str, Any] | None = None) -> None:
        self.end = time.monotonic() + seconds
        self.steps: list[dict[str, Any]] = []
        self.about = {} if about is None else about
        self.out, self.log = out, out.with_suffix(".log") if out else None
        if self.log:
            self.log.write_text("")

    def keep(self) -> None:
        if self.out:
            self.out.write_text(json.dumps({**self.about, "steps": self.steps}, indent=1) + "\n")

    def call(self, name: str, command: list[str], limit: float) -> tuple[int, str]:
        """Runs a command, prints the end of what it says; its exit status (124: out of time) and all it said."""
        print(f"\n=== {name}", flush=True)
        limit = min(limit, self.end - time.monotonic())
        if limit <= 5:
            return 124, "no time was left"
        status, output = _run(command, limit)
        if self.log:
            with self.log.open("a") as file:
                file.write(f"=== {name}: {' '.join(command)}\n{output}\n--- exit status {status}\n")
        print(output[-3500:], flush=True)
        return status, output

    def run(self, name: str, command: list[str], limit: float) -> tuple[bool, str]:
        """A command that is a step by itself: whether it succeeded, and all it said."""
        start = time.monotonic()
        status, output = self.call(name, command, limit)
        return self.note(name, status == 0, output[-1500:] if status else "", time.monotonic() - start), output

    def note(self, name: str, ok: bool, text: str = "", seconds: float = 0.0) -> bool:
        self.steps.append({"step": name, "ok": ok, "seconds": round(seconds, 1), "text": text})
        print(f"--- {name}: {'ok' if ok else 'FAILED'} ({seconds:.1f} s) {text if not ok and seconds == 0 else ''}")
        self.keep()
        return ok


def sanitize(proof: Proof, reserved: float) -> None:
    """memcheck and racecheck over every kernel, each only if it finds its planted fault; `reserved`: seconds of the
    proof that are for others."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
    tool, nvcc = (shutil.which(name, path=places) for name in ("compute-sanitizer", "nvcc"))
    if tool is None or nvcc is None:
        proof.note("compute-sanitizer", False, "compute-sanitizer or nvcc is not on this machine: nothing was checked")
        return
    with tempfile.TemporaryDirectory() as folder:
        planted = str(Path(folder) / "planted")
        if not proof.run("build the planted faults", [nvcc, "-arch=native", str(PLANTED), "-o", planted], 60)[0]:
            return
        for kind, argument, said in (
            ("memcheck", "1", "Invalid __global__ write"),
            ("racecheck", "2", "Race reported"),
        ):
            # What torch asks in vain of the driver at its start is no error of a kernel. Kernels of libraries are left
            # out, by namespace: racecheck is slow, and reports what some of them mean to do.
            flags = ["--tool", kind, "--error-exitcode", "7", "--report-api-errors", "no", "--kernel-name", "kns=alula"]
            status, output = proof.call(f"{kind}, control", [tool, *flags, planted, argument], 60)
            found = status == 7 and said in output
            proof.note(f"{kind} finds its planted fault", found, "" if found else output[-500:])
            limit = min(80, proof.end - time.monotonic() - reserved)
            proof.run(f"{kind} over every kernel", [tool, *flags, sys.executable, str(CASES)], limit)


def tests(proof: Proof, is_dry: bool) -> None:
    """pytest; again for the tests behind one that the GPU did not survive (tests/gpu/conftest.py). A test that hangs
    says where after 60 s."""
    files = sorted(CASES.parent.glob("test_*.py"), key=lambda file: (file.name not in TESTED_FIRST, file.name))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=60", *(str(file.relative_to(ROOT)) for file in files)]
    counts: dict[str, int] = {}
    end, after = time.monotonic() + 180, []
    for _ in range(MOST_LOST):
        _, output = proof.run(" ".join(["tests", *after[1:]]), [*command, *after], end - time.monotonic())
        summary = re.findall(r"^.*\d+ .* in [\d.]+s\b.*$", output, re.MULTILINE)[-1:]
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", " ".join(summary)):
            counts[what] = counts.get(what, 0) + int(number)
        proof.about["tests"] = counts
        proof.keep()
        lost = re.search(r"the GPU is lost after (\S+)", output)
        if lost is None:
            break
        after = ["--after", lost[1]]
    if not is_dry and not counts.get("passed"):
        proof.note("a test has passed", False, "none has: see why they were skipped")


def benchmark(proof: Proof, part: str, is_dry: bool) -> dict[str, Any] | None:
    """What `alula bench cuda --parts <part>` writes; each part has a file of its own, so that one keeps what it has."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        # bench/ is alula.bench once installed; here it may be just a folder beside python/.
        start = f"import sys, alula; alula.__path__.append({str(ROOT)!r}); from alula.bench.run import main"
        left = (proof.end - time.monotonic()) * (0.5 if part == "ops" else 1)
        options = [
            "cuda",
            "--parts",
            part,
            "--json",
            str(file),
            "--seconds",
            str(max(left - 60, 10)),
        ]  # a case takes up to 60
        if is_dry:
            options += ["--device", "cpu", "--quick", "--rounds", "1"]
        proof.run(f"benchmark of {part}", [sys.executable, "-c", f"{start}; sys.exit(main({options!r}))"], left)
        return json.loads(file.read_text()) if file.exists() else None


def facts(is_dry: bool) -> dict[str, Any]:
    import torch
    from alula import _C

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    capability = "0.0" if is_dry else ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "gpu": "No GPU (dry run)" if is_dry else torch.cuda.get_device_name(),
        "num_gpus": torch.cuda.device_count(),
        "compute_capability": capability,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": sys.version.split()[0],
        "alula": dict(_C.build_info()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=450.0, help="for all steps together (default %(default)s)")
    parser.add_argument("--out", type=Path, help="of the results (default: bench/results/<gpu>-<date>.json)")
    parser.add_argument("--dry-run", action="store_true", help="the steps on a CPU, at tiny sizes; measures nothing")
    parser.add_argument("--only", default=",".join(STEPS), help="of these steps (default: all, %(default)s)")
    args = parser.parse_args(argv)
    only = args.only.split(",")
    if not set(only) <= set(STEPS):
        parser.error(f"--only takes some of {','.join(STEPS)}, not {args.only}")
    from alula.devices import why_no_gpu

    if not args.dry_run and why_no_gpu():
        print(f"make gpu needs a GPU; {why_no_gpu()} ({sys.executable}). Nothing was run.")
        return 2
    about = facts(args.dry_run)
    print(json.dumps(about, indent=1))
    name = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    out = args.out or ROOT / "bench" / "results" / f"{name}-{about['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    proof = Proof(args.seconds, out, about)
    if "tests" in only:
        tests(proof, args.dry_run)
    if "sanitizer" in only and not args.dry_run:
        sanitize(proof, FOR_BENCHMARKS if {"ops", "models"} & set(only) else 0.0)
    results = about["bench"] = {}
    for part in ("ops", "models"):
        if part in only:
            results[part] = benchmark(proof, part, args.dry_run)
            proof.keep()
    failed = [step["step"] for step in proof.steps if not step["ok"]]
    print(f"\nresults: {out}\n" + (f"FAILED: {', '.join(failed)}" if failed else "all steps succeeded"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
