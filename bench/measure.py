"""Timing: contestants take turns, each call is one sample, the summary is a median with its quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Samples in seconds, in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, in seconds."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, as a share of the median."""
        first, third = self.quartiles
        return (third - first) / 2 / self.median


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 400,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time the contestants in turn, round after round, until `seconds` have passed or `max_rounds` are done.

    Each contestant is called `warmup` times before the first round. At least `min_rounds` rounds are taken.
    """
    for call in contestants.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def paired_ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of numerator / denominator: both were taken in the same round, so drift cancels."""
    return statistics.median(a / b for a, b in zip(numerator.samples, denominator.samples, strict=True))
