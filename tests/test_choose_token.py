"""choose_token: the choice and all that follows from it in the state of the rows."""

import pytest
import torch
from alula import ops
from alula.ops import RowState
from alula.testing import reference
from torch import Tensor


def state_of(rows: int, num_new: int = 4, step: int = 1, num_running: int | None = None) -> RowState:
    """Rows somewhere in the middle; the last of them have ended."""
    running = torch.arange(rows) < (rows if num_running is None else num_running)
    return RowState(
        tokens=torch.randint(0, 9, (rows, 1)),
        running=running,
        out=torch.randint(0, 9, (rows, num_new)),
        step=torch.tensor([step]),
        report=torch.zeros(2, rows),
        lengths=torch.randint(1, 30, (rows,), dtype=torch.int32),
        positions=torch.randint(1, 30, (rows, 1)),
        slots=torch.full((rows, 1), 77, dtype=torch.int32),
        seen=torch.full((rows,), 77, dtype=torch.int32),
    )


def scores_of(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """With equal largest scores, NaN, infinities and zeros of both signs in the first rows, as far as there are any."""
    scores = torch.randn(rows, size).to(dtype)
    hostile = (
        {0: 9.0, size // 2: 9.0, size - 1: 9.0},
        {size // 3: torch.nan, size // 2: torch.inf, size - 1: -torch.nan},
        {size - 1: torch.inf},
        dict.fromkeys(range(size), -torch.inf),
        {i: (-1.0) ** (i + 1) * 0.0 for i in range(size)},
    )
    for row, changes in zip(scores, hostile, strict=False):
        for index, value in changes.items():
            row[index] = value
    return scores


def copy_of(state: RowState) -> RowState:
    return RowState(*(tensor.clone() for tensor in state))


def compare(actual: RowState, expected: RowState) -> None:
    for name, mine, want in zip(RowState._fields, actual, expected, strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


CASES = [(1, 1), (1, 7), (2, 300), (5, 64), (9, 5003)]


@pytest.mark.parametrize("rows, size", CASES)
@pytest.mark.parametrize("advances", [False, True])
@pytest.mark.parametrize("eos", [None, [3], [0, 2, 5]])
def test_against_the_reference(rows: int, size: int, eos: list[int] | None, advances: bool, dtype: torch.dtype) -> None:
    for num_running in (rows, rows // 2):
        state, scores = state_of(rows, num_running=num_running), scores_of(rows, size, dtype)
        pad, ends = torch.tensor([6]), None if eos is None else torch.tensor(eos)
        for drawn in (None, torch.randint(0, size, (rows,))):
            actual = copy_of(state)
            ops.choose_token(scores, actual, pad, ends, drawn=drawn, advances=advances)
            compare(actual, reference.choose_token(scores, state, pad, ends, drawn=drawn, advances=advances))


def test_rows_that_lie_apart(dtype: torch.dtype) -> None:
    """Logits of the last position, as a model gives them."""
    state, scores = state_of(3), scores_of(9, 50, dtype).view(3, 3, 50)[:, -1]
    actual = copy_of(state)
    ops.choose_token(scores, actual, torch.tensor([6]))
    compare(actual, reference.choose_token(scores, state, torch.tensor([6])))


def test_nothing_is_written_beyond_the_last_step() -> None:
    state = state_of(2, num_new=3, step=3)
    before = state.out.clone()
    ops.choose_token(torch.randn(2, 8), state, torch.tensor([0]))
    assert torch.equal(state.out, before)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens has shape"),
        ({"running": torch.ones(3)}, "running has dtype"),
        ({"out": torch.zeros(4, 3, dtype=torch.int64).T}, "out is not contiguous"),
        ({"slots": torch.zeros(2, 1, dtype=torch.int32)}, "slots has shape"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Tensor], words: str) -> None:
    state = state_of(3)._replace(**change)
    before = copy_of(state)
    with pytest.raises(RuntimeError, match=words):
        ops.choose_token(torch.randn(3, 8), state, torch.tensor([0]))
    compare(state, before)


def test_wrong_scores_are_refused() -> None:
    for scores, words in (
        (torch.randn(8), "scores has shape"),
        (torch.randn(3, 0), "scores has 0 columns"),
        (torch.randn(8, 3).T, "scores has rows whose elements lie apart"),
        (torch.randint(0, 9, (3, 8)), "scores has dtype"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.choose_token(scores, state_of(3), torch.tensor([0]))


@pytest.mark.parametrize("token", [-1, 8, 2**40])
def test_a_drawn_token_that_there_is_not(token: int) -> None:
    """Rows that have ended take none."""
    state = state_of(3, num_running=2)
    before, drawn, pad = copy_of(state), torch.tensor([7, token, 0]), torch.tensor([0])
    with pytest.raises(RuntimeError, match=rf"drawn holds {token} for row 1; accepted: 0 to 7"):
        ops.choose_token(torch.randn(3, 8), state, pad, drawn=drawn)
    compare(state, before)
    scores, drawn = torch.randn(3, 8), torch.tensor([7, 0, token])
    ops.choose_token(scores, state, pad, drawn=drawn)
    compare(state, reference.choose_token(scores, before, pad, drawn=drawn))


def test_opcheck() -> None:
    given = (torch.randn(3, 40), None, torch.tensor([0]), torch.tensor([5]), True, *state_of(3))
    torch.library.opcheck(torch.ops.alula.choose_token, given)
