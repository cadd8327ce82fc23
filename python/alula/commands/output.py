"""What `alula generate` prints: the texts as they are made, how fast that went, or one JSON object per row."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Clock", "Printer", "Speed", "report_of"]


class Printer:
    """Prints the rows of a batch in order: the first that runs as it is made, the others when it is their turn."""

    def __init__(self, prompts: list[str], is_quiet: bool) -> None:
        self.texts = [""] * len(prompts)
        self._prompts = prompts
        self._is_quiet = is_quiet
        self._is_done = [False] * len(prompts)
        self._row = 0
        self._num_printed = 0
        self._last = ""

    def begin(self) -> None:
        """Print the first prompt."""
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        self._head()

    def add(self, pieces: list[str], is_done: list[bool]) -> None:
        """Take in the new text of every row and whether the row has ended; print what may be printed."""
        for row, piece in enumerate(pieces):
            self.texts[row] += piece
            self._is_done[row] = self._is_done[row] or is_done[row]
        self._show()
        while self._is_done[self._row] and self._row + 1 < len(self.texts):
            self._close()
            self._row += 1
            self._num_printed = 0
            self._head()
            self._show()

    def end(self) -> None:
        """Finish the last line."""
        self._close()

    def _head(self) -> None:
        if len(self.texts) > 1:
            self._write(f"[{self._row + 1}/{len(self.texts)}]\n")
        self._write(self._prompts[self._row])

    def _show(self) -> None:
        piece = self.texts[self._row][self._num_printed :]
        self._num_printed += len(piece)
        self._write(piece)

    def _close(self) -> None:
        if not self._last.endswith("\n"):
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            self._last = text[-1]
        if text and not self._is_quiet:
            sys.stdout.write(text)
            sys.stdout.flush()


class Clock:
    """Times the steps of a generation: the first reads the prompt, the others decode."""

    def __init__(self) -> None:
        self.prompt_seconds = 0.0
        self.decode_seconds = 0.0
        self.decode_steps = 0

    def time(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Pass on `steps`, timing each."""
        while True:
            start = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            seconds = time.perf_counter() - start
            if self.prompt_seconds == 0.0:
                self.prompt_seconds = seconds
            else:
                self.decode_seconds += seconds
                self.decode_steps += 1
            yield step


@dataclass(frozen=True)
class Speed:
    """How fast a generation was. Decoding steps count for tokens/s and bytes/s; each reads all weights once."""

    prompt_seconds: float
    tokens_per_second: float
    weight_bytes: int
    weight_bytes_per_second: float | None
    read_bandwidth: float
    is_in_cache: bool
    cache_bytes: int

    @classmethod
    def measure(cls, model: Any, generation: Any, clock: Clock) -> Speed:
        """Put the times of `clock` against the model's size and the read bandwidth, which is measured now."""
        from alula.limits import last_level_cache_bytes, read_bandwidth

        num_new = sum(generation.num_new_tokens)
        num_decoded = num_new - len(generation.num_new_tokens)
        weight_bytes = model.decode_bytes()
        cache_bytes = last_level_cache_bytes()
        return cls(
            prompt_seconds=clock.prompt_seconds,
            tokens_per_second=(
                num_decoded / clock.decode_seconds if clock.decode_steps else num_new / clock.prompt_seconds
            ),
            weight_bytes=weight_bytes,
            weight_bytes_per_second=(
                weight_bytes * clock.decode_steps / clock.decode_seconds if clock.decode_steps else None
            ),
            read_bandwidth=read_bandwidth(),
            is_in_cache=weight_bytes <= cache_bytes,
            cache_bytes=cache_bytes,
        )

    @property
    def share(self) -> float | None:
        """Weights read per second as a share of the read bandwidth; above 1 is possible where they fit the cache."""
        return None if self.weight_bytes_per_second is None else self.weight_bytes_per_second / self.read_bandwidth

    def line(self, generation: Any) -> str:
        """The one line for people."""
        parts = [
            f"{sum(generation.prompt_lengths)} prompt tokens ({1e3 * self.prompt_seconds:.1f} ms)",
            f"{sum(generation.num_new_tokens)} new tokens",
            f"{self.tokens_per_second:.1f} tokens/s",
        ]
        if self.weight_bytes_per_second is not None:
            parts.append(f"{self.weight_bytes_per_second / 1e9:.2f} GB/s of weights read")
            limit = (
                f"{100 * self.share:.0f} % of the {self.read_bandwidth / 1e9:.1f} GB/s this machine reads from memory"
            )
            if self.is_in_cache:
                limit += f" (in cache: {self.weight_bytes / 1e6:.1f} MB of weights in {self.cache_bytes / 1e6:.0f} MB)"
            parts.append(limit)
        if generation.seeds[0] is not None:
            parts.append(f"seed {generation.seeds[0]}")
        return "alula: " + ", ".join(parts)


def report_of(generation: Any, row: int, prompt: str, text: str, speed: Speed | None) -> dict[str, Any]:
    """The JSON object of one row."""
    report = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": generation.prompt_lengths[row],
        "new_tokens": generation.num_new_tokens[row],
        "finish_reason": generation.finish_reasons[row] or "interrupted",
        "stop": generation.stopped_by(row),
        "seed": generation.seeds[row],
    }
    if speed is not None:
        report |= {
            "tokens_per_second": round(speed.tokens_per_second, 2),
            "prompt_seconds": round(speed.prompt_seconds, 6),
            "weight_bytes_per_token": speed.weight_bytes,
            "weights_gb_per_second": None if speed.share is None else round(speed.weight_bytes_per_second / 1e9, 3),
            "read_bandwidth_gb_per_second": round(speed.read_bandwidth / 1e9, 3),
            "share_of_read_bandwidth": None if speed.share is None else round(speed.share, 4),
            "weights_fit_in_cache": speed.is_in_cache,
        }
    return report
