"""How well a language model predicts a text: bits per byte, which compares models whatever their tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Score", "bits_per_byte", "windows_of"]

ROWS = 256  # of logits that are turned into probabilities at once


@dataclass(frozen=True)
class Score:
    """nats: the negative log-likelihood of all tokens; bytes: of the text (UTF-8) that they stand for."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.tokens)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)


def windows_of(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, new) of each window over ``count`` inputs: it reads [first, end) and scores its last ``new``."""
    first = scored = 0
    while scored < count:
        end = min(first + window, count)
        yield first, end, end - scored
        scored, first = end, first + stride


@torch.inference_mode()
def bits_per_byte(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[list[Any]], Any] = iter,
) -> Score:
    """Scores every token of a text once, left to right.

    Args:
        model: a causal language model. tokenizer: its tokenizer.
        window: tokens that the model reads at once (default: all its positions). stride: how far a window moves on
            (default: half a window), so that after the first every token has ``window - stride`` tokens of context.
        progress: wraps the list of windows.

    The text follows the tokenizer's begin-of-text (else end-of-text) token; without one its first token is not scored,
    nor its bytes counted. Raises ValueError for a text without a token to score, and for a window that does not fit.
    """
    limit = model.config.max_position_embeddings
    window = limit if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= limit:
        raise ValueError(f"window is {window}; accepted: 1 to {limit}, the positions of the model")
    if not 1 <= stride <= window:
        raise ValueError(f"stride is {stride}; accepted: 1 to the window, {window}")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    size = len(text.encode())
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is not None:
        ids = [start, *ids]
    elif ids:
        size -= len(tokenizer.decode(ids[:1]).encode())
    if len(ids) < 2:
        raise ValueError("the text has no token to score")
    sequence = torch.tensor(ids)
    nats = 0.0
    for first, end, new in progress(list(windows_of(len(ids) - 1, window, stride))):
        logits = model(sequence[None, first:end], use_cache=False, logits_to_keep=new).logits[0]
        nats += _nats(logits, sequence[end - new + 1 : end + 1])
    return Score(nats, len(ids) - 1, size)


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Sum of -log p of int64 [n] under logits [n, V]."""
    total = 0.0
    for first in range(0, len(targets), ROWS):
        rows = logits[first : first + ROWS].float()
        total += float(torch.nn.functional.cross_entropy(rows, targets[first : first + ROWS], reduction="sum"))
    return total
