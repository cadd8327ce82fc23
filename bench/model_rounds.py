"""Engines that are loaded at the same time: checked one by one, then timed in turn, round after round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alula.bench import limits, model_check, model_folder, presets, report
from alula.bench.engine import Engine, EngineError, EngineMissing
from alula.bench.measure import Timing

CHECK_STEPS = 8
WARMUP_STEPS = 4
PREFILLS = 2  # of a round
SETTLE_SECONDS = 0.3  # between engines: until the threads of the one before have gone to sleep
QUANTIZED = ("int8", "int4", "nf4")
# 4-bit codes with an fp16 scale for 64 of them; peers have 32, and read a little more.
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.53125, "nf4": 0.53125}
ENGINE_OVERHEAD = 700 << 20  # interpreter, torch, activations, cache
PEAKS = {"fp32": "fp32_fma", "bf16": "bf16_dot", **dict.fromkeys(QUANTIZED, "int8_dot")}


@dataclass(frozen=True)
class Workload:
    """What every engine does: read `prompts` (prefill), and make tokens after each of `contexts` (decode).

    `prompts` is a batch of rows; `contexts` holds such batches, one for each length asked for."""

    preset: str
    config: presets.Config
    dtype: str
    threads: int
    prompts: list[list[int]]
    contexts: list[list[list[int]]]
    left_pad: bool
    new_tokens: int

    @property
    def max_tokens(self) -> int:
        """The most tokens of a row: the longest prompt or context and the steps after it."""
        longest = max(len(row) for rows in (self.prompts, *self.contexts) for row in rows)
        return longest + max(self.new_tokens, CHECK_STEPS) + 4


@dataclass
class Member:
    """An engine of a group and what was learned of it."""

    engine: Engine
    weights: str
    versions: dict[str, str]
    verdict: model_check.Verdict
    prefill: list[list[float]] = field(default_factory=list)  # seconds, by round
    decode: list[list[list[float]]] = field(default_factory=list)  # by round and context


def plan_groups(names: Sequence[str], config: presets.Config, dtype: str, memory: int) -> list[list[str]]:
    """Which engines are loaded together: as many peers beside alula as fit into `memory` bytes with the reference."""
    parameters = presets.parameters(config)

    def need(name: str) -> int:
        element = 4 if name == "ctranslate2" and dtype not in QUANTIZED else ELEMENT_BYTES[dtype]
        copies = 2 if name == "hf-alula" else 1  # the packed weights beside the plain ones
        return int(1.2 * copies * element * parameters) + ENGINE_OVERHEAD

    base = [name for name in names if name == "alula"]
    room = 0.9 * memory - 4.4 * parameters - ENGINE_OVERHEAD - sum(map(need, base))
    groups: list[list[str]] = []
    left = -1.0
    for name in names:
        if name in base:
            continue
        if left < need(name):
            groups.append([*base])
            left = room
        groups[-1].append(name)
        left -= need(name)
    return groups or [base]


class Group:
    """The engines `names` on the checkpoint `folder`."""

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
        self.failed: set[str] = set()  # while they were timed
        self.read_samples: list[float] = []
        self._open: list[Engine] = []

    @property
    def right(self) -> list[str]:
        """Names of the engines that passed the check and have not failed since."""
        return [name for name, member in self.members.items() if member.verdict.correct and name not in self.failed]

    def check(self) -> None:
        """Load each engine and compare it with transformers eager in fp32. What fails is said and left out."""
        work = self.workload
        inputs = [work.prompts, *(rows for rows in work.contexts if rows != work.prompts)]
        reference = self._start("hf-eager", "fp32", label="reference")
        expected = [reference.arrays("greedy", prompts=prompts, steps=CHECK_STEPS) for prompts in inputs]
        bf16_error = 0.0
        if work.dtype == "bf16":
            engine = self._start("hf-eager", "bf16", label="budget")
            for prompts in inputs:
                found = engine.arrays("greedy", prompts=prompts, steps=CHECK_STEPS)
                scored = self._score(reference, prompts, found["tokens"])
                bf16_error = max(bf16_error, model_check.max_error(found["logits"], scored))
            self._stop(engine)
        exact, rounding = reference, 0.0
        if work.dtype in QUANTIZED:
            # alula is held to the very values of its weights, peers to what such weights cost alula.
            values = model_folder.dequantized(self.folder, work.dtype, "AutoModelForCausalLM")
            exact = self._start("hf-eager", "fp32", label="dequantized", folder=values)
            for prompts in inputs:
                found = exact.arrays("greedy", prompts=prompts, steps=CHECK_STEPS)
                scored = self._score(reference, prompts, found["tokens"])
                rounding = max(rounding, model_check.max_error(found["logits"], scored))
        for name in report.progress(self.names, "loading and checking"):
            try:
                engine = self._start(name, work.dtype)
                verdicts = []
                for prompts, want in zip(inputs, expected, strict=True):
                    found = engine.arrays("greedy", prompts=prompts, steps=CHECK_STEPS)
                    scored = self._score(exact if name == "alula" else reference, prompts, found["tokens"])
                    error = rounding if work.dtype in QUANTIZED else bf16_error
                    allowed = model_check.tolerance(name, work.dtype, error, float(abs(scored).max()))
                    verdicts.append(
                        model_check.judge(found["logits"], found["tokens"], scored, want["tokens"], allowed)
                    )
            except EngineError as error:
                report.note(f"{name}: {'left out' if isinstance(error, EngineMissing) else 'failed'}: {error}")
                self._stop_named(name)
                continue
            verdict = max(verdicts, key=lambda verdict: (not verdict.correct, verdict.max_error))
            self.members[name] = Member(engine, engine.facts["weights"], engine.facts["versions"], verdict)
            if not verdict.correct:
                report.note(f"{name}: wrong, not timed: {verdict.reason}")
                self._stop(engine)
        self._stop(reference)
        self._stop(exact)

    def time(self, rounds: int) -> None:
        """A warm-up, then rounds: each engine in turn reads the prompts and makes the tokens."""
        if "alula" in self.names and "alula" not in self.right:
            return
        for name in list(self.right):
            self._turn(name, WARMUP_STEPS, keep=False)
        for _ in report.progress(range(rounds), "rounds", total=rounds):
            for name in list(self.right):
                self._turn(name, self.workload.new_tokens, keep=True)
            self.read_samples.append(limits.read_bandwidth(self.workload.threads, 0.2))

    def records(self) -> list[dict[str, Any]]:
        """One record for each phase and engine. A round that was interrupted does not count."""
        rounds = min((len(self.members[name].decode) for name in self.right), default=0)
        found = []
        for which in [*range(len(self.workload.contexts)), None]:
            for name, member in self.members.items():
                found.append(self._record(which, name, member, rounds))
        return found

    def close(self) -> None:
        """End every engine."""
        for engine in list(self._open):
            self._stop(engine)

    def _turn(self, name: str, steps: int, *, keep: bool) -> None:
        engine, work = self.members[name].engine, self.workload
        time.sleep(SETTLE_SECONDS)
        try:
            prefill = [engine.ask("prefill", prompts=work.prompts)["seconds"] for _ in range(PREFILLS)]
            decode = [engine.ask("decode", prompts=rows, steps=steps)["seconds"] for rows in work.contexts]
        except EngineError as error:
            report.note(f"{name}: failed: {error}")
            self.failed.add(name)
            self._stop(engine)
            return
        if keep:
            self.members[name].prefill.append(prefill)
            self.members[name].decode.append(decode)

    def _record(self, which: int | None, name: str, member: Member, rounds: int) -> dict[str, Any]:
        """The record of one engine. which: the context that its steps came after; None: its prefill."""
        work = self.workload
        record: dict[str, Any] = {
            "kind": "model",
            "preset": work.preset,
            "phase": "prefill" if which is None else "decode",
            "dtype": work.dtype,
            "engine": name,
            "weights": member.weights,
            "versions": member.versions,
            "batch": len(work.prompts),
            "left_pad": work.left_pad,
            "prompt_tokens": len(work.prompts[0]),
            "context": len(work.contexts[which or 0][0]),
            "new_tokens": work.new_tokens,
            "correct": member.verdict.correct,
            "max_error": member.verdict.max_error,
            "tolerance": member.verdict.tolerance,
            "equal_tokens": f"{member.verdict.equal_tokens}/{member.verdict.tokens}",
        }
        by_round = _samples(member, which, rounds)
        if not by_round or name not in self.right:
            return record
        timing = Timing(tuple(seconds for taken in by_round for seconds in taken))
        work_done, unit, bound, limit = self._work(which, member.weights)
        rate = work_done / timing.median / 1e9
        record |= {
            "rounds": rounds,
            "samples": len(timing.samples),
            "median_s": timing.median,
            "q25_s": timing.quartiles[0],
            "q75_s": timing.quartiles[1],
            "round_medians_s": [statistics.median(taken) for taken in by_round],
            "work": work_done,
            "rate": rate,
            "unit": unit,
            "limit": bound,
            "limit_value": limit,
            "limit_share": None if limit is None else rate / limit,
            "alula_ratio": self._ratio(which, name, rounds),
        }
        return record

    def _work(self, which: int | None, weights: str) -> tuple[int, str, str, float | None]:
        """Work of one sample, its unit, the limit's name and value: the read bandwidth is that between the rounds."""
        work = self.workload
        if which is None:
            flops = presets.prefill_flops(work.config, [len(prompt) for prompt in work.prompts])
            return flops, "GFLOP/s", PEAKS[weights], self.measured.of(PEAKS[weights])
        rows = work.contexts[which]
        context = sum(map(len, rows)) // len(rows) + work.new_tokens // 2
        size = presets.step_bytes(work.config, ELEMENT_BYTES[weights], len(rows), context)
        return size, "GB/s", "read", max([self.measured.read, *self.read_samples])

    def _ratio(self, which: int | None, name: str, rounds: int) -> float | None:
        """Median over the rounds of alula's median by this engine's."""
        if name == "alula" or "alula" not in self.right:
            return None
        pair = (self.members[engine] for engine in ("alula", name))
        ours, theirs = ([statistics.median(s) for s in _samples(member, which, rounds)] for member in pair)
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))

    def _score(self, reference: Engine, prompts: list[list[int]], tokens: Any) -> Any:
        """The reference's logits [steps + 1, B, V] where the engine chose `tokens` [steps + 1, B]."""
        sequences = [prompt + tokens[:-1, row].tolist() for row, prompt in enumerate(prompts)]
        return reference.arrays("score", sequences=sequences, last=CHECK_STEPS + 1)["logits"]

    def _start(self, name: str, dtype: str, label: str | None = None, folder: Path | None = None) -> Engine:
        python = self.openvino_python if name == "openvino" else None
        engine = Engine(name, self.folder, threads=self.workload.threads, python=python, label=label)
        self._open.append(engine)
        try:
            engine.load(
                folder=folder or self.folder,
                work=self.folder,
                dtype=dtype,
                threads=self.workload.threads,
                max_tokens=self.workload.max_tokens,
                batch=len(self.workload.prompts),
            )
        except EngineError:
            self._stop(engine)
            raise
        return engine

    def _stop_named(self, name: str) -> None:
        for engine in [engine for engine in self._open if engine.label == name]:
            self._stop(engine)

    def _stop(self, engine: Engine) -> None:
        if engine in self._open:
            self._open.remove(engine)
            engine.close()


def _samples(member: Member, which: int | None, rounds: int) -> list[list[float]]:
    """The seconds of a member's prefills (None) or of its steps after context number `which`, by round."""
    if which is None:
        return member.prefill[:rounds]
    return [contexts[which] for contexts in member.decode[:rounds]]
