"""embedding: rows of a packed table, plus positions and token types, summed in float32 and rounded once."""

import pytest
import torch
from alula import ops
from alula.testing import hostile, reference
from alula.testing.compare import assert_close, assert_equal_bits

WIDTHS = [1, 2, 7, 8, 31, 32, 33, 97, 768]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 31, 33, 100])
def test_plain_rows_keep_their_bits(rows: int, width: int, dtype: torch.dtype, isa: str) -> None:
    table = torch.randn(rows, width).to(dtype)
    ids = torch.randint(0, rows, (3, 5))
    assert_equal_bits(ops.embedding(ids, ops.pack(table)), table[ids])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("position_rows", [1, 3])
@pytest.mark.parametrize("with_types", [False, True])
def test_sum(width: int, position_rows: int, with_types: bool, dtype: torch.dtype, isa: str) -> None:
    table, positions = torch.randn(50, width).to(dtype), torch.randn(20, width).to(dtype)
    ids = torch.randint(0, 50, (3, 5))
    extra = {
        "position_ids": torch.randint(0, 20, (position_rows, 5)),
        "position_table": positions,
        "token_type_ids": torch.randint(0, 50, (3, 5)) if with_types else None,
    }
    actual = ops.embedding(ids, ops.pack(table), **extra)
    assert actual.dtype == dtype
    assert_close(actual, reference.embedding(ids, table, **extra), tolerance=1e-6)


def test_types_without_positions(dtype: torch.dtype) -> None:
    table = torch.randn(9, 24).to(dtype)
    ids, types = torch.randint(0, 9, (2, 4)), torch.randint(0, 9, (2, 4))
    actual = ops.embedding(ids, ops.pack(table), token_type_ids=types)
    assert_close(actual, reference.embedding(ids, table, token_type_ids=types), tolerance=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 27.7])
def test_own_table_of_types_and_scale(width: int, scale: float, dtype: torch.dtype, isa: str) -> None:
    table, positions, types = (torch.randn(rows, width).to(dtype) for rows in (50, 20, 3))
    ids = torch.randint(0, 50, (3, 5))
    extra = {
        "position_ids": torch.arange(5)[None],
        "position_table": positions,
        "token_type_ids": torch.randint(0, 3, (3, 5)),
        "token_type_table": types.T.contiguous().T,
        "scale": scale,
    }
    actual = ops.embedding(ids, ops.pack(table), **extra)
    assert_close(actual, reference.embedding(ids, table, **extra), tolerance=1e-6)
    del extra["position_ids"], extra["position_table"]
    actual = ops.embedding(ids, ops.pack(table), **extra)
    assert_close(actual, reference.embedding(ids, table, **extra), tolerance=1e-6)


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_of_ids_and_positions_does_not_matter(layout: str, dtype: torch.dtype) -> None:
    table, positions = torch.randn(40, 19).to(dtype), torch.randn(16, 19).to(dtype)
    ids = torch.randint(0, 40, (6, 5))
    position_ids = torch.arange(16)[None, ::3][:, :5]
    expected = reference.embedding(ids, table, position_ids=position_ids, position_table=positions)
    actual = ops.embedding(
        ids.T.contiguous().T,
        ops.pack(table),
        position_ids=position_ids,
        position_table=hostile.LAYOUTS[layout](positions),
    )
    assert_close(actual, expected, tolerance=1e-6)


def test_expanded_ids() -> None:
    table = torch.randn(10, 8)
    ids = torch.tensor([[3], [7]]).expand(2, 6)
    assert_equal_bits(ops.embedding(ids, ops.pack(table)), table[ids])


def test_special_values_stay_in_their_rows(dtype: torch.dtype) -> None:
    table = torch.randn(64, 12).to(dtype)
    table[5], table[7], table[9] = torch.nan, torch.inf, -0.0
    ids = torch.tensor([[4, 5, 6, 7, 8, 9]])
    assert_close(ops.embedding(ids, ops.pack(table)), table[ids].double())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_tokens(shape: tuple[int, int], dtype: torch.dtype) -> None:
    out = ops.embedding(torch.zeros(shape, dtype=torch.int64), ops.pack(torch.randn(4, 6).to(dtype)))
    assert out.shape == (*shape, 6)
    assert out.dtype == dtype


def test_large_vocabulary() -> None:
    table = torch.randn(49280, 64).bfloat16()
    ids = torch.cat([torch.tensor([0, 49279]), torch.randint(0, 49280, (1000,))])[None]
    assert_equal_bits(ops.embedding(ids, ops.pack(table)), table[ids])


def test_threads_and_repetition_do_not_change_bits(dtype: torch.dtype, isa: str, threads: None) -> None:
    table, positions = ops.pack(torch.randn(200, 130).to(dtype)), torch.randn(64, 130).to(dtype)
    ids, position_ids = torch.randint(0, 200, (8, 64)), torch.arange(64)[None]
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(ops.embedding(ids, table, position_ids=position_ids, position_table=positions))
    assert_equal_bits(results[1], results[0])
    assert_equal_bits(results[2], results[0])


def test_opcheck(dtype: torch.dtype) -> None:
    packed, positions = ops.pack(torch.randn(40, 24).to(dtype)).data, torch.randn(16, 24).to(dtype)
    ids, position_ids = torch.randint(0, 40, (2, 5)), torch.arange(5)[None]
    torch.library.opcheck(torch.ops.alula.embedding, (ids, packed, 40, 24, None, None, None))
    torch.library.opcheck(torch.ops.alula.embedding, (ids, packed, 40, 24, position_ids, positions, ids))
    types = torch.zeros_like(ids)
    torch.library.opcheck(
        torch.ops.alula.embedding, (ids, packed, 40, 24, position_ids, positions, types, positions, 2.0)
    )


def test_gradients_are_refused() -> None:
    table, positions = ops.pack(torch.randn(4, 8)), torch.randn(3, 8, requires_grad=True)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        ops.embedding(ids, table, position_ids=ids, position_table=positions)
    ops.embedding(ids, table, position_ids=ids, position_table=positions)
