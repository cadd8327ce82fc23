"""`alula bench ops`: each op at its named cases, checked, then timed in turn with PyTorch."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from alula.bench import limits, machine, report
from alula.bench.cases import OPS
from alula.bench.cases.case import Case, Inputs
from alula.bench.measure import Timing, interleave, paired_ratio
from alula.limits import last_level_cache_bytes
from alula.testing import compare
from torch import Tensor

UNITS = {"read": "GB/s", "copy": "GB/s", "fp32_fma": "GFLOP/s", "bf16_dot": "GFLOP/s", "int8_dot": "GOP/s"}
BLOCKS = 8  # of rounds, each after a look at what memory allows
COLD_CACHES = 4  # the buffers of a memory-bound case take this many times the last-level cache
HEADER = ("case", "dtype", "engine", "median", "+-", "rate", "of limit", "alula / it")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `alula bench ops`."""
    parser.add_argument("--op", choices=[*OPS], action="append", help="only this op (may be given several times)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="only this dtype")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="small shapes and few samples: a check, not a figure")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each case (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON lines")


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Run the chosen cases. 0: all done and right; 1: alula gave a wrong result; 130: interrupted."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    recorder = report.Recorder(args.json)
    header = machine.describe(args.threads, argv)
    print(machine.one_line(header), flush=True)
    measured = limits.measure(args.threads, 0.05 if args.quick else 0.5)
    print(measured.line(), flush=True)
    recorder.add({**header, "limits": dataclasses.asdict(measured)})
    status = 0
    try:
        for op in args.op or OPS:
            rows: list[tuple[str, ...]] = []
            try:
                for case in report.progress(chosen(op, args), op):
                    records = list(measure_case(case, measured, args))
                    for record in records:
                        recorder.add(record)
                    rows += [row(record) for record in records]
                    if not records[0]["correct"]:
                        status = 1
                        report.note(f"{op}, {case.name}, {case.dtype_name}: {records[0]['error']}")
            finally:
                if rows:
                    print(f"\n{op}\n{report.table(HEADER, rows)}", flush=True)
    except KeyboardInterrupt:
        report.note("interrupted; the results so far stand above")
        status = 130
    finally:
        recorder.close()
    return status


def chosen(op: str, args: argparse.Namespace) -> list[Case]:
    """The cases of an op that the arguments ask for."""
    return [
        case
        for case in OPS[op](args.quick)
        if args.dtype in (None, case.dtype_name) and (args.case is None or args.case in case.name)
    ]


def measure_case(case: Case, measured: limits.Limits, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each contestant, alula's first. A contestant with a wrong result is recorded and not timed."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        inputs = case.make(generator)
        errors = check(case, inputs)
        right = [name for name in case.prepare if name not in errors]
        timings: dict[str, Timing] = {}
        memory: BesideMemory | None = None
        if right and "alula" not in errors:
            contestants = {name: rotating(case, name, inputs) for name in right}
            timings, memory = time_beside_memory(
                contestants, limits.yardstick(case.bound, args.threads, quick=args.quick), args
            )
            del contestants
    gc.collect()
    limit = measured.of(case.bound) if memory is None else statistics.median(memory.limits)
    for name in case.prepare:
        record: dict[str, Any] = {
            "kind": "op",
            "op": case.op,
            "case": case.name,
            "dtype": case.dtype_name,
            "engine": name,
            "correct": name not in errors,
        }
        if name in errors:
            record["error"] = errors[name]
        if name in timings:
            timing = timings[name]
            rate = case.work / timing.median / 1e9
            share = None if limit is None else rate / limit
            if memory is not None:
                share = memory.share(name, case.work)
            record |= {
                "median_s": timing.median,
                "q25_s": timing.quartiles[0],
                "q75_s": timing.quartiles[1],
                "samples": len(timing.samples),
                "work": case.work,
                "rate": rate,
                "unit": UNITS[case.bound],
                "limit": case.bound,
                "limit_value": limit,
                "limit_share": share,
                "alula_ratio": None if name == "alula" else paired_ratio(timings["alula"], timing),
            }
        yield record


@dataclasses.dataclass(frozen=True)
class BesideMemory:
    """What memory allowed before each block of rounds, in GB/s, and each contestant's median time in the block."""

    limits: list[float]
    medians: dict[str, list[float]]

    def share(self, name: str, work: int) -> float:
        """The share of the limit that a contestant reaches with `work` bytes: the median over the blocks."""
        pairs = zip(self.medians[name], self.limits, strict=True)
        return statistics.median(work / seconds / 1e9 / limit for seconds, limit in pairs)


def time_beside_memory(
    contestants: dict[str, Callable[[], object]], memory: limits.Yardstick | None, args: argparse.Namespace
) -> tuple[dict[str, Timing], BesideMemory | None]:
    """Time the contestants in turn, in blocks of rounds, with a look at memory before each block if it is the limit.

    Not in every round: the yardstick evicts the contestants' code, which the warm-up of a block brings back.
    """
    blocks = 1 if memory is None else 2 if args.quick else BLOCKS
    least = math.ceil((3 if args.quick else 7) / blocks)
    beside = BesideMemory([], {name: [] for name in contestants})
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(blocks):
        if memory is not None:
            beside.limits.append(memory.rate())
        seconds = 0.0 if args.quick else args.seconds / blocks
        for name, timing in interleave(contestants, seconds=seconds, min_rounds=least, warmup=1).items():
            samples[name] += timing.samples
            beside.medians[name].append(timing.median)
    timings = {name: Timing(tuple(taken)) for name, taken in samples.items()}
    return timings, None if memory is None else beside


def check(case: Case, inputs: Inputs) -> dict[str, str]:
    """What is wrong with the result of each contestant that is wrong: against fp64, within the error budget."""
    expected = as_tuple(case.reference(inputs, torch.float64))
    budget = (None,) * len(expected)
    if case.dtype != torch.float32:
        budget = as_tuple(case.reference(inputs, case.dtype))
    errors = {}
    for name, prepare in case.prepare.items():
        try:
            actual = as_tuple(prepare(inputs)())
            for part, (got, want, allowed) in enumerate(zip(actual, expected, budget, strict=True)):
                compare.assert_close(got, want.double(), budget_from=allowed, name=f"{name}, result {part}:")
        except (AssertionError, RuntimeError) as error:  # a wrong result, or none
            errors[name] = str(error).partition("\n")[0][:300]
    return errors


def rotating(case: Case, name: str, inputs: Inputs) -> Callable[[], object]:
    """The call to time: each call works on the next set of buffers where the case is bound by memory."""
    sets = 1
    if case.bound in ("read", "copy"):
        size = case.bytes_read or sum(
            value.numel() * value.element_size() for value in inputs.values() if isinstance(value, Tensor)
        )
        sets = max(1, math.ceil(COLD_CACHES * last_level_cache_bytes() / size))
    copies = [inputs, *({key: _clone(value) for key, value in inputs.items()} for _ in range(sets - 1))]
    calls = itertools.cycle([case.prepare[name](copy) for copy in copies])
    return lambda: next(calls)()


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """A record as a row of the table."""
    start = (record["case"], record["dtype"], record["engine"])
    if "median_s" not in record:
        return (*start, "not timed" if record["correct"] else "WRONG", "", "", "", "")
    half = (record["q75_s"] - record["q25_s"]) / 2 / record["median_s"]
    return (
        *start,
        report.seconds(record["median_s"]),
        f"{100 * half:.1f} %",
        report.rate(record["rate"], record["unit"]),
        report.share(record["limit_share"]),
        report.times(record["alula_ratio"]),
    )


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks, for this process.

    A large result would otherwise be mapped afresh at each call and the kernel would clear its pages: the time of that,
    not of the op, would be measured, for every contestant. The copy that is the limit writes to mapped pages too.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A result as a tuple of tensors."""
    return result if isinstance(result, tuple) else (result,)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
