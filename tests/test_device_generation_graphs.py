"""Steps on the device as graphs, with graphs that are played, and which steps are kept for the next call."""
# ruff: noqa: F401, F811  (fixtures)

import contextlib
from types import SimpleNamespace

import pytest
import torch
from alula import cuda_graph, generation
from alula.cache import KVCache
from alula.cuda_graph import bucket_of, can_step
from device_generation_cases import (
    PROMPTS,
    SAMPLED,
    NothingToRead,
    captures,
    on_device,
    on_host,
    small_model,
)

# --- when a step is captured, with a graph that is played ------------------------------------------------------------


@pytest.mark.usefixtures("on_device")
def test_one_graph_serves_every_length_and_number_of_rows(small_model, captures):
    options = {"max_new_tokens": 12, "eos_token_id": []}
    for prompts in (PROMPTS, [*PROMPTS, [1, 2]], [[5] * 30] * 3):
        for _ in range(2):
            assert torch.equal(small_model.generate(prompts, **options), on_host(small_model, prompts, **options))
    assert captures == [4]
    numbers = {"do_sample": True, "seed": 5}
    for temperature, top_p in ((0.5, 0.9), (1.5, 0.6)):
        sampled = {**options, **numbers, "temperature": temperature, "top_p": top_p}
        assert torch.equal(small_model.generate(PROMPTS, **sampled), on_host(small_model, PROMPTS, **sampled))
    assert captures == [4, 4], "temperature and top_p lie on the device"
    for prompt in ([3], [4, 4]):
        assert torch.equal(small_model.generate([prompt], **options), on_host(small_model, [prompt], **options))
    assert captures == [4, 4, 1]


@pytest.mark.usefixtures("on_device")
def test_graphs_are_made_anew_where_they_must_be(small_model, captures):
    options = {"max_new_tokens": 24, "eos_token_id": []}
    steps = small_model.stream([1, 2, 3], **options)
    made = [int(next(steps)) for _ in range(6)]
    assert captures == [1]
    slot = small_model.weight_slots()["transformer.ln_f.bias"]
    slot.write(torch.zeros(small_model.config.n_embd))  # other weights, between two steps
    made += [int(token) for token in steps]
    assert captures == [1, 1]
    small_model.generate([1, 2, 3], **options)
    assert captures == [1, 1], "the graph that was made anew"
    small_model.generate([[1, 2]], past_key_values=small_model.new_cache(1), **options)
    assert captures == [1] * 3, "a cache of the caller's has graphs of its own"
    small_model.generate([[1], [2]], **{**options, "max_new_tokens": 4})
    assert captures == [1] * 3, "a few steps are not worth a capture"


@pytest.mark.usefixtures("on_device")
def test_processors_run_between_graph_and_choice(small_model, captures):
    def only_even(ids, logits):
        return logits.index_fill(1, torch.arange(1, logits.shape[1], 2), -torch.inf)

    options = {"max_new_tokens": 14, "eos_token_id": [], "logits_processor": [only_even]}
    assert torch.equal(small_model.generate(PROMPTS, **options), on_host(small_model, PROMPTS, **options))
    assert captures == [4]


@pytest.mark.usefixtures("on_device")
def test_captures_keep_to_the_rules_of_torch(small_model, monkeypatch):
    """A pool is shared by graphs that live and is gone with the last of them; the stream belongs to the step's GPU;
    whatever is new has run once before."""
    pools, streams, events = {}, [], []

    class Graph:
        def __del__(self):
            pools[self.pool] -= 1

        def replay(self):
            events.append("replayed")

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert pools.get(pool) != 0, "torch: the pool of this handle has lost its graphs"
        pools[pool] = pools.get(pool, 0) + 1
        graph.pool = pool
        streams.append(stream)
        events.append("captured")
        yield

    def logits(self, model):
        events.append("ran")
        return torch.zeros(self.rows, model.lm_head.out_features)

    init = cuda_graph.DecodeStep.__init__

    def with_capture(self, *args):
        init(self, *args)
        self._can_capture = True

    played = {
        "graph_pool_handle": object,
        "CUDAGraph": Graph,
        "graph": capture,
        "device": contextlib.nullcontext,
        "Stream": object,
    }
    monkeypatch.setattr(cuda_graph.torch, "cuda", SimpleNamespace(**played))
    monkeypatch.setattr(cuda_graph.DecodeStep, "__init__", with_capture)
    monkeypatch.setattr(cuda_graph.DecodeStep, "logits", logits)
    step = cuda_graph.DecodeStep(small_model, small_model.new_cache(1, max_length=99), 99)
    for key in ("one", "two"):
        for _ in range(2):
            step._run(key, step.logits, small_model, 50)
    assert events == ["ran", "captured", "ran", "replayed"] * 2
    assert list(pools.values()) == [2]
    small_model.weight_slots()["transformer.ln_f.bias"].write(torch.ones(small_model.config.n_embd))
    events.clear()
    for _ in range(2):
        step._run("one", step.logits, small_model, 50)
    assert events == ["ran", "captured", "ran", "replayed"]
    assert list(pools.values()) == [0, 1]
    assert len(set(map(id, streams))) == 1


def test_under_alula_sync_nothing_is_captured(monkeypatch):
    cache = KVCache(NothingToRead.config, 2, 8)
    monkeypatch.setattr(NothingToRead, "device", torch.device("cuda", 0))
    monkeypatch.setattr(cuda_graph, "DeviceChooser", lambda *args: None)
    monkeypatch.setattr(cuda_graph.torch, "zeros", lambda *args, **options: None)
    assert cuda_graph.DecodeStep(NothingToRead(), cache, 4)._can_capture
    monkeypatch.setenv("ALULA_SYNC", "1")
    assert not cuda_graph.DecodeStep(NothingToRead(), cache, 4)._can_capture


# --- buckets and what is kept ----------------------------------------------------------------------------------------


def test_buckets():
    assert [bucket_of(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 17, 64, 65)] == [1, 2, 4, 4, 8, 8, 16, 32, 64, 128]


@pytest.mark.usefixtures("on_device")
def test_steps_are_kept_for_the_next_call(small_model):
    pools = cuda_graph._pools
    small_model.generate(PROMPTS, max_new_tokens=5)
    step = pools[small_model][4]
    assert step.rows == 4
    assert step.owner() is None
    small_model.generate(PROMPTS, max_new_tokens=8, **SAMPLED)
    small_model.generate([*PROMPTS, [1]], max_new_tokens=8)
    assert pools[small_model][4] is step, "another length, other options, another number of rows of the bucket"
    small_model.generate(PROMPTS[:1], max_new_tokens=5)
    assert sorted(pools[small_model]) == [1, 4]
    for rows in (2, 5, 9, 17):
        small_model.generate([[1]] * rows, max_new_tokens=2)
    assert len(pools[small_model]) == 4
    step = pools[small_model][32]
    small_model.weight_slots()["transformer.ln_f.bias"].write(torch.ones(small_model.config.n_embd))
    small_model.generate([[1]] * 17, max_new_tokens=2)
    assert pools[small_model][32] is not step, "the weights have changed"


@pytest.mark.usefixtures("on_device")
def test_two_generations_at_a_time(small_model):
    expected = on_host(small_model, PROMPTS, max_new_tokens=8)[:, 9:]
    other = on_host(small_model, [[3], [4], [5]], max_new_tokens=8)[:, 1:]
    one, two = small_model.stream(PROMPTS, max_new_tokens=8), small_model.stream([[3], [4], [5]], max_new_tokens=8)
    pairs = [(next(one), next(two)) for _ in range(8)]
    assert torch.equal(torch.stack([a for a, _ in pairs], 1), expected)
    assert torch.equal(torch.stack([b for _, b in pairs], 1), other)
    abandoned = small_model.stream(PROMPTS, max_new_tokens=8)
    next(abandoned)
    step = cuda_graph._pools[small_model][4]
    assert step.owner() is abandoned
    del abandoned
    assert step.owner() is None
    assert torch.equal(small_model.generate(PROMPTS, max_new_tokens=8)[:, 9:], expected)


@pytest.mark.usefixtures("on_device")
def test_steps_that_are_kept_give_way_where_memory_is_short(small_model, monkeypatch):
    expected = small_model.generate(PROMPTS, max_new_tokens=4)
    small_model.generate(PROMPTS[:1], max_new_tokens=4)
    new_step, failures = cuda_graph._new_step, [True, False, True, True]

    def short_of_memory(*args):
        if failures.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return new_step(*args)

    monkeypatch.setattr(cuda_graph, "_new_step", short_of_memory)
    two = small_model.generate(PROMPTS[:2], max_new_tokens=4)
    assert not cuda_graph._pools[small_model]
    with pytest.raises(torch.OutOfMemoryError):
        small_model.generate(PROMPTS, max_new_tokens=4)
    monkeypatch.undo()
    assert torch.equal(on_host(small_model, PROMPTS[:2], max_new_tokens=4), two)
    monkeypatch.setattr(generation, "chooses_on_device", can_step)
    assert torch.equal(small_model.generate(PROMPTS, max_new_tokens=4), expected)


@pytest.mark.usefixtures("on_device")
def test_rows_that_are_nobodys_store_nothing(small_model):
    small_model.generate(PROMPTS, max_new_tokens=6)
    step = cuda_graph._pools[small_model][4]
    for layer in step.cache.layers:
        layer[3].fill_(torch.nan)
    again = small_model.generate(PROMPTS, max_new_tokens=6, **SAMPLED)
    assert step is cuda_graph._pools[small_model][4]
    assert all(bool(layer[3].isnan().all()) for layer in step.cache.layers)
    assert torch.equal(again, on_host(small_model, PROMPTS, max_new_tokens=6, **SAMPLED))


def test_a_cache_of_some_rows():
    shape = type("Shape", (), {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8})
    cache = KVCache(shape, 4, max_length=10)
    rows = cache.first_rows(3)
    assert rows.batch_size == 3
    assert rows.capacity == 10
    assert rows.layers[1].data_ptr() == cache.layers[1].data_ptr()
    rows.prepare(4)
    assert cache.lengths.tolist() == [0] * 4
    rows.advance([True, False, True], 2)
    assert rows.lengths.tolist() == [6, 4, 6]
    assert rows.real_columns().tolist()[1] == [True] * 4 + [False] * 2
    assert rows.get_seq_length() == rows.longest == 6
    with pytest.raises(ValueError, match=r"first_rows\(5\) of 4 rows"):
        cache.first_rows(5)
