"""Encoders that are loaded at the same time: checked one by one, then timed in turn, round after round.

What is timed is a whole forward from ids to the last hidden states. Right is what is near transformers in fp32. With
quantized weights alula is compared with transformers on the values they stand for; peers hold theirs in bf16.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from alula.bench import limits, model_check, model_folder, presets, report
from alula.bench.engine import Engine, EngineError, EngineMissing
from alula.bench.measure import Timing
from alula.bench.model_rounds import PEAKS, QUANTIZED, SETTLE_SECONDS, Member, Workload

__all__ = ["EncoderGroup"]


class EncoderGroup:
    """The engines `names` on the checkpoint `folder`. A member's `prefill` holds the seconds of its forwards."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        workload: Workload,
        openvino_python: str | None,
        measured: limits.Limits,
    ) -> None:
        self.names, self.folder, self.workload, self.measured = names, folder, workload, measured
        self.openvino_python = openvino_python
        self.members: dict[str, Member] = {}
        self.failed: set[str] = set()
        self._open: list[Engine] = []

    @property
    def right(self) -> list[str]:
        """Names of the engines that passed the check and have not failed since."""
        return [name for name, member in self.members.items() if member.verdict.correct and name not in self.failed]

    def check(self) -> None:
        """Load each engine and compare it with transformers in fp32. What fails is said and left out."""
        expected = self._once("hf-eager", "fp32", "reference")
        budget = 0.0
        if self.workload.dtype == "bf16":
            budget = model_check.max_error(self._once("hf-eager", "bf16", "budget"), expected)
        exact = expected
        if self.workload.dtype in QUANTIZED:
            folder = model_folder.dequantized(self.folder, self.workload.dtype, "AutoModel")
            exact = self._once("hf-eager", "fp32", "dequantized", folder)
            budget = model_check.max_error(exact, expected)
        for name in report.progress(self.names, "loading and checking"):
            try:
                engine = self._start(name, self.workload.dtype)
                found = self._hidden(engine)
            except EngineError as error:
                report.note(f"{name}: {'left out' if isinstance(error, EngineMissing) else 'failed'}: {error}")
                for engine in [engine for engine in self._open if engine.label == name]:
                    self._stop(engine)
                continue
            allowed = model_check.tolerance(name, self.workload.dtype, budget, float(np.abs(expected).max()))
            verdict = judge(found, exact if name == "alula" else expected, allowed)
            self.members[name] = Member(engine, engine.facts["weights"], engine.facts["versions"], verdict)
            if not verdict.correct:
                report.note(f"{name}: wrong, not timed: {verdict.reason}")
                self._stop(engine)

    def time(self, rounds: int) -> None:
        """Rounds in which each engine runs once; the check was the warm-up."""
        if "alula" in self.names and "alula" not in self.right:
            return
        for _ in report.progress(range(rounds), "rounds", total=rounds):
            for name in list(self.right):
                member = self.members[name]
                time.sleep(SETTLE_SECONDS)
                try:
                    seconds = member.engine.ask("encode", prompts=self.workload.prompts)["seconds"]
                except EngineError as error:
                    report.note(f"{name}: failed: {error}")
                    self.failed.add(name)
                    self._stop(member.engine)
                    continue
                member.prefill.append([seconds])

    def records(self) -> list[dict[str, Any]]:
        """One record for each engine. A round that was interrupted does not count."""
        rounds = min((len(self.members[name].prefill) for name in self.right), default=0)
        return [self._record(name, member, rounds) for name, member in self.members.items()]

    def close(self) -> None:
        """End every engine."""
        for engine in list(self._open):
            self._stop(engine)

    def _record(self, name: str, member: Member, rounds: int) -> dict[str, Any]:
        work, verdict = self.workload, member.verdict
        record: dict[str, Any] = {
            "kind": "model",
            "preset": work.preset,
            "phase": "encode",
            "dtype": work.dtype,
            "engine": name,
            "weights": member.weights,
            "versions": member.versions,
            "batch": len(work.prompts),
            "prompt_tokens": len(work.prompts[0]),
            "correct": verdict.correct,
            "max_error": verdict.max_error,
            "tolerance": verdict.tolerance,
        }
        taken = [seconds for (seconds,) in member.prefill[:rounds]]
        if not taken or name not in self.right:
            return record
        timing = Timing(tuple(taken))
        flops = presets.encoder_flops(work.config, len(work.prompts[0]), len(work.prompts))
        peak = self.measured.of(PEAKS[member.weights])
        ratio = None
        if name != "alula" and "alula" in self.right:
            ours = [seconds for (seconds,) in self.members["alula"].prefill[:rounds]]
            ratio = statistics.median(a / b for a, b in zip(ours, taken, strict=True))
        rate = flops / timing.median / 1e9
        return record | {
            "rounds": rounds,
            "samples": len(taken),
            "median_s": timing.median,
            "q25_s": timing.quartiles[0],
            "q75_s": timing.quartiles[1],
            "round_medians_s": taken,
            "work": flops,
            "rate": rate,
            "unit": "GFLOP/s",
            "limit": PEAKS[member.weights],
            "limit_value": peak,
            "limit_share": None if peak is None else rate / peak,
            "alula_ratio": ratio,
        }

    def _once(self, name: str, dtype: str, label: str, folder: Path | None = None) -> np.ndarray:
        """The hidden states of an engine that is ended at once."""
        engine = self._start(name, dtype, label, folder)
        try:
            return self._hidden(engine)
        finally:
            self._stop(engine)

    def _hidden(self, engine: Engine) -> np.ndarray:
        return engine.arrays("hidden", prompts=self.workload.prompts)["hidden"]

    def _start(self, name: str, dtype: str, label: str | None = None, folder: Path | None = None) -> Engine:
        python = self.openvino_python if name == "openvino" else None
        work = self.workload
        engine = Engine(f"encoder:{name}", self.folder, threads=work.threads, python=python, label=label or name)
        self._open.append(engine)
        try:
            engine.load(
                folder=folder or self.folder,
                work=self.folder,
                dtype=dtype,
                threads=work.threads,
                max_tokens=len(work.prompts[0]),
                batch=len(work.prompts),
            )
        except EngineError:
            self._stop(engine)
            raise
        return engine

    def _stop(self, engine: Engine) -> None:
        if engine in self._open:
            self._open.remove(engine)
            engine.close()


def judge(found: np.ndarray, expected: np.ndarray, allowed: float) -> model_check.Verdict:
    """Both [B, T, E]; wrong if a value is off by more than `allowed`."""
    if found.shape != expected.shape:
        reason = f"shape {found.shape}, not {expected.shape}"
        return model_check.Verdict(False, float("inf"), allowed, 0, 0, reason)
    error = model_check.max_error(found, expected)
    reason = (
        ""
        if error <= allowed
        else (f"hidden states differ by {error:.3g} from transformers eager in fp32, allowed {allowed:.3g}")
    )
    return model_check.Verdict(not reason, error, allowed, 0, 0, reason)
