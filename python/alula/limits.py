"""What this machine's memory can do: the read bandwidth that a decode step is held against."""

from __future__ import annotations

import contextlib
import mmap
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["large_page_ones", "last_level_cache_bytes", "read_bandwidth"]

_DEFAULT_CACHE = 32 << 20
_LEAST_BUFFER = 256 << 20
_MOST_BUFFER = 1 << 30
_LARGE_PAGE = 2 << 20


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


def large_page_ones(count: int) -> Tensor:
    """`count` ones, float32, in pages of 2 MiB where the kernel gives them, and else as torch allocates them."""
    import torch

    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if advice is None:
        return torch.ones(count, dtype=torch.float32)
    memory = mmap.mmap(-1, 4 * count + _LARGE_PAGE)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _LARGE_PAGE
    return whole[start : start + 4 * count].view(torch.float32).fill_(1.0)


def read_bandwidth(seconds: float = 0.3) -> float:
    """Measure how fast torch's threads read memory, in bytes per second: the best of several passes over a buffer.

    The buffer is at least four times the last-level cache and 256 MiB (1 GiB at most), so that little of it is left in
    the cache from one pass to the next, and lies in large pages where the kernel gives them, as packed weights do:
    pages of 4 KiB hold fast memory back.  A pass is a sum or a maximum, in turn, as one may be held back by arithmetic
    where the other is not.  It measures for `seconds`, and at least four passes.
    """
    import torch

    num_bytes = min(max(4 * last_level_cache_bytes(), _LEAST_BUFFER), _MOST_BUFFER)
    with torch.inference_mode():
        buffer = large_page_ones(num_bytes // 4)
        best, passes, end = float("inf"), 0, time.perf_counter() + seconds
        while passes < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            buffer.sum() if passes % 2 == 0 else buffer.amax()
            best = min(best, time.perf_counter() - start)
            passes += 1
    return num_bytes / best
