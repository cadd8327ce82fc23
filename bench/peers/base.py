"""What an engine must offer to be timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SETTLE_STEPS = 2  # decode steps at the start of a round that are not counted


class Missing(Exception):
    """The engine, or this combination of options, is not to be had here; the message says why."""


@dataclass(frozen=True)
class Setup:
    """What an engine is loaded with.

    folder: a Hugging Face folder (config.json, safetensors in `dtype`, tokenizer.json).
    work: a folder for what the engine converts the weights into; it may be there from an earlier run.
    dtype: fp32, bf16, or int8, int4, nf4 (the folder is then in bf16). max_tokens: prompt, context and new tokens never
        exceed it. batch: rows of a prompt.
    """

    folder: Path
    work: Path
    dtype: str
    threads: int
    max_tokens: int
    batch: int


class Peer:
    """An engine with one model loaded. `prefill` and `step` leave logits; greedy tokens are taken from them."""

    def __init__(self, setup: Setup) -> None:
        """Load the model. Raises Missing for options that the engine does not have."""
        raise NotImplementedError

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that do the work."""
        return {}

    @property
    def weights(self) -> str:
        """The dtype that the weights are held in, a value that `dtype` may have."""
        raise NotImplementedError

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Forget everything, read the prompts (unequal lengths: padded on the left), return the greedy tokens."""
        raise NotImplementedError

    def step(self, tokens: list[int]) -> list[int]:
        """Append one token to each row, return the greedy tokens."""
        raise NotImplementedError

    def logits(self) -> np.ndarray:
        """Logits [B, V] fp32 of the last prefill or step."""
        raise NotImplementedError

    def greedy(self, prompts: list[list[int]], steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Prefill, then `steps` greedy steps: logits [steps + 1, B, V] fp32 and tokens [steps + 1, B]."""
        tokens, logits = [self.prefill(prompts)], [self.logits()]
        for _ in range(steps):
            tokens.append(self.step(tokens[-1]))
            logits.append(self.logits())
        return np.stack(logits), np.array(tokens)

    def time_prefill(self, prompts: list[list[int]]) -> float:
        """Seconds from the prompts to the greedy tokens."""
        start = time.perf_counter()
        self.prefill(prompts)
        return time.perf_counter() - start

    def time_decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each of `steps` steps after the prompts; the first steps after a prefill are not counted."""
        tokens = self.prefill(prompts)
        taken = []
        for _ in range(SETTLE_STEPS + steps):
            start = time.perf_counter()
            tokens = self.step(tokens)
            taken.append(time.perf_counter() - start)
        return taken[SETTLE_STEPS:]


def argmax_rows(logits: Any) -> list[int]:
    """Greedy tokens of logits [B, V] in numpy."""
    return [int(token) for token in logits.argmax(axis=-1)]
