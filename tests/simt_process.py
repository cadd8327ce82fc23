"""The host executor of CUDA kernels, as tests use it: built once, a process that answers one call after another.

The kernels of csrc/ops/*_cuda.cu run on the CPU, a fiber per thread, with every access checked (tests/simt/executor.h).
A mistake that AddressSanitizer sees ends the process; the next call starts another.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class Fault(Exception):
    """What a kernel did wrong, in the executor's words or in AddressSanitizer's."""


@functools.cache
def runner() -> Path:
    """The executor, built where it is out of date, by one process at a time (pytest -n 2 has two)."""
    build = ROOT / "build" / "simt"
    build.mkdir(parents=True, exist_ok=True)
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    source = ROOT / "tests" / "simt"
    commands = (
        ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build)],
        ["cmake", "--build", str(build)],
    )
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in commands:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return build / "simt_runner"


class Executor:
    """A running executor. `call` is the only way in."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._errors: BinaryIO | None = None

    def _start(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
            options = "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1"
            self._process = subprocess.Popen(
                [str(runner())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"},
            )
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def call(self, op: str, *, results: tuple[str, ...], order: str = "forward", **values: object) -> dict[str, Tensor]:
        """Runs one op.

        Args:
            results: names of the tensors among ``values`` that come back, as the kernel left them.
            order: in which threads and blocks run.
            values: integers, floats, tensors (contiguous; None is left out). A tensor that starts off an address
                aligned to 16 keeps its offset.

        Raises Fault for a mistake of the kernel, RuntimeError for what the launcher refused.
        """
        process = self._start()
        message = [f"run {op} {ORDERS[order]}\n".encode()]
        for name, value in values.items():
            if value is None:
                continue
            if isinstance(value, Tensor):
                assert value.is_contiguous(), f"{name} is not contiguous"
                data = value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
                offset = value.data_ptr() % 16 if value.numel() else 0
                message.append(f"t {name} {len(data)} {offset} {int(name in results)}\n".encode())
                message.append(data)
            elif isinstance(value, float):
                message.append(f"f {name} {value.hex() if value == value else 'nan'}\n".encode())
            else:
                message.append(f"i {name} {int(value)}\n".encode())
        message.append(b"end\n")
        try:
            process.stdin.write(b"".join(message))
            process.stdin.flush()
            return self._answer(process.stdout, {name: values[name] for name in results})
        except (BrokenPipeError, EOFError):
            process.wait()
            self._errors.seek(0)
            raise Fault(_summary(self._errors.read().decode(errors="replace"))) from None

    def _answer(self, stream: BinaryIO, results: dict[str, Tensor]) -> dict[str, Tensor]:
        first = stream.readline().decode().rstrip("\n")
        kind, _, text = first.partition(" ")
        if kind == "fault":
            raise Fault(text)
        if kind == "error":
            raise RuntimeError(text)
        if kind != "ok":
            raise EOFError
        tensors = {}
        while (line := stream.readline().decode().split()) != ["end"]:
            _, name, size = line
            data = stream.read(int(size))
            like = results[name]
            values = torch.frombuffer(bytearray(data), dtype=like.dtype) if data else torch.empty(0, dtype=like.dtype)
            tensors[name] = values.view(like.shape)
        return tensors


def _summary(report: str) -> str:
    """The lines of a sanitizer's report that say what happened, and where in a kernel."""
    lines = [
        line for line in report.splitlines() if re.search(r"ERROR|runtime error|READ of|WRITE of|is located", line)
    ]
    frames = re.findall(r"#\d+ \S+ in (?:.*?)(\S+\.(?:cu|cuh|cpp|h):\d+)", report)
    return "\n".join([*lines[:4], "at " + ", ".join(frames[:4])]) if lines else report[-2000:]
