"""The key/value cache: where tokens go, what it remembers, how it grows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alula.cache import KVCache
from alula.config import GPTBigCodeConfig
from torch import Tensor

SHAPE = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=3, head_dim=8)


def fill(cache: KVCache, positions: Tensor, values: Tensor) -> None:
    """Writes token t of row b as the number values[b, t] into its slot of every layer, as a model would."""
    for layer, kv in enumerate(cache.layers):
        for b, t in (positions >= 0).nonzero().tolist():
            kv[b, :, positions[b, t]] = values[b, t] + 1000.0 * layer


def step(cache: KVCache, values: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
    mask = None if mask is None else torch.tensor(mask)
    positions, lengths = cache.prepare(values.shape[1], mask)
    assert positions.dtype == lengths.dtype == torch.int32
    assert positions.shape == values.shape
    fill(cache, positions, values)
    return positions, lengths


def contents(cache: KVCache, layer: int = 1) -> list[list[int]]:
    """What each row holds, in order, layer offset removed; key and value must agree."""
    key, value = cache.key(layer), cache.value(layer)
    rows = []
    for b, n in enumerate(cache.lengths.tolist()):  # slots beyond the length are undefined
        row = key[b, :, :n]
        assert torch.equal(row, value[b, :, :n])
        assert torch.equal(row, row[:1, :, :1].expand_as(row))
        rows.append((row[0, :, 0] - 1000 * layer).int().tolist())
    return rows


def numbers(batch: int, tokens: int, start: int = 0) -> Tensor:
    return torch.arange(tokens).repeat(batch, 1) + 100.0 * torch.arange(batch)[:, None] + start


def test_padding_takes_a_column_and_no_slot() -> None:
    cache = KVCache(SHAPE, 3)
    positions, lengths = step(cache, numbers(3, 4), [[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]])
    assert positions.tolist() == [[-1, -1, 0, 1], [0, 1, 2, -1], [0, -1, 1, 2]]
    assert lengths.tolist() == [2, 3, 3]
    assert cache.get_seq_length() == 4
    assert cache.has_padding
    positions, lengths = step(cache, numbers(3, 2, 4))  # no mask: all tokens
    assert positions.tolist() == [[2, 3], [3, 4], [3, 4]]
    positions, lengths = step(cache, numbers(3, 1, 6), [[1], [0], [1]])
    assert positions.tolist() == [[4], [-1], [5]]
    assert lengths.tolist() == [5, 5, 6]
    assert contents(cache) == [[2, 3, 4, 5, 6], [100, 101, 102, 104, 105], [200, 202, 203, 204, 205, 206]]
    assert cache.real_columns().int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1]]


def test_masks_over_all_columns_must_repeat_the_past() -> None:
    cache = KVCache(SHAPE, 2)
    step(cache, numbers(2, 3), [[0, 1, 1], [1, 1, 1]])
    step(cache, numbers(2, 2, 3), [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert cache.lengths.tolist() == [4, 4]
    for mask, message in (
        ([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]], r"says True of row 0, column 0, which was stored as False"),
        ([[0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]], r"says False of row 1, column 1, which was stored as True"),
        ([[1, 1], [1, 1]], r"shape \[2, 2\]; accepted: \[2, 1\] or \[2, 6\]"),
        ([[1, 1, 1, 1, 1, 1]], r"shape \[1, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.prepare(1, torch.tensor(mask))
        assert (cache.get_seq_length(), cache.lengths.tolist()) == (5, [4, 4])
    plain = KVCache(SHAPE, 1)
    step(plain, numbers(1, 2))
    step(plain, numbers(1, 1, 2), [[1, 1, 1]])
    assert not plain.has_padding
    with pytest.raises(ValueError, match="row 0, column 1, which was stored as True"):
        plain.prepare(1, torch.tensor([[1, 0, 1, 1]]))


def test_growth_doubles_and_keeps() -> None:
    cache = KVCache(SHAPE, 2)
    assert cache.nbytes == 0
    assert cache.key(0).shape == (2, 3, 0, 8)
    capacities = set()
    for start in range(0, 300, 3):
        step(cache, numbers(2, 3, start), [[1, 1, 1], [0, 1, 1]] if start == 30 else None)
        capacities.add(cache.capacity)
    assert sorted(capacities) == [64, 128, 256, 512]
    assert contents(cache, 0)[0] == list(range(300))
    assert contents(cache, 1)[1] == [100 + n for n in range(300) if n != 30]
    assert cache.nbytes == 2 * 2 * 3 * 512 * 16 * 4


def test_a_fixed_cache_never_moves_and_refuses_more() -> None:
    cache = KVCache(SHAPE, 2, max_length=5, dtype=torch.bfloat16)
    pointers = [layer.data_ptr() for layer in cache.layers]
    assert cache.layers[0].shape == (2, 3, 5, 16)
    assert cache.layers[0].dtype == torch.bfloat16
    step(cache, numbers(2, 4), [[0, 1, 1, 1], [0, 0, 1, 1]])
    step(cache, numbers(2, 2, 4))  # six columns, but only five tokens in the longest row
    with pytest.raises(ValueError, match="max_length=5 tokens a row, 6 are needed"):
        cache.prepare(1)
    assert (cache.get_seq_length(), cache.lengths.tolist()) == (6, [5, 4])
    step(cache, numbers(2, 1, 6), [[0], [1]])
    assert [layer.data_ptr() for layer in cache.layers] == pointers


def test_a_decode_step_allocates_nothing_that_grows() -> None:
    cache = KVCache(SHAPE, 4, max_length=4096)
    cache.prepare(4000, torch.ones(4, 4000).tril_(-1))
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                sizes.append(out.numel())
            return out

    cache.prepare(1)  # the memory of real columns is made once, ahead
    with Sizes():
        for _ in range(20):
            cache.prepare(1)
    assert max(sizes) <= 4


def test_columns_that_were_cropped_forget_that_they_were_padding() -> None:
    cache = KVCache(SHAPE, 2)
    step(cache, numbers(2, 4), [[0, 1, 1, 0], [1, 1, 1, 1]])
    cache.crop(3)
    step(cache, numbers(2, 2, 3))
    assert cache.real_columns().tolist() == [[False, True, True, True, True], [True] * 5]
    cache.crop(4)
    assert contents(cache) == [[1, 2, 3], [100, 101, 102, 103]]


@pytest.mark.parametrize("padded", [False, True])
def test_crop(padded: bool) -> None:
    cache = KVCache(SHAPE, 2)
    step(cache, numbers(2, 6), [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1]] if padded else None)
    cache.crop(-1)
    assert cache.get_seq_length() == 5
    assert contents(cache) == ([[2, 3, 4], [100, 101, 102, 103]] if padded else [[0, 1, 2, 3, 4], [*range(100, 105)]])
    cache.crop(9)
    assert cache.get_seq_length() == 5
    cache.crop(3)
    assert contents(cache) == ([[2], [100, 101, 102]] if padded else [[0, 1, 2], [100, 101, 102]])
    step(cache, numbers(2, 1, 3))
    assert contents(cache) == ([[2, 3], [100, 101, 102, 103]] if padded else [[0, 1, 2, 3], [*range(100, 104)]])
    with pytest.raises(ValueError, match=r"crop\(-9\) of a cache of 4"):
        cache.crop(-9)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.has_padding
    assert cache.capacity == 64
    step(cache, numbers(2, 2))
    assert contents(cache) == [[0, 1], [100, 101]]


def test_reorder_and_repeat() -> None:
    cache = KVCache(SHAPE, 3)
    step(cache, numbers(3, 3), [[1, 1, 1], [0, 1, 1], [1, 1, 0]])
    cache.reorder(torch.tensor([2, 0, 0]))
    assert contents(cache) == [[200, 201], [0, 1, 2], [0, 1, 2]]
    step(cache, numbers(3, 1, 3), [[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert contents(cache) == [[200, 201, 3], [0, 1, 2, 103], [0, 1, 2, 203]]
    cache.reorder_cache(torch.tensor([1]))
    assert cache.batch_size == 1
    cache.batch_repeat_interleave(4)
    assert contents(cache) == [[0, 1, 2, 103]] * 4
    for wrong in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match="indices"):
            cache.reorder(wrong)
    assert cache.batch_size == 4


def test_views_share_memory() -> None:
    cache = KVCache(SHAPE, 2, max_length=8)
    step(cache, numbers(2, 3))
    key, value = cache.key(0), cache.value(0)
    assert key.shape == value.shape == (2, 3, 3, 8)
    assert key.data_ptr() == cache.layers[0].data_ptr()
    cache.layers[0][1, 2, 1] = 77
    assert (key[1, 2, 1] == 77).all()
    assert (value[1, 2, 1] == 77).all()


def test_made_from_a_configuration() -> None:
    config = GPTBigCodeConfig(n_embd=96, n_head=4, n_layer=3, dtype="bfloat16")
    cache = KVCache(config, 2, 16)
    assert cache.layers[0].shape == (2, 1, 16, 48)
    assert cache.dtype == torch.bfloat16
    assert len(cache) == 3
    assert KVCache(GPTBigCodeConfig(n_embd=96, n_head=4, multi_query=False), 1, 4).layers[0].shape == (1, 4, 4, 48)
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "max_length": 0}):
        with pytest.raises(ValueError, match="accepted: 1 or more"):
            KVCache(config, **wrong)
