"""The process that one engine lives in: reads commands as JSON lines on standard input, answers on standard output.

Run by its path (`python worker.py NAME`), with any interpreter that has what the engine needs: alula itself is imported
only for the engine `alula`. Whatever a library prints goes to standard error.

    {"do": "load", "setup": {...}}                              -> versions, weights, load_s, baseline_bytes, peak_bytes
    {"do": "greedy", "prompts": [[...]], "steps": n, "out": F}  -> F.npz: logits [n + 1, B, V], tokens [n + 1, B]
    {"do": "score", "sequences": [[...]], "last": n, "out": F}  -> F.npz: logits [n, B, V] of their last n positions
    {"do": "prefill", "prompts": [[...]]}                       -> seconds
    {"do": "decode", "prompts": [[...]], "steps": n}            -> seconds: [of each counted step]
    {"do": "encode", "prompts": [[...]]}                        -> seconds (encoders)
    {"do": "hidden", "prompts": [[...]], "out": F}              -> F.npz: hidden [B, T, E] of an encoder

Each answer has "ok"; a false one has "error", and "missing": true where the engine does not exist here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PACKAGE = "alula_bench_peers"


def main(name: str) -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(name)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": True, **getattr(server, "do_" + command.pop("do"))(**command)}
        except Exception as error:  # told to the parent, which decides
            missing = type(error).__name__ == "Missing"
            if not missing:
                traceback.print_exc()
            answer = {"ok": False, "missing": missing, "error": f"{type(error).__name__}: {error}"}
            if missing:
                answer["error"] = str(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load_peers() -> Any:
    """The package of peers beside this file, under a name of its own: its files are named like what they import."""
    folder = Path(__file__).resolve().parent / "peers"
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder.parent]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    return package


class Server:
    """One engine and the commands it answers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.peers = load_peers()

    def do_load(self, setup: dict[str, Any]) -> dict[str, Any]:
        """Import and load the engine. Memory is counted from an interpreter that has imported torch."""
        import torch  # noqa: F401

        base = importlib.import_module(f"{PACKAGE}.base")
        reset_peak_memory()
        baseline = memory("VmRSS")
        start = time.perf_counter()
        paths = {key: Path(setup[key]) for key in ("folder", "work")}
        self.engine = self.peers.peer_class(self.name)(base.Setup(**{**setup, **paths}))
        return {
            "versions": self.engine.versions,
            "weights": self.engine.weights,
            "load_s": time.perf_counter() - start,
            "baseline_bytes": baseline,
            "peak_bytes": memory("VmHWM"),
        }

    def do_greedy(self, prompts: list[list[int]], steps: int, out: str) -> dict[str, Any]:
        """Logits and tokens of a short greedy search, for the check."""
        import numpy as np

        logits, tokens = self.engine.greedy(prompts, steps)
        np.savez(out, logits=logits, tokens=tokens)
        return {}

    def do_score(self, sequences: list[list[int]], last: int, out: str) -> dict[str, Any]:
        """Logits of given sequences, each row alone and unpadded, for the check."""
        import numpy as np

        np.savez(out, logits=np.stack([self.engine.score(sequence, last) for sequence in sequences], axis=1))
        return {}

    def do_prefill(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Time one prefill."""
        return {"seconds": self.engine.time_prefill(prompts)}

    def do_decode(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Time steps after the prompts."""
        return {"seconds": self.engine.time_decode(prompts, steps)}

    def do_encode(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Time one forward of an encoder."""
        return {"seconds": self.engine.time_encode(prompts)}

    def do_hidden(self, prompts: list[list[int]], out: str) -> dict[str, Any]:
        """The last hidden states of an encoder, for the check."""
        import numpy as np

        np.savez(out, hidden=self.engine.hidden(prompts))
        return {}


def reset_peak_memory() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS resident now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status does not say {field}")


if __name__ == "__main__":
    main(sys.argv[1])
