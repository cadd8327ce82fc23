"""Choosing the next token: the logits processors and one sampler.

The definitions, and their order, are those of Hugging Face: repetition penalty, minimum length, temperature, top-k,
top-p, min-p, draw.  The work is done on one row at a time in NumPy: a row's token depends on its own logits and its
own random stream alone, so it cannot depend on its batch mates; and no pass over the vocabulary sorts it.  A filter
looks for its cut among the few logits near the largest one, widening the look only where these hold too little mass.

V is the vocabulary size.  Everything below temperature works on *shifted* logits, (logits - max) / temperature: the
largest is 0, so no temperature overflows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["RepetitionPenalty", "Sampler", "kept_tokens"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# How far below the largest shifted logit a filter looks before it takes in the whole vocabulary.
_SPREADS = (4.0, 8.0, 16.0)
# top-p sorts at most this many tokens, or what is left after this many looks (many equal logits).
_FEW = 1024
_PROBES = 20
# The last level of the inverse cumulative distribution: one block sum per this many tokens.
_BLOCK = 256


class RepetitionPenalty:
    """Hugging Face's repetition penalty: a token that occurred has its logit divided (> 0) or multiplied (< 0).

    The tokens that occurred are kept as a factor per token, so that a step costs the same however long the text is.
    """

    def __init__(self, penalty: float, vocab_size: int, prompt_ids: Ints) -> None:
        self._penalty = np.float32(penalty)
        self._factors = np.ones(vocab_size, dtype=np.float32)
        self._factors[prompt_ids] = self._penalty

    def add(self, token: int) -> None:
        """Note that `token` occurred."""
        self._factors[token] = self._penalty

    def apply(self, logits: Floats) -> Floats:
        """Return the penalized copy of `logits` [V]."""
        return np.where(logits < 0, logits * self._factors, logits / self._factors)


class Sampler:
    """Draws one token per call from the logits of one row, with a random stream of its own.

    `seed` alone decides the stream; a token takes one number of it.  A temperature of 0 is the limit: the largest
    logit, and the lowest id among equals, as in greedy decoding.
    """

    def __init__(
        self, seed: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._min_p = min_p

    def draw(self, logits: Floats) -> int:
        """Return a token id drawn from `logits` [V] float32 (not modified).  Raises ValueError if one is NaN."""
        uniform = self._random.random()
        if self._temperature == 0:
            return greedy(logits)
        shifted = shift(logits, self._temperature)
        ids = kept_tokens(shifted, top_k=self._top_k, top_p=self._top_p, min_p=self._min_p)
        if ids is None:
            return _draw_from_all(np.exp(shifted), uniform)
        ids.sort()  # the order of the draw, on every device
        mass = np.cumsum(np.exp(shifted[ids]), dtype=np.float64)
        return int(ids[min(np.searchsorted(mass, uniform * mass[-1], side="right"), len(ids) - 1)])


def greedy(logits: Floats) -> int:
    """Return the id of the largest of `logits` [V], the lowest id among equals.  Raises ValueError if one is NaN."""
    token = int(logits.argmax())
    _check_largest(logits[token])
    return token


def shift(logits: Floats, temperature: float = 1.0) -> Floats:
    """Return (logits - max) / temperature as a new float32 array [V].  Raises ValueError if a logit is NaN."""
    largest = logits.max()
    _check_largest(largest)
    shifted = logits - largest
    if temperature != 1.0:
        with np.errstate(over="ignore"):
            shifted /= np.float32(temperature) if temperature > 1e-37 else np.float32(1e-37)
    return shifted


def kept_tokens(shifted: Floats, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Ints | None:
    """Return the ids that survive the filters, in no order, or None where no filter is on and all survive.

    `shifted` is what `shift` returns.  top-k keeps the k largest and every equal of the k-th; top-p then keeps the
    smallest set of the most likely tokens whose probability reaches `top_p`; min-p then keeps tokens at least `min_p`
    times as likely as the most likely one.  At least one token is kept.
    """
    ids: Ints | None = None
    if 0 < top_k < len(shifted):
        ids = np.flatnonzero(shifted >= _kth_largest(shifted, top_k))
    if top_p < 1.0:
        ids = _nucleus(shifted, ids, top_p)
    if min_p > 0.0:
        least = np.float32(np.log(min_p))
        ids = np.flatnonzero(shifted >= least) if ids is None else ids[shifted[ids] >= least]
    return ids


def _kth_largest(shifted: Floats, k: int) -> np.float32:
    for spread in _SPREADS:
        near = shifted >= -spread
        count = np.count_nonzero(near)
        if count >= k:
            return np.partition(shifted[near], count - k)[count - k]
    return np.partition(shifted, len(shifted) - k)[len(shifted) - k]


def _nucleus(shifted: Floats, ids: Ints | None, top_p: float) -> Ints:
    """Return those of `ids` (None: all) that top-p keeps.  Of equals, the higher ids are kept first."""
    if ids is None:
        surely, ids, below = _around_cut(shifted, top_p)
    else:
        surely, below = ids[:0], 0.0
    order = np.argsort(shifted[ids], kind="stable")
    reached = below + np.cumsum(np.exp(shifted[ids[order]]), dtype=np.float64)
    total = reached[-1] + np.exp(shifted[surely]).sum(dtype=np.float64)
    kept = reached > (1.0 - top_p) * total
    kept[-1] |= len(surely) == 0
    return np.concatenate([surely, ids[order[kept]]])


def _around_cut(shifted: Floats, top_p: float) -> tuple[Ints, Ints, float]:
    """Narrow down where top-p cuts: (ids surely kept, ids among which the cut lies, weight of all below these)."""
    weights = np.exp(shifted)
    total = float(weights.sum(dtype=np.float64))
    low, high = float(shifted.min()), np.inf  # the cut is at or above low and below high
    num_kept, num_low = 0, len(shifted)  # how many tokens are at or above high, and low
    probes = [-spread for spread in _SPREADS]
    for _ in range(_PROBES):
        if num_low - num_kept <= _FEW:
            break
        # Halfway once the first looks are used up, or further down where the least logit is -inf.
        middle = 0.5 * (low + min(high, 0.0)) if np.isfinite(low) else 2.0 * high
        probe = probes.pop(0) if probes else middle
        if not low < probe < high:
            continue
        above = shifted >= probe
        if float((weights * above).sum()) >= top_p * total:
            low, num_low, probes = probe, np.count_nonzero(above), []
        else:
            high, num_kept = probe, np.count_nonzero(above)
    surely = np.flatnonzero(shifted >= high)
    ids = np.flatnonzero((shifted >= low) & (shifted < high))
    return surely, ids, float((weights * (shifted < low)).sum(dtype=np.float64))


def _draw_from_all(weights: Floats, uniform: float) -> int:
    """Invert the cumulative distribution of `weights` [V] in two levels: a block, then a token inside it."""
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    target = min(uniform * blocks[-1], np.nextafter(blocks[-1], 0.0))
    block = int(np.searchsorted(blocks, target, side="right"))
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    if block:
        target -= blocks[block - 1]
    token = start + int(np.searchsorted(inside, target, side="right"))
    last = start + int(np.flatnonzero(weights[start : start + _BLOCK])[-1])
    return min(token, last)


def _check_largest(largest: np.float32) -> None:
    # NaN wins every argmax and every max in NumPy, so looking at the largest alone finds it.
    if not np.isfinite(largest):
        raise ValueError(
            f"the largest logit is {largest}: no token can be chosen from logits that hold NaN or +inf, or only -inf"
        )
