"""What this machine's memory can do: the read bandwidth that a decode step is held against."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["last_level_cache_bytes", "read_bandwidth"]

_DEFAULT_CACHE = 32 << 20
_LEAST_BUFFER = 256 << 20
_MOST_BUFFER = 1 << 30


def last_level_cache_bytes() -> int:
    """Bytes of the last-level cache that the first core sees; 32 MiB where Linux does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
        except (OSError, ValueError):
            continue
    return max(sizes, default=_DEFAULT_CACHE)


def read_bandwidth(seconds: float = 0.3) -> float:
    """Measure how fast torch's threads read memory, in bytes per second: the best of several passes over a buffer.

    The buffer is at least four times the last-level cache and 256 MiB (1 GiB at most), so that little of it is left in
    the cache from one pass to the next.  A pass is a sum or a maximum, in turn, as one may be held back by arithmetic
    where the other is not.  It measures for `seconds`, and at least four passes.
    """
    import torch

    num_bytes = min(max(4 * last_level_cache_bytes(), _LEAST_BUFFER), _MOST_BUFFER)
    with torch.inference_mode():
        buffer = torch.ones(num_bytes // 4, dtype=torch.float32)
        best, passes, end = float("inf"), 0, time.perf_counter() + seconds
        while passes < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            buffer.sum() if passes % 2 == 0 else buffer.amax()
            best = min(best, time.perf_counter() - start)
            passes += 1
    return num_bytes / best
