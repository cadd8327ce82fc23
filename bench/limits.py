"""The limits of this machine, measured: memory read and copy bandwidth, fp32 FMA, bf16 and int8 dot-product peaks.

A limit is the best that several plain ways to reach it gave: the share that an op reaches is then never flattered by a
slow yardstick. Bandwidths count the bytes that the program asks for (a copy: each byte read and each byte written).
Memory changes its speed from minute to minute on a shared machine, so a `Yardstick` is laid on again and again.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import alula.limits
import torch

BUFFER_BYTES = 512 << 20  # beyond any last-level cache in use
QUICK_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class Limits:
    """Read and copy in GB/s, peaks in GFLOP/s (an FMA is two); None where this build cannot measure one."""

    read: float
    copy: float
    fp32_fma: float | None
    bf16_dot: float | None
    int8_dot: float | None = None

    def of(self, bound: str) -> float | None:
        """The limit of a kind: read, copy, fp32_fma, bf16_dot or int8_dot."""
        return getattr(self, bound)

    def line(self) -> str:
        """The limits for people."""

        def flops(value: float | None) -> str:
            return "n/a" if value is None else f"{value:.0f} GFLOP/s"

        return (
            f"limits: read {self.read:.1f} GB/s, copy {self.copy:.1f} GB/s, "
            f"fp32 FMA {flops(self.fp32_fma)}, bf16 dot {flops(self.bf16_dot)}, "
            f"int8 dot {flops(self.int8_dot).replace('GFLOP', 'GOP')}"
        )


def measure(threads: int, seconds: float = 0.5) -> Limits:
    """Every limit with `threads` threads; about `seconds` for each way to reach one."""
    return Limits(
        read=read_bandwidth(threads, seconds),
        copy=copy_bandwidth(threads, seconds),
        fp32_fma=peak_gflops("fp32_fma", threads, seconds),
        bf16_dot=peak_gflops("bf16_dot", threads, seconds),
        int8_dot=peak_gflops("int8_dot", threads, seconds),
    )


def read_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """GB/s of reading memory in order with `threads` threads; see `alula.limits.read_bandwidth`."""
    with _torch_threads(threads):
        return alula.limits.read_bandwidth(seconds) / 1e9


def copy_bandwidth(threads: int, seconds: float = 0.5, *, buffer_bytes: int = BUFFER_BYTES) -> float:
    """GB/s read plus written by a copy: the best of `Tensor.copy_` and of memmove on one part for each thread."""
    with _torch_threads(threads):
        best = min(_fastest(way, seconds) for way in _copies(threads, buffer_bytes))
    return 2 * buffer_bytes / best / 1e9


@dataclass(frozen=True)
class Yardstick:
    """Plain ways to move `work` bytes, the fastest of which is what memory allows at that moment."""

    ways: tuple[Callable[[], object], ...]
    work: int

    def rate(self) -> float:
        """GB/s now: one call of each way."""
        return self.work / min(_seconds(way) for way in self.ways) / 1e9


def yardstick(bound: str, threads: int, *, quick: bool = False) -> Yardstick | None:
    """Ways to read or to copy a buffer beyond the caches, with `threads` threads (torch's, as it is set now).

    bound: read or copy; anything else is no matter of memory and gives None.
    """
    buffer_bytes = QUICK_BUFFER_BYTES if quick else BUFFER_BYTES
    if bound == "read":
        buffer = alula.limits.large_page_ones(buffer_bytes // 4)
        return Yardstick((buffer.sum, buffer.amax), buffer_bytes)
    if bound == "copy":
        return Yardstick(_copies(threads, buffer_bytes), 2 * buffer_bytes)
    return None


def _copies(threads: int, buffer_bytes: int) -> tuple[Callable[[], object], ...]:
    source, target = torch.ones(buffer_bytes // 4), torch.zeros(buffer_bytes // 4)
    part = buffer_bytes // threads

    def move(thread: int) -> None:
        ctypes.memmove(target.data_ptr() + thread * part, source.data_ptr() + thread * part, part)

    return lambda: target.copy_(source), lambda: _on_threads(move, threads)


def peak_gflops(kind: str, threads: int, seconds: float = 0.5) -> float | None:
    """GFLOP/s of `threads` threads that do nothing but `kind` (fp32_fma, bf16_dot or int8_dot) on registers.

    None where alula's library or this processor has no such kernel.
    """
    try:
        from alula import _C
    except ImportError:
        return None
    measure_one = getattr(_C, "peak_gflops", None)  # on the calling thread, without the interpreter's lock
    if measure_one is None:
        return None
    sums = []
    for _ in range(3):
        rates = [0.0] * threads

        def run(thread: int, rates: list[float] = rates) -> None:
            rates[thread] = measure_one(kind, seconds / 3)

        _on_threads(run, threads)
        sums.append(sum(rates))
    best = max(sums)
    return best or None  # 0: this instruction set has no such instruction


def _on_threads(run: Callable[[int], None], threads: int) -> None:
    workers = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _fastest(call: Callable[[], object], seconds: float) -> float:
    call()
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, _seconds(call))
    return best


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _torch_threads:
    """Within the block torch uses this many threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)
