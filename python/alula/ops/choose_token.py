"""Choosing the next token of rows whose state lies where their scores are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors
from alula.ops.arguments import same_device
from alula.packed_weight import refuse_grad


class RowState(NamedTuple):
    """R rows that generate up to N tokens; all on one device, contiguous.

    tokens: int64 [R, 1], the newest of each row, 0 in rows that have ended (an id that every vocabulary has). running:
    bool [R]. out: int64 [R, N], what was chosen, padding in ended rows. step: int64 [1], how many tokens. report:
    float32 [2, R]: what was chosen last, and 0 or a largest score that was not finite at some step. lengths: int32
    [R], tokens stored. positions: int64 [R, 1], of the newest token. slots: int32 [R, 1], where that will be stored, -1
    in rows that have ended. seen: int32 [R], tokens stored with it.
    """

    tokens: Tensor
    running: Tensor
    out: Tensor
    step: Tensor
    report: Tensor
    lengths: Tensor
    positions: Tensor
    slots: Tensor
    seen: Tensor


@raises_torch_errors
def choose_token(
    scores: Tensor,
    state: RowState,
    pad_id: Tensor,
    eos_ids: Tensor | None = None,
    *,
    drawn: Tensor | None = None,
    advances: bool = True,
) -> None:
    """Takes a token for each running row and moves the state on; on a GPU one kernel, which waits for nobody.

    Args:
        scores: [R, V], V up to 2**24, elements of a row side by side. The first of the largest is taken; NaN is larger
            than all numbers.
        state: written. Rows that do not run get ``pad_id`` (int64 [1]) in ``out`` and stay as they are.
        eos_ids: int64 [E]; a row that chooses one of them has ended.
        drawn: int64 [R], taken in place of the largest; ``scores`` are then looked at for ``report`` alone. Of running
            rows in 0..V-1; on a GPU the embedding that reads another one names it.
        advances: the newest tokens have been stored since the last call, so lengths and positions of running rows grow.

    Raises: RuntimeError for shapes, dtypes or devices that do not fit, and on the CPU for tokens that there are not,
    before anything is written.
    """
    refuse_grad(scores)
    torch.ops.alula.choose_token(scores, drawn, pad_id, eos_ids, advances, *state)


@torch.library.register_fake("alula::choose_token")
def _(scores, drawn, pad_id, eos_ids, advances, *state):
    same_device(scores=scores, drawn=drawn, pad_id=pad_id, eos_ids=eos_ids, tokens=state[0])
