"""A block plan's tensors as the op takes them, on the CPU and on GPUs."""

from __future__ import annotations

import abc
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alula.block_schedule import Schedule

__all__ = ["Lists", "OnDevices", "PlanTensors"]


class Lists(NamedTuple):
    """A plan's arrays: starts int32 [B, H or 1, n + 1], entries int32 [total, 2], global_tokens bool [B, n * N]."""

    starts: np.ndarray
    entries: np.ndarray
    global_tokens: np.ndarray | None


class PlanTensors(NamedTuple):
    """A plan as the op takes it, on one device: starts [B or 1, H or 1, n + 1], entries [total, 2], global_tokens
    [B or 1, n * N] or None; on CUDA also the schedule (:mod:`alula.block_schedule`)."""

    starts: Tensor
    entries: Tensor
    global_tokens: Tensor | None
    schedule: Tensor | None = None
    num_partials: int = 0


class OnDevices(abc.ABC):
    """A plan's tensors: made on the CPU, copied to a GPU once.

    Plans are shared by all calls, so the fake tensors of a call that is traced (by ``torch.export``, say) are not kept.
    """

    def __init__(self) -> None:
        self._tensors: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._copies: dict[torch.device, PlanTensors] = {}

    @abc.abstractmethod
    def _lists(self) -> Lists:
        """The plan as arrays, B = 1 for one that all rows share."""

    @abc.abstractmethod
    def _schedule(self) -> Schedule:
        """The order of the work on a GPU."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """starts, entries and global_tokens as the op takes them on the CPU: [B, H or 1, n + 1], [total, 2],
        [B, n * N]."""
        if self._tensors is not None:
            return self._tensors
        starts, entries, flags = self._lists()
        copies = torch.from_numpy(starts.copy()), torch.from_numpy(entries.copy())
        made = (*copies, None if flags is None else torch.from_numpy(flags.copy()))
        if _are_real(made):
            self._tensors = made
        return made

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
            if _are_real(found[:4]):
                self._copies[device] = found
        return found


def _are_real(tensors: tuple[Tensor | None, ...]) -> bool:
    return all(tensor is None or type(tensor) is Tensor for tensor in tensors)
