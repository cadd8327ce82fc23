"""choose_token's CUDA kernel in the host executor, against the reference."""

from collections.abc import Iterator

import pytest
import torch
from alula.testing import reference
from simt_ops import Ops
from simt_process import ORDERS, Executor
from test_choose_token import CASES, compare, copy_of, scores_of, state_of


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows, size", [*CASES, (3, 20011), (40, 9)])
def test_against_the_reference(executor: Executor, order: str, rows: int, size: int, dtype: torch.dtype) -> None:
    """A row by one block and over several, whichever of them comes last."""
    ops, pad, ends = Ops(executor, order), torch.tensor([6]), torch.tensor([3, 0])
    for num_multiprocessors, num_running in ((1, rows), (64, rows // 2), (300, rows)):
        scores = scores_of(rows, size, dtype)
        for drawn, eos, advances in (
            (None, None, True),
            (None, ends, False),
            (torch.randint(0, size, (rows,)), ends, True),
        ):
            state = state_of(rows, num_running=num_running)
            actual = copy_of(state)
            options = {"drawn": drawn, "advances": advances}
            ops.choose_token(scores, actual, pad, eos, **options, num_multiprocessors=num_multiprocessors)
            compare(actual, reference.choose_token(scores, state, pad, eos, **options))


def test_nothing_is_written_beyond_the_last_step(executor: Executor) -> None:
    state = state_of(2, num_new=3, step=3)
    before = state.out.clone()
    Ops(executor).choose_token(torch.randn(2, 8), state, torch.tensor([0]))
    assert torch.equal(state.out, before)
