"""The random blocks of BigBird in training, as transformers draws them: the same numbers in the same order.

The reference seeds NumPy's global generator with the index of the layer and draws with `numpy.random.permutation`. A
private `RandomState` of the same seed gives the same permutations and leaves the global one alone.

Rows here are query blocks; the first and the last see everything and get none. N block size, n blocks, H heads, r
random blocks a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["draw_training_blocks"]

_OLDER_LENGTHS = (1024, 3072, 4096)  # padded lengths that follow the plan of the paper's experiments
_OLDER_RANGE = 1024  # tokens that this plan draws its blocks from


def draw_training_blocks(
    num_blocks: int, block_size: int, num_random_blocks: int, num_heads: int, layer_idx: int, max_positions: int
) -> np.ndarray:
    """int32 [H, n - 2, r]: the random blocks of rows 1 to n - 2.

    max_positions: the model's `max_position_embeddings`. Raises ValueError for less than four blocks, for a sequence
    beyond max_positions and where a row has fewer than r blocks to draw from.
    """
    num_tokens = num_blocks * block_size
    if num_blocks < 4:
        raise ValueError(f"BigBird's pattern needs 4 blocks or more; {num_blocks} of {block_size} tokens are given")
    random = np.random.RandomState(layer_idx)
    if num_tokens not in _OLDER_LENGTHS:
        return _draw_by_segments(random, num_blocks, num_random_blocks, num_heads)
    rows = max_positions // block_size - 2  # for the longest sequence; this one takes the first of them
    if rows < num_blocks - 2:
        raise ValueError(
            f"max_position_embeddings is {max_positions}; a sequence of {num_tokens} tokens needs at least as many"
        )
    heads = [_draw_older(random, rows, block_size, num_random_blocks) for _ in range(num_heads)]
    return np.stack(heads)[:, : num_blocks - 2]


def _draw_older(random: np.random.RandomState, rows: int, block_size: int, wanted: int) -> np.ndarray:
    """[rows, r] of one head. Row 1 draws from block 3 on, row 2 from 4 on, the last two rows from 1 on, the others
    leave out the three blocks around themselves; `last` counts from the start of the list, which is block 1."""
    blocks = np.arange(1, rows + 1, dtype=np.int32)
    last = rows + 1
    if 2 * block_size < _OLDER_RANGE:
        last = _OLDER_RANGE // block_size - 1
    drawn = np.zeros((rows, wanted), dtype=np.int32)
    for row in range(1, rows + 1):
        if row <= 2:
            pool = blocks[row + 1 : last]
        elif row >= rows - 1 or row - 2 > last:
            pool = blocks[:last]
        elif row + 1 == last:
            pool = blocks[: row - 2]
        else:
            pool = np.concatenate((blocks[: row - 2], blocks[row + 1 : last]))
        _fill(drawn[row - 1], random.permutation(pool)[:wanted], row)
    return drawn


class _Segment(NamedTuple):
    """Key blocks [begin, end), of which a row draws those that fill columns [first, past) of its random blocks."""

    begin: int
    end: int
    first: int
    past: int

    @property
    def wanted(self) -> int:
        return self.past - self.first


def _segments(num_blocks: int, wanted: int) -> list[_Segment]:
    """Long sequences draw all from the first 2 r + 5 blocks, shorter ones half from the first r + 5, half behind."""
    if num_blocks > 2 * wanted + 5:
        border, before = 2 * wanted + 5, wanted
    elif num_blocks > wanted + 5:
        border, before = wanted + 5, wanted // 2
    else:
        return [_Segment(0, num_blocks, 0, wanted)]
    return [_Segment(0, border, 0, before), _Segment(border, num_blocks, before, wanted)]


def _draw_by_segments(random: np.random.RandomState, num_blocks: int, wanted: int, num_heads: int) -> np.ndarray:
    """[H, n - 2, r], drawn in the reference's order: per segment and rows, all heads of a row in turn."""
    drawn = np.zeros((num_heads, num_blocks, wanted), dtype=np.int32)
    for row, segment in _order_of_drawing(_segments(num_blocks, wanted)):
        for head in range(num_heads):
            _fill(drawn[head, row, segment.first : segment.past], _draw_row(random, row, segment), row)
    return drawn[:, 1 : num_blocks - 1]


def _order_of_drawing(segments: list[_Segment]) -> Iterator[tuple[int, _Segment]]:
    """(row, segment it draws from). The last row draws too, although it sees all: it moves the generator on."""
    for i, segment in enumerate(segments):
        if i > 0 and segment.wanted:
            yield from ((row, segment) for row in range(1, segment.begin))
        for earlier in segments[:i]:
            if earlier.wanted:
                yield from ((row, earlier) for row in range(segment.begin, segment.end))
        if segment.wanted:
            yield from ((row, segment) for row in range(max(1, segment.begin), segment.end))


def _draw_row(random: np.random.RandomState, row: int, segment: _Segment) -> list[int]:
    """The first blocks of a permuted segment that the row may draw: none of its window, not the first block, not the
    segment's last, and not the block next to the far end that rows 1 and end - 2 would share with a global row."""
    permuted = random.permutation(np.arange(segment.begin, segment.end, dtype=np.int32))
    taken = {row - 1, row, row + 1, 0, segment.end - 1}
    if row == 1:
        taken.add(segment.end - 2)
    if row == segment.end - 2:
        taken.add(1)
    return [block for block in permuted.tolist() if block not in taken][: segment.wanted]


def _fill(row: np.ndarray, blocks: np.ndarray | list[int], number: int) -> None:
    """Sets a row. A single block fills it whole, as NumPy does it for the reference; another number fails there too."""
    if len(blocks) not in (1, len(row)):
        raise ValueError(
            f"query block {number} has {len(blocks)} blocks to draw {len(row)} random ones from: "
            "the sequence is too short for num_random_blocks"
        )
    row[:] = blocks
