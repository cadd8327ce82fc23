"""Choosing the next token where the logits are, without asking the device for anything: a step's choice for all rows,
made of tensor operations that a CUDA graph can hold.

The definitions, their order and the random streams are those of `alula.sampling`: a row draws number t of the stream of
its seed for its t-th token, and the draw inverts the cumulative distribution of the kept tokens in the order of their
ids.  So the same seed gives the same text on every device, up to rounding where a number falls between two tokens.

R rows (of which the last may be nobody's), V vocabulary, N new tokens at most, E eos ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alula.generation_config import GenerationConfig
from alula.ops import RowState

__all__ = ["ChoiceKind", "DeviceChooser"]


# Bound once: what follows from a choice is one kernel, beside some five a layer for the whole model.
choose_token_op = torch.ops.alula.choose_token.default


class ChoiceKind(NamedTuple):
    """Which operations a choice is made of; numbers such as the temperature lie on the device and may change."""

    is_sampled: bool
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool
    has_penalty: bool
    has_min_new: bool
    num_eos: int

    @classmethod
    def of(cls, config: GenerationConfig, min_new: int, vocab_size: int) -> ChoiceKind:
        """The operations that a configuration needs."""
        is_sampled = config.do_sample and config.temperature != 0
        return cls(
            is_sampled,
            is_sampled and 0 < config.top_k < vocab_size,
            is_sampled and config.top_p < 1.0,
            is_sampled and bool(config.min_p),
            config.repetition_penalty != 1.0,
            bool(config.eos_ids) and min_new > 0,
            len(config.eos_ids),
        )


class DeviceChooser:
    """The state of R rows on the device, and the choice that moves it on.

    Attributes: `state`, the tensors of :class:`alula.ops.RowState`.
    """

    def __init__(self, rows: int, vocab_size: int, max_new: int, device: torch.device) -> None:
        if vocab_size > 1 << 24:
            raise ValueError(f"vocab_size={vocab_size}; accepted on a GPU: up to {1 << 24}")
        self.kind = ChoiceKind(False, False, False, False, False, False, 0)
        self._vocab_size, self._device = vocab_size, device
        with torch.inference_mode(False):
            self.state = RowState(
                tokens=torch.zeros(rows, 1, dtype=torch.int64, device=device),
                running=torch.zeros(rows, dtype=torch.bool, device=device),
                out=torch.zeros(rows, max_new, dtype=torch.int64, device=device),
                step=torch.zeros(1, dtype=torch.int64, device=device),
                report=torch.zeros(2, rows, dtype=torch.float32, device=device),
                lengths=torch.zeros(rows, dtype=torch.int32, device=device),
                positions=torch.zeros(rows, 1, dtype=torch.int64, device=device),
                slots=torch.full((rows, 1), -1, dtype=torch.int32, device=device),
                seen=torch.zeros(rows, dtype=torch.int32, device=device),
            )
            self._pad_id = torch.zeros(1, dtype=torch.int64, device=device)
            self._min_new = torch.zeros(1, dtype=torch.int64, device=device)
            self._kth = torch.zeros(1, dtype=torch.int64, device=device)  # where the k-th largest is, sorted upwards
            self._temperature = torch.ones(1, dtype=torch.float32, device=device)
            self._dropped = torch.zeros(1, dtype=torch.float64, device=device)  # 1 - top_p
            self._least = torch.zeros(1, dtype=torch.float32, device=device)  # log(min_p)
            self._penalty = torch.ones(1, dtype=torch.float32, device=device)
        self._eos: dict[int, Tensor] = {}  # by count, so that a captured step finds its own where it was
        self._uniforms: Tensor | None = None  # float64 [R, N]
        self._factors: Tensor | None = None  # float32 [R, V]: the penalty of tokens that occurred, 1 for others

    @property
    def rows(self) -> int:
        return self.state.running.shape[0]

    def start(
        self,
        config: GenerationConfig,
        *,
        seeds: Sequence[int | None],
        prompts: Sequence[np.ndarray],
        num_new: int,
        min_new: int,
        pad_id: int,
    ) -> None:
        """Begins with a row for each of `prompts`, int64 ids without padding; the other rows have ended."""
        kind = ChoiceKind.of(config, min_new, self._vocab_size)
        count = len(prompts)
        self.kind = kind
        with torch.inference_mode(False):
            for tensor in (self.state.tokens, self.state.step, self.state.report):
                tensor.zero_()
            self.state.running.zero_().narrow(0, 0, count).fill_(True)
            self._pad_id.fill_(pad_id)
            self._min_new.fill_(min_new)
            if kind.num_eos:
                self._fill_eos(config.eos_ids)
            if kind.is_sampled:
                self._temperature.fill_(max(config.temperature, 1e-37))
                self._kth.fill_(max(self._vocab_size - config.top_k, 0))
                self._dropped.fill_(1.0 - config.top_p)
                self._least.fill_(math.log(config.min_p) if config.min_p else -math.inf)
                numbers = np.stack([np.random.default_rng(seed).random(num_new) for seed in seeds])
                if self._uniforms is None:
                    self._uniforms = torch.zeros(self.state.out.shape, dtype=torch.float64, device=self._device)
                self._uniforms[:count, :num_new].copy_(torch.from_numpy(numbers))
            if kind.has_penalty:
                self._penalty.fill_(config.repetition_penalty)
                self._note_prompts(prompts)

    def place(self, lengths: Tensor, positions: Tensor) -> None:
        """Says where the first rows are: lengths int32 [B], the tokens they have stored; positions int64 [B, 1], of
        their first new tokens. The other rows are empty."""
        count = lengths.shape[0]
        self.state.lengths.zero_()[:count].copy_(lengths)
        self.state.positions.zero_()[:count].copy_(positions)

    def end_row(self, row: int) -> None:
        """Ends a row that the device takes for running."""
        self.state.running.narrow(0, row, 1).fill_(False)
        self.state.slots.narrow(0, row, 1).fill_(-1)

    def _fill_eos(self, eos_ids: Sequence[int]) -> None:
        ids = torch.tensor(eos_ids, dtype=torch.int64)
        if len(eos_ids) not in self._eos:
            self._eos[len(eos_ids)] = torch.zeros(len(eos_ids), dtype=torch.int64, device=self._device)
        self._eos[len(eos_ids)].copy_(ids)

    def _note_prompts(self, prompts: Sequence[np.ndarray]) -> None:
        if self._factors is None:
            self._factors = torch.ones(self.rows, self._vocab_size, dtype=torch.float32, device=self._device)
        self._factors.fill_(1.0)
        width = max(map(len, prompts))
        ids = np.stack([np.pad(prompt, (0, width - len(prompt)), mode="edge") for prompt in prompts])
        index = torch.from_numpy(ids).to(self._device)
        self._factors[: len(prompts)].scatter_(1, index, self._penalty.expand(index.shape))

    # --- a step: nothing below waits for the device ---------------------------------------------------------

    def process(self, logits: Tensor) -> Tensor:
        """What comes before sampling: repetition penalty and minimum length, of logits [R, V]; float32 where they say
        something."""
        if self.kind.has_penalty:
            logits = logits.float()
            logits = torch.where(logits < 0, logits * self._factors, logits / self._factors)
        if self.kind.has_min_new:
            logits, eos = logits.float(), self._eos[self.kind.num_eos]
            ends = logits.index_select(1, eos).masked_fill(self.state.step < self._min_new, -torch.inf)
            logits = logits.index_copy(1, eos, ends)
        return logits

    def choose(self, logits: Tensor, *, advances: bool = False) -> None:
        """Chooses a token for each row that runs, from processed logits [R, V], and moves the state on. `advances`: the
        newest tokens have been stored."""
        drawn = None
        if self.kind.is_sampled:
            logits = logits.float()
            drawn = self._draw(logits, logits.amax(-1))
        eos = self._eos[self.kind.num_eos] if self.kind.num_eos else None
        choose_token_op(logits, drawn, self._pad_id, eos, advances, *self.state)
        if self.kind.has_penalty:  # in rows that have ended, nobody looks at it
            self._factors.scatter_(1, self.state.tokens, self._penalty.expand(self.rows, 1))

    def _draw(self, logits: Tensor, largest: Tensor) -> Tensor:
        """A token of each row, int64 [R]; `largest` float32 [R]."""
        kind, size = self.kind, logits.shape[1]
        shifted = (logits - largest.unsqueeze(1)) / self._temperature
        kept = None
        if kind.has_top_k or kind.has_top_p:
            values, order = shifted.sort(dim=-1, stable=True)
            if kind.has_top_k:
                kth = values.index_select(1, self._kth)
                kept = shifted >= kth
            if kind.has_top_p:
                weights = values.exp()
                if kind.has_top_k:
                    weights = torch.where(values >= kth, weights, 0.0)
                reached = weights.cumsum(-1, dtype=torch.float64)
                in_order = reached > self._dropped * reached[:, -1:]
                in_order.select(1, -1).fill_(True)
                kept = torch.zeros_like(in_order).scatter_(1, order, in_order)
        if kind.has_min_p:
            likely = shifted >= self._least
            kept = likely if kept is None else kept & likely
        weights = shifted.exp()
        if kept is not None:
            weights = torch.where(kept, weights, 0.0)
        mass = weights.cumsum(-1, dtype=torch.float64)
        total = mass[:, -1:]
        target = self._uniforms.index_select(1, self.state.step) * total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(mass, target, right=True).squeeze(1).clamp_(max=size - 1)
