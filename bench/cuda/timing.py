"""Where and how long: a device, the times of its calls, and what it can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[[int], Any]  # called with the number of a copy of the operands


class Case(NamedTuple):
    """One op at one shape. Of the contestants alula comes first, then the peer whose result it is compared with."""

    name: str
    contestants: dict[str, Function]
    copies: int
    nbytes: float = 0.0  # that must move
    flops: float = 0.0
    tolerance: float = 2e-2  # of the largest value, between alula and the first peer


class Bench(NamedTuple):
    """A device, and whether to take small sizes only."""

    device: torch.device
    quick: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def rand(self, *shape: int) -> Tensor:
        """Normal values in bf16."""
        return torch.randn(shape, device=self.device).to(torch.bfloat16)

    def copies_of(self, nbytes: float) -> int:
        """Copies of operands that exceed the caches together."""
        return 2 if self.quick else max(1, min(64, int(256e6 / max(nbytes, 1)) + 1))

    def choose(self, shapes: list[tuple[int, ...]], quick: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return quick if self.quick else shapes

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """torch.compile, which is left out where nothing is timed in earnest."""
        return torch.compile(function, **options) if self.is_gpu else function

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Gives memory back between cases."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def elapsed(self, function: Function, first: int, repeats: int) -> float:
        """Microseconds of one call, over `repeats` calls queued together."""
        if not self.is_gpu:
            start = time.perf_counter()
            for i in range(repeats):
                function(first + i)
            return (time.perf_counter() - start) * 1e6 / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # the queue is full before the first call runs
        begin.record()
        for i in range(repeats):
            function(first + i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / repeats

    def limits(self) -> dict[str, float]:
        """What the device was seen to do: bytes read and written by a copy, operations of a large product."""
        size, width = (1 << 20, 256) if self.quick else (1 << 30, 8192)
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        to = torch.empty_like(source)
        copy = min(self.elapsed(lambda _: to.copy_(source), 0, 4) for _ in range(5))
        a = self.rand(width, width)
        product = min(self.elapsed(lambda _: a @ a, 0, 3) for _ in range(4))
        return {
            "copy GB/s": float(f"{2 * size / copy / 1e3:.4g}"),
            "bf16 product TFLOP/s": float(f"{2 * width**3 / product / 1e6:.4g}"),
        }


def measure(bench: Bench, case: Case, rounds: int, limits: dict[str, float]) -> dict[str, Any]:
    """Compare, warm up, take turns."""
    results, failed = {}, {}
    for name, function in case.contestants.items():
        try:
            results[name] = function(0)
        except Exception as error:  # a peer that does not run here, such as one that is compiled, leaves the others
            if name == "alula":
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    names = list(results)
    wrong = ""
    if len(names) > 1:
        ours, theirs = (_values(results[name]) for name in names[:2])
        error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
        wrong = "" if error <= case.tolerance else f"differs by {error:.2g} of the largest value"
    times: dict[str, list[float]] = {name: [] for name in names}
    repeats = 2 if bench.quick else 20
    if not wrong:
        for i in range(rounds + 2):
            for name in names:
                function = case.contestants[name]
                took = bench.elapsed(lambda n, f=function: f(n % case.copies), i * repeats, repeats)
                if i >= 2:
                    times[name].append(took)
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    row: dict[str, Any] = {"case": case.name, "wrong": wrong, "us": medians, "failed": failed}
    row["spread_us"] = {name: [min(values), max(values)] for name, values in times.items() if values}
    if medians and case.nbytes:
        row["GB/s"] = case.nbytes / medians[names[0]] / 1e3
        row["of the copy"] = row["GB/s"] / limits["copy GB/s"]
    if medians and case.flops:
        row["TFLOP/s"] = case.flops / medians[names[0]] / 1e6
        row["of the product"] = row["TFLOP/s"] / limits["bf16 product TFLOP/s"]
    return row


def _values(result: Any) -> Tensor:
    """float32; of several tensors, all of them in one row."""
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.float().flatten() for part in parts])


def line_of(row: dict[str, Any]) -> str:
    """A row of the table in words."""
    if row["wrong"]:
        return f"{row['case']:<52} WRONG: {row['wrong']}"
    times = "  ".join(f"{name} {time:.1f} us" for name, time in row["us"].items())
    share = "".join(f"  {row[k]:.0%} {k}" for k in ("of the copy", "of the product") if k in row)
    failed = "".join(f"  {name} does not run: {why.splitlines()[0][:80]}" for name, why in row["failed"].items())
    return f"{row['case']:<52} {times}{share}{failed}"
