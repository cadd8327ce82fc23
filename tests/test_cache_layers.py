"""cache_layers: memory for keys and values."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from alula import ops

SIZES = [(0, 3, (2, 3)), (2, 3, (0, 16)), (3, 1, (1, 1, 5, 16)), (12, 1, (1, 12, 512, 128)), (2, 1, (1, 4, 4096, 128))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "repeats", "sizes"), SIZES)
def test_tensors_that_share_nothing(dtype, count, repeats, sizes) -> None:
    for _ in range(repeats):
        layers = ops.cache_layers(torch.empty(0, dtype=dtype), count, sizes)
        assert len(layers) == count
        for i, layer in enumerate(layers):
            assert layer.shape == sizes
            assert layer.dtype == dtype
            assert layer.is_contiguous()
            assert layer.numel() == 0 or layer.data_ptr() % 64 == 0
            layer.fill_(i)
        assert all(bool((layer == i).all()) for i, layer in enumerate(layers))
        assert len({layer.untyped_storage().data_ptr() for layer in layers if layer.numel()}) in (0, count)


def test_one_tensor_outlives_the_others() -> None:
    layers = ops.cache_layers(torch.empty(0), 4, (1, 2, 4096, 128))
    last = layers[2].fill_(7)
    del layers
    assert bool((last == 7).all())


def test_memory_goes_back_tensor_by_tensor() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    layers = [layer.fill_(1) for layer in ops.cache_layers(torch.empty(0), 4, (1, 20, 4096, 128))]
    before = resident()
    del layers[1], layers[1]
    assert before - resident() > 75 << 20  # two of 40 MiB
    assert all(bool((layer == 1).all()) for layer in layers)


def test_the_next_cache_has_the_memory_of_the_last_one() -> None:
    def make(tokens: int) -> list[torch.Tensor]:
        return ops.cache_layers(torch.empty(0), 4, (1, 8, tokens, 128))

    layers = make(1024)
    where = [layer.data_ptr() for layer in layers]
    kept = layers[2].fill_(3)
    del layers
    others = make(1024)  # one tensor of the first is still there
    assert kept.data_ptr() not in [layer.data_ptr() for layer in others]
    for layer in others:
        layer.fill_(4)
    assert bool((kept == 3).all())
    other = others[0].data_ptr()
    del kept
    assert [layer.data_ptr() for layer in make(1024)] == where
    assert make(1000)[0].data_ptr() == where[0]  # a little less fits
    assert make(300)[0].data_ptr() != where[0]  # that would be wasted; now this is the last one
    del others, layer
    assert make(600)[0].data_ptr() == other


def test_threads_have_caches_of_their_own() -> None:
    def work(number: int) -> bool:
        right = True
        for i in range(20):
            layers = ops.cache_layers(torch.empty(0), 3, (1, 4, 512 + 64 * (i % 3), 128))
            for j, layer in enumerate(layers):
                layer.fill_(100 * number + j)
            right &= all(bool((layer == 100 * number + j).all()) for j, layer in enumerate(layers))
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize(
    ("like", "count", "sizes", "message"),
    [
        (torch.empty(0, dtype=torch.int64), 1, (2,), "like has dtype"),
        (torch.empty(0), -1, (2,), "count is -1"),
        (torch.empty(0), 2**62, (2,), "count is 4611686018427387904; accepted: 0 to 1048576"),
        (torch.empty(0), 1, (2, -3), "sizes holds -3"),
        (torch.empty(0), 2, (2**44 + 1, 2**21), r"more than 2\^47 bytes"),  # its product wraps to 2 MiB
        (torch.empty(0), 2, (0, 2**40, 2**40), r"more than 2\^47 bytes"),
        (torch.empty(0), 2, (2**40, 2**40), r"more than 2\^47 bytes"),
    ],
)
def test_bad_arguments(like, count, sizes, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.cache_layers(like, count, sizes)


def test_more_than_there_is() -> None:
    with pytest.raises(RuntimeError, match=r"there is no memory for 140737488355328 bytes"):
        ops.cache_layers(torch.empty(0), 2, (2**44,))


def test_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")  # values are undefined
    torch.library.opcheck(torch.ops.alula.cache_layers, (torch.empty(0), 2, [1, 2, 3]), test_utils=checks)
