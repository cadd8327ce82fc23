"""Choosing tokens on the device, run on the CPU: the steps are the same but for the capture into a CUDA graph."""
# ruff: noqa: F401, F811  (fixtures)

import numpy as np
import pytest
import torch
from alula import generation
from alula.device_generation import DeviceSteps
from alula.device_sampling import DeviceChooser
from alula.generation import Generation
from alula.generation_config import GenerationConfig
from alula.sampling import Sampler, greedy
from decoder_cases import LANGUAGE_MODELS, alula_model, hf_model
from device_generation_cases import (
    OPTIONS,
    PROMPTS,
    SAMPLED,
    NothingToRead,
    Reads,
    on_device,
    on_host,
    small_model,
)
from test_sampling import random_logits
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(params=LANGUAGE_MODELS)
def model(request: pytest.FixtureRequest):
    return alula_model(hf_model(1, request.param))


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


def test_a_row_that_is_ended_stores_and_chooses_nothing():
    chooser = DeviceChooser(2, 9, 4, torch.device("cpu"))
    config = GenerationConfig(eos_token_id=[])
    chooser.start(config, seeds=[], prompts=[np.array([1])] * 2, num_new=4, min_new=0, pad_id=7)
    chooser.place(torch.tensor([3, 5], dtype=torch.int32), torch.tensor([[3], [5]]))
    scores = torch.eye(9)[[4, 6]]
    chooser.choose(scores)
    assert chooser.state.slots.tolist() == [[3], [5]]
    chooser.end_row(1)
    assert chooser.state.slots.tolist() == [[3], [-1]], "the step that comes stores nothing of it"
    chooser.choose(scores, advances=True)
    assert chooser.state.out[:, :2].tolist() == [[4, 4], [6, 7]]
    assert chooser.state.lengths.tolist() == [4, 5]
    assert chooser.state.slots.tolist() == [[4], [-1]]


# --- whole calls -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_those_of_the_host(model, options):
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = on_host(model, prompts, max_new_tokens=12, **options)
        assert torch.equal(model.generate(prompts, max_new_tokens=12, **options), expected)
        assert torch.equal(torch.stack(list(model.stream(prompts, max_new_tokens=12, **options)), 1), expected[:, -12:])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", [*OPTIONS, {"eos_token_id": [3, 4], "min_new_tokens": 5}], ids=str)
def test_logits_of_16_bits_are_chosen_from_as_on_the_host(model, options):
    model.to(torch.bfloat16)
    expected = on_host(model, PROMPTS, max_new_tokens=12, **options)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=12, **options), expected)


@pytest.mark.usefixtures("on_device")
def test_an_end_beyond_the_vocabulary_never_comes(model):
    beyond = model.config.vocab_size
    expected = on_host(model, PROMPTS, max_new_tokens=6)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=6, min_new_tokens=4, eos_token_id=[beyond]), expected)


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
        patch.setattr(generation, "chooses_on_device", lambda model: False)
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
