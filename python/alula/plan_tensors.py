"""A block plan's tensors as the op takes them, on the CPU and on GPUs."""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor

from alula.block_schedule import Schedule

__all__ = ["OnDevices", "PlanTensors"]


class PlanTensors(NamedTuple):
    """A plan as the op takes it, on one device: starts [B or 1, H or 1, n + 1], entries [total, 2], global_tokens
    [B or 1, n * N] or None; on CUDA also the schedule (:mod:`alula.block_schedule`)."""

    starts: Tensor
    entries: Tensor
    global_tokens: Tensor | None
    schedule: Tensor | None = None
    num_partials: int = 0


class OnDevices(abc.ABC):
    """A plan's tensors: made on the CPU, copied to a GPU once."""

    tensors: tuple[Tensor, Tensor, Tensor | None]

    def __init__(self) -> None:
        self._copies: dict[torch.device, PlanTensors] = {}

    @abc.abstractmethod
    def _schedule(self) -> Schedule:
        """The order of the work on a GPU."""

    def on(self, device: torch.device) -> PlanTensors:
        """The plan's tensors on a device (of a tensor: ``q.device``)."""
        found = self._copies.get(device)
        if found is None:
            found = PlanTensors(*(None if t is None else t.to(device) for t in self.tensors))
            if device.type == "cuda":
                schedule = self._schedule()
                found = found._replace(
                    schedule=torch.from_numpy(schedule.items).to(device), num_partials=schedule.num_partials
                )
            self._copies[device] = found
        return found
