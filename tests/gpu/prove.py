"""Everything that needs a GPU, in one command: `make gpu`.

Tests, compute-sanitizer with a planted fault as a control, the benchmark; one file of results in bench/results. Each
step has a limit; one that fails does not keep the others from running. The exit status is 1 where any failed.

    prove.py [--seconds N] [--out FILE] [--dry-run]

`--dry-run` goes through the same steps on a CPU (what needs a GPU is skipped, sizes are tiny), to test this very file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
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


class Proof:
    """The steps so far, and what is left of the time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.steps: list[dict[str, Any]] = []

    def run(self, name: str, command: list[str], limit: float) -> tuple[bool, str]:
        """Runs a command, prints the end of what it says; whether it succeeded, and all it said."""
        limit = min(limit, self.end - time.monotonic())
        print(f"\n=== {name}", flush=True)
        if limit <= 5:
            return self.note(name, False, "no time was left"), ""
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            output, ok = done.stdout, done.returncode == 0
        except subprocess.TimeoutExpired as error:
            output, ok = (error.stdout or b"").decode(errors="replace") + f"\nstopped after {limit:.0f} s", False
        print(output[-3500:], flush=True)
        self.note(name, ok, output[-1500:] if not ok else "", time.monotonic() - start)
        return ok, output

    def note(self, name: str, ok: bool, text: str = "", seconds: float = 0.0) -> bool:
        self.steps.append({"step": name, "ok": ok, "seconds": round(seconds, 1), "text": text})
        print(f"--- {name}: {'ok' if ok else 'FAILED'} ({seconds:.1f} s) {text if not ok and seconds == 0 else ''}")
        return ok


def sanitize(proof: Proof) -> None:
    """memcheck and racecheck over every kernel, each only if it finds its planted fault."""
    tool, nvcc = shutil.which("compute-sanitizer"), shutil.which("nvcc")
    for path in ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer"):
        tool = tool or (path if os.access(path, os.X_OK) else None)
    if tool is None or nvcc is None:
        proof.note("compute-sanitizer", False, "compute-sanitizer or nvcc is not on this machine: nothing was checked")
        return
    with tempfile.TemporaryDirectory() as folder:
        planted = str(Path(folder) / "planted")
        if not proof.run("build the planted faults", [nvcc, "-arch=native", str(PLANTED), "-o", planted], 60)[0]:
            return
        for kind, argument in (("memcheck", "1"), ("racecheck", "2")):
            flags = ["--tool", kind, "--error-exitcode", "7"]
            print(f"\n=== {kind}, control")
            done = subprocess.run([tool, *flags, planted, argument], capture_output=True, text=True, timeout=60)
            found = done.returncode == 7 and re.search(r"Invalid __global__ write|[Rr]ace", done.stdout) is not None
            proof.note(f"{kind} finds its planted fault", found, "" if found else done.stdout[-500:])
            proof.run(f"{kind} over every kernel", [tool, *flags, sys.executable, str(CASES)], 80)


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
    args = parser.parse_args(argv)
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print("make gpu needs a CUDA device; torch finds none")
        return 2
    about = facts(args.dry_run)
    print(json.dumps(about, indent=1))
    proof = Proof(args.seconds)
    ok, output = proof.run(
        "tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"], 180
    )
    counted = re.findall(r"(\d+) (passed|failed|skipped|error)", output)
    about["tests"] = {what: int(number) for number, what in counted}
    if not args.dry_run:
        sanitize(proof)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        # bench/ is alula.bench once installed; here it may be just a folder beside python/.
        start = f"import sys, alula; alula.__path__.append({str(ROOT)!r}); from alula.bench.run import main"
        left = proof.end - time.monotonic()
        options = ["cuda", "--json", str(file), "--seconds", str(max(left - 60, 10))]  # a case may take that long
        if args.dry_run:
            options += ["--device", "cpu", "--quick", "--rounds", "1"]
        proof.run("benchmark", [sys.executable, "-c", f"{start}; sys.exit(main({options!r}))"], left)
        about["bench"] = json.loads(file.read_text()) if file.exists() else None
    about["steps"] = proof.steps
    name = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    out = args.out or ROOT / "bench" / "results" / f"{name}-{about['date'][:10]}.json"
    out.write_text(json.dumps(about, indent=1) + "\n")
    failed = [step["step"] for step in proof.steps if not step["ok"]]
    print(f"\nresults: {out}\n" + (f"FAILED: {', '.join(failed)}" if failed else "all steps succeeded"))
    return 1 if failed or not ok else 0


if __name__ == "__main__":
    sys.exit(main())
