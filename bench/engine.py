"""The parent's side of an engine: starts its process, sends commands, reads answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

WORKER = Path(__file__).resolve().parent / "worker.py"
# Threads are set by these for the libraries that read them at start; the rest are set through the libraries' own calls.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class EngineError(Exception):
    """The engine failed; the message names the log."""


class EngineMissing(EngineError):
    """The engine, or this combination of options, is not to be had here; the message says why."""


class Engine:
    """One engine in its own process."""

    def __init__(
        self, name: str, work: Path, *, threads: int, python: str | None = None, label: str | None = None
    ) -> None:
        """Start the process: `name` is one of PEERS, `python` the interpreter (this one if None).

        work: a folder for its log and for arrays that come back.
        """
        self.name, self.label = name, label or name
        self._work = work
        self._log = work / f"{self.label}.log"
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        environment.setdefault("HF_HUB_OFFLINE", "1")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python or sys.executable, str(WORKER), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its engines
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises EngineMissing or EngineError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"{self.label} ended in {do} with status {self._process.wait()}; log: {self._log}")
        answer = json.loads(line)
        if not answer["ok"]:
            if answer["missing"]:
                raise EngineMissing(answer["error"])
            raise EngineError(f"{self.label} failed in {do}: {answer['error']}; log: {self._log}")
        return answer

    def load(self, **setup: Any) -> dict[str, Any]:
        """Load the model: the fields of peers.base.Setup."""
        paths = {key: str(setup[key]) for key in ("folder", "work")}
        self.facts = self.ask("load", setup={**setup, **paths})
        return self.facts

    def arrays(self, do: str, **arguments: Any) -> dict[str, np.ndarray]:
        """A command whose answer is arrays."""
        out = self._work / f"{self.label}-{do}.npz"
        self.ask(do, out=str(out), **arguments)
        with np.load(out) as arrays:
            found = dict(arrays)
        out.unlink()
        return found

    def close(self) -> None:
        """End the process and free its memory."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
