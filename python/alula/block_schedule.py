"""What the CUDA kernel of block-sparse attention does in which order: lists of a plan, cut where they are long.

Made once for a plan, on the CPU; a GPU has a copy of it (:meth:`alula.BlockPlan.on`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Schedule", "schedule_lists"]

# A chunk of a list has at least so many keys, and no list has more chunks: what a chunk leaves must be merged.
LEAST_KEYS = 512
MOST_CHUNKS = 16


class Schedule(NamedTuple):
    """items: int32 [number, 6], for each block of threads: list, query block, first entry, number of entries, chunk,
    chunks of the list. The first ``num_partials`` are chunks of lists, neighbours where the list is the same; the
    others are whole lists. The longest come first."""

    items: np.ndarray
    num_partials: int


def schedule_lists(plans: Sequence[np.ndarray], block_size: int, least_keys: int = LEAST_KEYS) -> Schedule:
    """Cut and order the lists of the plans of a batch, or of one plan for all rows.

    ``plans``: starts of each, int32 [H or 1, n + 1], entries counted through all of them; lists are numbered in this
    order. How a plan's lists are cut depends on that plan alone: into chunks of ``least_keys`` and of the mean of its
    lists at least, where a list is longer than that. Empty lists do not count, so that a plan for fewer blocks than
    others of its batch is cut as it is alone.
    """
    lists, blocks, firsts, lengths, chunks = [], [], [], [], []
    for number, starts in enumerate(plans):
        heads, num_blocks = starts.shape[0], starts.shape[1] - 1
        length = np.diff(starts, axis=1).ravel().astype(np.int64)
        total, number_listed = int(length.sum()), max(1, int((length > 0).sum()))
        most = max(least_keys // block_size, -(-total // number_listed), -(-int(length.max(initial=0)) // MOST_CHUNKS))
        lists.append(np.repeat(np.arange(heads) + number * heads, num_blocks))
        blocks.append(np.tile(np.arange(num_blocks), heads))
        firsts.append(starts[:, :-1].ravel())
        lengths.append(length)
        chunks.append(np.maximum(1, -(-length // most)))
    list_of, block, first, length, count = map(np.concatenate, (lists, blocks, firsts, lengths, chunks))
    # Those that are cut before those that are not, then the longest; equal ones in the order of the blocks.
    order = np.lexsort((-length, count == 1))
    list_of, block, first, length, count = (values[order] for values in (list_of, block, first, length, count))
    row = np.repeat(np.arange(len(count)), count)
    chunk = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    begin, end = length[row] * chunk // count[row], length[row] * (chunk + 1) // count[row]
    items = np.stack([list_of[row], block[row], first[row] + begin, end - begin, chunk, count[row]], axis=1)
    return Schedule(items.astype(np.int32), int(count[count > 1].sum()))
