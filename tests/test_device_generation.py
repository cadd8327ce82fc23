"""Choosing tokens on the device, run on the CPU: the steps are the same but for the capture into a CUDA graph."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from alula import cuda_graph, generation
from alula.cache import KVCache
from alula.cuda_graph import bucket_of, can_step
from alula.device_generation import DeviceSteps
from alula.device_sampling import DeviceChooser
from alula.generation import Generation
from alula.generation_config import GenerationConfig
from alula.sampling import Sampler, greedy
from decoder_cases import LANGUAGE_MODELS, alula_model, hf_model
from test_sampling import random_logits
from torch.utils._python_dispatch import TorchDispatchMode

PROMPTS = [[5, 17, 3, 22, 4], [12], [7, 7, 8, 9, 1, 1, 0, 33, 12]]
SAMPLED = {"do_sample": True, "seed": 3}
OPTIONS = [
    {},
    {"repetition_penalty": 1.5},
    SAMPLED,
    {**SAMPLED, "temperature": 0.6, "top_k": 20},
    {**SAMPLED, "top_p": 0.8, "repetition_penalty": 1.2},
    {**SAMPLED, "temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {**SAMPLED, "temperature": 0},
]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation takes the way of a GPU."""
    monkeypatch.setattr(generation, "chooses_on_device", can_step)


@pytest.fixture(params=LANGUAGE_MODELS)
def model(request: pytest.FixtureRequest):
    return alula_model(hf_model(1, request.param))


@pytest.fixture
def small_model():
    return alula_model(hf_model(1, "GPTBigCodeForCausalLM"))


def on_host(model, prompts, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "chooses_on_device", lambda model, cache: False)
        return model.generate(prompts, **options)


# --- the choice ------------------------------------------------------------------------------------------------------


def draws(rows, logits, count, **options):
    """Tokens [count, rows] that the device's choice takes of the same logits, and those of the host's."""
    config = GenerationConfig(do_sample=True, eos_token_id=[], **options)
    chooser = DeviceChooser(rows, logits.shape[1], count, torch.device("cpu"))
    seeds = list(range(10, 10 + rows))
    prompts = [np.array([1])] * rows
    chooser.start(config, seeds=seeds, prompts=prompts, num_new=count, min_new=0, pad_id=0)
    given = torch.from_numpy(logits)
    for _ in range(count):
        chooser.choose(chooser.process(given))
    samplers = [Sampler(seed, **options) for seed in seeds]
    return chooser.state.out.T.tolist(), [
        [s.draw(row) for s, row in zip(samplers, logits, strict=True)] for _ in range(count)
    ]


@pytest.mark.parametrize("top_k", [0, 1, 7, 200])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_draws_are_those_of_the_host(top_k, top_p, min_p):
    for seed, (size, scale, temperature) in enumerate([(2, 1.0, 1.0), (90, 3.0, 0.4), (1500, 2.0, 1.3), (300, 0.0, 1)]):
        logits = np.stack([random_logits(size, scale, 5 * seed + row) for row in range(3)])
        logits[1, : size // 3] = -np.inf
        actual, expected = draws(3, logits, 25, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
        # A number may fall on the seam of two tokens, whose place is a sum of roundings.
        differing = np.count_nonzero(np.array(actual) != np.array(expected))
        assert differing <= 1, (size, scale, differing)


def test_equal_logits_in_top_k_and_top_p():
    logits = np.round(np.stack([random_logits(900, 2.0, row) for row in range(2)]))
    for options in ({"top_k": 30}, {"top_p": 0.5}, {"top_k": 30, "top_p": 0.5}):
        actual, expected = draws(2, logits, 60, **options)
        assert np.count_nonzero(np.array(actual) != np.array(expected)) <= 1


def test_extreme_temperatures():
    logits = random_logits(300, 5.0, 6)[None]
    best = greedy(logits[0])
    assert {token for (token,) in draws(1, logits, 20, temperature=1e-300)[0]} == {best}
    assert {token for (token,) in draws(1, logits, 20, temperature=0.0)[0]} == {best}
    assert len({token for (token,) in draws(1, logits, 100, temperature=1e30)[0]}) > 60


# --- whole calls -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_those_of_the_host(model, options):
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = on_host(model, prompts, max_new_tokens=12, **options)
        assert torch.equal(model.generate(prompts, max_new_tokens=12, **options), expected)
        assert torch.equal(torch.stack(list(model.stream(prompts, max_new_tokens=12, **options)), 1), expected[:, -12:])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("extra", [{}, {"min_new_tokens": 7}, {"num_return_sequences": 2}], ids=str)
def test_ends_are_those_of_the_host(model, extra):
    free = on_host(model, PROMPTS, max_new_tokens=16)[:, 9:]
    eos = [int(free[0, 9]), int(free[1, 3])]
    options = {"max_new_tokens": 16, "eos_token_id": eos, "pad_token_id": 2, **extra}
    expected = on_host(model, PROMPTS, **options)
    assert torch.equal(model.generate(PROMPTS, **options), expected)
    ours, theirs = Generation(model, PROMPTS, **options), Generation(model, PROMPTS, **options)
    list(ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "chooses_on_device", lambda model, cache: False)
        list(theirs)
    for name in ("finish_reasons", "num_new_tokens", "length", "prompt_lengths"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("extra", [{}, {"eos_token_id": 3}], ids=["free", "eos"])
def test_a_cache_of_the_caller_is_left_as_the_host_leaves_it(model, extra):
    options = {"max_new_tokens": 9, "pad_token_id": 1, **extra}
    ids = torch.tensor([[9, 2, 8, 4], [0, 0, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for given, real in ((ids, None), (ids, mask)):
        theirs, ours = model.new_cache(2), model.new_cache(2)
        expected = on_host(model, given, attention_mask=real, past_key_values=theirs, **options)
        assert torch.equal(model.generate(given, real, past_key_values=ours, **options), expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.lengths, theirs.lengths)
        assert ours.has_padding == theirs.has_padding
        if real is not None:
            assert torch.equal(ours.real_columns(), theirs.real_columns())
        for layer in range(ours.num_layers):
            for b, length in enumerate(theirs.lengths.tolist()):
                assert torch.equal(ours.key(layer)[b, :, :length], theirs.key(layer)[b, :, :length])
    # Filled further, first by steps that look at each token.
    again = model.new_cache(2)
    first = list(model.stream(ids, max_new_tokens=4, past_key_values=again))
    text = torch.cat([ids, torch.stack(first, 1)], 1)
    whole = on_host(model, ids, max_new_tokens=9)
    assert torch.equal(model.generate(text, max_new_tokens=5, past_key_values=again), whole)


@pytest.mark.usefixtures("on_device")
def test_a_cache_that_is_too_small_is_full(small_model):
    cache = small_model.new_cache(1, max_length=6)
    with pytest.raises(ValueError, match="max_length=6 tokens a row, 7 are needed"):
        list(small_model.stream([1, 2, 3, 4], max_new_tokens=9, past_key_values=cache))
    assert cache.get_seq_length() == 6


@pytest.mark.usefixtures("on_device")
def test_processors_and_criteria(model):
    def only_even(ids, logits):
        assert ids.shape[0] == logits.shape[0] == 3
        return logits.index_fill(1, torch.arange(1, logits.shape[1], 2), -torch.inf)

    def second_ends(ids, logits):
        assert logits.shape[0] == 3
        return torch.tensor([False, ids.shape[1] >= 12, False])

    for options in ({}, {**SAMPLED, "repetition_penalty": 1.3, "eos_token_id": 4}):
        options = {"max_new_tokens": 8, "pad_token_id": 1, "stopping_criteria": [second_ends], **options}
        options["logits_processor"] = [only_even]
        expected = on_host(model, PROMPTS, **options)
        assert torch.equal(model.generate(PROMPTS, **options), expected)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("has_cache", [False, True])
def test_a_failing_processor_can_be_repeated(small_model, has_cache):
    expected = on_host(small_model, [1, 2, 3], max_new_tokens=4)[0, 3:].tolist()
    failures = iter([True, False, True, False, False, True, False])

    def fail_sometimes(ids, logits):
        if next(failures):
            raise RuntimeError("not now")
        return logits

    cache = {"past_key_values": small_model.new_cache(1)} if has_cache else {}
    steps = Generation(small_model, [1, 2, 3], max_new_tokens=4, logits_processor=[fail_sometimes], **cache)
    made = []
    while not steps.is_done:
        try:
            made += next(steps).tolist()
        except RuntimeError:
            continue
    assert made == expected


class Interrupted(TorchDispatchMode):
    """Ctrl-C in the n-th operation."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("on_device")
def test_an_interrupted_cache_is_whole(small_model):
    ids = torch.tensor([[4, 5, 6]])
    expected = on_host(small_model, ids, max_new_tokens=6)
    for count in range(1, 600, 11):
        cache = small_model.new_cache(1)
        steps = Generation(small_model, ids, max_new_tokens=6, past_key_values=cache)
        try:
            with Interrupted(count) as mode:
                for _ in steps:
                    pass
        except KeyboardInterrupt:
            pass
        if mode.left > 0:
            break
        made = steps.sequences[0, 3:].tolist()
        assert cache.lengths.tolist() == [cache.get_seq_length()]
        assert cache.get_seq_length() == (3 + len(made) - 1 if made else 0)
        text = torch.cat([ids, torch.tensor([made], dtype=torch.int64)], 1)
        out = text
        if len(made) < 6:
            out = small_model.generate(text, max_new_tokens=6 - len(made), past_key_values=cache)
        assert torch.equal(out, expected)
    assert count > 100


@pytest.mark.usefixtures("on_device")
def test_logits_that_are_no_numbers_are_refused(small_model):
    small_model.weight_slots()["transformer.ln_f.weight"].write(torch.full((small_model.config.n_embd,), torch.nan))
    for options in ({}, SAMPLED, {"eos_token_id": 3}):
        with pytest.raises(ValueError, match="largest logit is nan"):
            small_model.generate(PROMPTS, max_new_tokens=9, **options)
        with pytest.raises(ValueError, match="largest logit is nan"):
            next(small_model.stream(PROMPTS, max_new_tokens=9, **options))


# --- what is asked of the device -------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """The operations that would make a GPU wait for its host or the other way round."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "item")

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.name().split("::")[-1].split(".")[0]
        if name in self.WAITING or (name == "index" and any(t.dtype == torch.bool for t in args[1] if t is not None)):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", [*OPTIONS, {"eos_token_id": 250}], ids=str)
def test_a_step_waits_for_nothing(model, options):
    steps = Generation(model, PROMPTS, max_new_tokens=20, **options)
    next(steps)
    for queue in (lambda: next(steps), steps._steps.queue):
        with Reads() as reads:
            queue()
        assert reads.count > 5
        assert not reads.found


class NothingToRead:
    """Stands for a model on a device whose values the host cannot have, and does not mix with those of the CPU."""

    device, dtype, weights_stamp = torch.device("meta"), torch.float32, 0
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)

    def get_output_embeddings(self):
        return SimpleNamespace(out_features=50)

    def new_cache(self, rows, max_length=None):
        return KVCache(self.config, rows, max_length, dtype=self.dtype, device=self.device)

    def decode_step(self, tokens, position_ids, slots, lengths, cache):
        assert {t.device.type for t in (tokens, position_ids, slots, lengths, *cache.layers)} == {"meta"}
        assert (slots.dtype, lengths.dtype, tokens.dtype) == (torch.int32, torch.int32, torch.int64)
        return torch.empty(*tokens.shape, 50, device="meta")


@pytest.mark.parametrize("options", [*OPTIONS, {"eos_token_id": [3, 4], "min_new_tokens": 2}], ids=str)
def test_a_step_mixes_no_devices(options, monkeypatch):
    """meta tensors have no values: reading one raises, and so does an operation that joins them with the CPU's."""
    sent = []
    monkeypatch.setattr(DeviceSteps, "_send", lambda self: sent.append(self._step.chooser.state.report.device.type))
    model, config = (
        NothingToRead(),
        GenerationConfig(**{"eos_token_id": [], **{n: v for n, v in options.items() if n != "seed"}}),
    )
    steps = DeviceSteps(model, 3, 20, 9, None, config)
    prompts = [np.array(prompt) for prompt in PROMPTS]
    steps.cache.prepare(5)
    positions = torch.full((3, 1), 5, device="meta")
    with torch.inference_mode():
        steps.begin(config, positions, seeds=[1, 2, 3], prompts=prompts, min_new=config.min_new_tokens or 0, pad_id=0)
        assert steps.first(torch.zeros(3, 50, device="meta")).shape == (4, 50)
        for process in (None, lambda logits: logits * 2):
            assert steps.queue(process).shape == (4, 50)
    steps.end_row(1, is_known=False)
    assert sent == ["meta"] * 3
    with pytest.raises(RuntimeError):
        steps._step.chooser.state.lengths.tolist()


@pytest.mark.usefixtures("on_device")
def test_how_often_the_host_waits(small_model, monkeypatch):
    made = []
    monkeypatch.setattr(generation, "DeviceSteps", lambda *args: made.append(DeviceSteps(*args)) or made[-1])
    small_model.generate(PROMPTS, max_new_tokens=20, eos_token_id=[])
    small_model.generate(PROMPTS, max_new_tokens=20, eos_token_id=[], **SAMPLED)
    assert [steps.waits for steps in made] == [1, 1]
    made.clear()
    small_model.generate(PROMPTS, max_new_tokens=20, eos_token_id=250)
    assert [steps.waits for steps in made] == [20]
    made.clear()
    ahead = []
    for _ in small_model.stream(PROMPTS, max_new_tokens=20, eos_token_id=[]):
        ahead.append(made[0].num_queued - made[0].num_read)
    assert ahead == [1] * 19 + [0]


# --- when a step is captured, with a graph that is played ------------------------------------------------------------


class PlayedGraph:
    """Runs again what was captured, into the tensor that the capture gave."""

    def __init__(self, call, model, logits):
        self._run, self._logits = lambda: call(model), logits

    def replay(self):
        self._logits.copy_(self._run())


@pytest.fixture
def captures(monkeypatch):
    """The rows of each step that was captured, in order."""
    made = []

    def capture(self, call, model):
        made.append(self.rows)
        logits = torch.empty(self.rows, model.get_output_embeddings().out_features)
        return PlayedGraph(call, model, logits), logits

    init = cuda_graph.DecodeStep.__init__

    def with_capture(self, *args):
        init(self, *args)
        assert not self._can_capture, "a CPU has no graphs"
        self._can_capture = True

    monkeypatch.setattr(cuda_graph.DecodeStep, "__init__", with_capture)
    monkeypatch.setattr(cuda_graph.DecodeStep, "_capture", capture)
    return made


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
            self.logits.copy_(self.call())

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
            with contextlib.suppress(AttributeError):  # a graph that is played makes nothing
                step._run(key, step.logits, small_model, 50)
    assert events == ["ran", "captured", "ran"] * 2
    assert list(pools.values()) == [2]
    small_model.weight_slots()["transformer.ln_f.bias"].write(torch.ones(small_model.config.n_embd))
    events.clear()
    for _ in range(2):
        with contextlib.suppress(AttributeError):
            step._run("one", step.logits, small_model, 50)
    assert events == ["ran", "captured", "ran"]
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
