"""The steps of a generation whose tokens are chosen on the device: queued ahead, read back when they are wanted.

B rows of the call, R of the step (cuda_graph.py), V vocabulary, N new tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.cuda_graph import DecodeStep, can_step, pooled_step
from alula.devices import raise_id_fault
from alula.generation_config import GenerationConfig

__all__ = ["DeviceSteps", "chooses_on_device"]

Processor = Callable[[Tensor], Tensor]  # of float32 [B, V]


def chooses_on_device(model: Any) -> bool:
    """Whether tokens are chosen where the logits are; elsewhere `alula.sampling` looks at each row on the host."""
    return model.device.type == "cuda" and can_step(model)


class DeviceSteps:
    """The steps of one call. `waits`: how many times the host has waited for the device.

    Args:
        model: a language model of :func:`alula.cuda_graph.can_step`.
        num_rows, slots, num_new: B, the tokens of the longest row in the end, N.
        cache: the caller's, which is kept as the steps that were read left it; None: one that is kept with the step.
        owner: what the step is for: others may have it when that is gone.
    """

    def __init__(
        self, model: Any, num_rows: int, slots: int, num_new: int, cache: KVCache | None, owner: object
    ) -> None:
        self._model, self._num_rows, self._num_new = model, num_rows, num_new
        self._given = cache
        if cache is None:
            self._step = pooled_step(model, num_rows, slots, owner)
            self.cache = self._step.cache.first_rows(num_rows)  # for the prompt
        else:
            cache.reserve(slots if cache.max_length is None else min(slots, cache.max_length))
            self._step, self.cache = DecodeStep(model, cache, num_new), cache
        self.num_queued = self.num_read = 0
        self.waits = 0
        self._longest = 0  # tokens of the longest row before the first step
        self._running = [True] * num_rows
        self._on_gpu = model.device.type == "cuda"
        with torch.inference_mode(False):
            self._reports = torch.empty(num_new, *self._step.chooser.state.report.shape, dtype=torch.float32)
            if self._on_gpu:
                self._reports = self._reports.pin_memory()
        self._sent: dict[int, torch.cuda.Event] = {}

    def begin(self, config: GenerationConfig, positions: Tensor, **state: Any) -> None:
        """Takes the rows as the prompt left them in the cache; positions int64 [B, 1], of the first new tokens.
        `state`: as :meth:`alula.device_sampling.DeviceChooser.start`."""
        self.num_queued = self.num_read = 0
        with torch.no_grad():
            self._step.chooser.start(config, num_new=self._num_new, **state)
            self._step.chooser.place(self.cache.lengths, positions)
        self._longest = self.cache.longest

    def first(self, logits: Tensor, process: Processor | None = None) -> Tensor:
        """Chooses the first token, from the logits float32 [B, V] of the prompt. Returns them for all R rows."""
        padding = self._step.rows - len(logits)
        if padding:
            logits = torch.cat([logits, logits.new_zeros(padding, logits.shape[1])])
        self._choose(logits, process)
        return logits

    def queue(self, process: Processor | None = None) -> Tensor:
        """Queues a step; returns the model's logits [R, V], overwritten by the next one."""
        left = self._num_new - self.num_queued
        if self._given is not None:
            self._given.reserve(self._longest + self.num_queued)  # raises where it is full
        if process is None:
            logits = self._step.run(self._model, left)
            self._send()
        else:
            logits = self._step.run_logits(self._model, left)
            self._choose(logits, process, advances=True)
        return logits

    def _choose(self, logits: Tensor, process: Processor | None, advances: bool = False) -> None:
        chooser = self._step.chooser
        processed = chooser.process(logits)
        if process is not None:
            processed = processed.float()
            rows = process(processed[: self._num_rows])  # may raise: the state has not moved yet
            processed = torch.cat([rows.float(), processed[self._num_rows :]])
        chooser.choose(processed, advances=advances)
        self._send()

    def _send(self) -> None:
        """Starts the way of a step's report to the host."""
        self._reports[self.num_queued].copy_(self._step.chooser.state.report, non_blocking=True)
        if self._on_gpu:
            event = self._sent[self.num_queued] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.cache.device))
        self.num_queued += 1

    def read(self) -> list[int]:
        """The tokens of the oldest step not read yet, [B]; waits for it. ValueError where logits were no numbers."""
        if self._on_gpu:
            self._sent[self.num_read].synchronize()
            del self._sent[self.num_read]
        self.waits += 1
        raise_id_fault(self.cache.device)
        tokens, largest = self._reports[self.num_read, :, : self._num_rows].tolist()
        _check(largest)
        if self._given is not None and self.num_read:
            self._given.advance(self._running)
        self.num_read += 1
        return [int(token) for token in tokens]

    def read_all(self) -> Tensor:
        """The tokens of all queued steps at once, int64 [B, n], no row having ended; waits once."""
        count = self.num_queued
        if self._on_gpu:
            self._sent[count - 1].synchronize()
            self._sent.clear()
        self.waits += 1
        raise_id_fault(self.cache.device)
        _check(self._reports[count - 1, 1, : self._num_rows].tolist())
        if self._given is not None:
            self._given.advance(self._running, count - max(self.num_read, 1))
        self.num_read = count
        return self._reports[:count, 0, : self._num_rows].to(torch.int64).T

    def end_row(self, row: int, *, is_known: bool) -> None:
        """A row has ended, for the steps that are queued from now on. `is_known`: the device has seen it itself."""
        if self._running[row]:
            self._running[row] = False
            if not is_known:
                self._step.chooser.end_row(row)

    def release(self) -> None:
        """Lets the next call have the step."""
        self._step.owner = lambda: None


def _check(largest: list[float]) -> None:
    wrong = next((value for value in largest if value != 0), None)
    if wrong is not None:
        raise ValueError(
            f"the largest logit is {wrong}: no token can be chosen from logits that hold NaN or +inf, or only -inf"
        )
