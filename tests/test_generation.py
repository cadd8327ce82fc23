"""Generation: what a call does with prompts, limits, ends of rows, random streams, streamers and interruptions.

The rules are tested on a toy decoder whose next token is a known function of the tokens before it;
test_generation_models.py runs real ones.
"""

import numpy as np
import pytest
import torch
from alula.cache import KVCache
from alula.generation import Generation, GenerationConfig, generate, stream
from toy_decoder import ToyDecoder

PROMPTS = [[3, 5, 7], [11], [2, 4, 6, 8, 10, 12], [9, 9]]


class CharTokenizer:
    """Ids 0..25 are letters, 26 a space, 27 "<end>", the rest two-letter pieces."""

    all_special_ids = (27,)

    def piece(self, i: int) -> str:
        if i < 26:
            return chr(97 + i)
        return {26: " ", 27: "<end>"}.get(i, chr(97 + i % 26) + chr(97 + i // 26))

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.piece(i) for i in ids if not (skip_special_tokens and i == 27))


def new_tokens(model, prompt, **options):
    return generate(model, [prompt], **options)[0, len(prompt) :].tolist()


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.5}, {"repetition_penalty": 2.0}])
def test_a_row_of_a_batch_is_the_row_alone(options):
    model = ToyDecoder()
    options = {"max_new_tokens": 12, **options}
    seed = {"seed": 5} if options.get("do_sample") else {}
    together = generate(model, PROMPTS, **options, **seed)
    assert together.shape == (4, 6 + 12)
    for b, prompt in enumerate(PROMPTS):
        seed = {"seed": 5 + b} if options.get("do_sample") else {}
        assert together[b, 6:].tolist() == new_tokens(model, prompt, **options, **seed)
        assert together[b, 6 - len(prompt) : 6].tolist() == prompt


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_may_be_anywhere(side):
    model = ToyDecoder()
    width = 7
    ids = torch.full((4, width), 63)
    mask = torch.zeros(4, width, dtype=torch.int64)
    for b, prompt in enumerate(PROMPTS):
        n = len(prompt)
        at = {"left": list(range(width - n, width)), "right": list(range(n)), "holes": sorted([0, 2, 3, 6, 5, 1][:n])}[
            side
        ]
        ids[b, at] = torch.tensor(prompt)
        mask[b, at] = 1
    out = generate(model, ids, mask, max_new_tokens=5)
    assert torch.equal(out[:, :width], ids)
    for b, prompt in enumerate(PROMPTS):
        assert out[b, width:].tolist() == new_tokens(model, prompt, max_new_tokens=5)
    for kind in (torch.bool, torch.float32, torch.int32):
        assert torch.equal(generate(model, ids, mask.to(kind), max_new_tokens=5), out)


def test_ways_to_give_prompts():
    model = ToyDecoder()
    expected = generate(model, [[3, 5, 7]], max_new_tokens=4)
    for prompt in (
        [3, 5, 7],
        [torch.tensor([3, 5, 7])],
        torch.tensor([3, 5, 7]),
        torch.tensor([[3, 5, 7]], dtype=torch.int32),
        torch.tensor([[3, 0, 5, 0, 7]])[:, ::2],
        np.array([[3, 5, 7]]),
        list(np.array([3, 5, 7])),
    ):
        assert torch.equal(generate(model, prompt, max_new_tokens=4), expected)
    assert torch.equal(model.generate(inputs=torch.tensor([[3, 5, 7]]), max_new_tokens=4), expected)
    assert torch.equal(model.generate(input_ids=[3, 5, 7], max_new_tokens=4), expected)
    assert expected.dtype == torch.int64
    expected.add_(1)  # an ordinary tensor, not one of inference mode


def test_pad_ids_without_a_mask_count_as_padding():
    model = ToyDecoder()
    out = generate(model, torch.tensor([[0, 0, 5], [1, 2, 3]]), pad_token_id=0, eos_token_id=63, max_new_tokens=3)
    assert out[0, 3:].tolist() == new_tokens(model, [5], max_new_tokens=3)
    for options in ({}, {"pad_token_id": 0, "eos_token_id": 0}, {"pad_token_id": 0, "eos_token_id": [63, 0]}):
        out = generate(model, torch.tensor([[0, 0, 5]]), max_new_tokens=3, min_new_tokens=3, **options)
        ends = {"eos_token_id": options.get("eos_token_id"), "min_new_tokens": 3}
        assert out[0, 3:].tolist() == new_tokens(model, [0, 0, 5], max_new_tokens=3, **ends)


def test_masked_ids_are_never_read():
    ids = torch.tensor([[-100, 10**6, 5, 6]])
    out = generate(ToyDecoder(), ids, torch.tensor([[0, 0, 1, 1]]), max_new_tokens=3)
    assert out[0, 4:].tolist() == new_tokens(ToyDecoder(), [5, 6], max_new_tokens=3)


def test_num_return_sequences():
    model = ToyDecoder()
    out = generate(model, PROMPTS, num_return_sequences=3, do_sample=True, seed=100, max_new_tokens=6)
    assert out.shape == (12, 12)
    for row in range(12):
        alone = new_tokens(model, PROMPTS[row // 3], do_sample=True, seed=100 + row, max_new_tokens=6)
        assert out[row, 6:].tolist() == alone


# --- where a row ends ------------------------------------------------------------------------------------------------


def test_padding_follows_the_end_and_the_batch_ends_early():
    model = ToyDecoder()
    free = generate(model, PROMPTS, max_new_tokens=30)[:, 6:].tolist()
    eos = [free[0][3], free[1][1], free[2][5], free[3][2]]
    ends = [next(i for i, token in enumerate(row) if token in eos) for row in free]
    model.calls.clear()
    out = generate(model, PROMPTS, max_new_tokens=30, eos_token_id=eos, pad_token_id=1)[:, 6:].tolist()
    steps = max(ends) + 1
    assert len(model.calls) == steps
    assert model.calls[0]["cache"].lengths.tolist() == [len(p) + end for p, end in zip(PROMPTS, ends, strict=True)]
    for row, end, expected in zip(out, ends, free, strict=True):
        assert row == expected[: end + 1] + [1] * (steps - end - 1)


def test_the_default_padding_is_the_first_eos():
    model = ToyDecoder()
    free = generate(model, PROMPTS[:2], max_new_tokens=9)[:, 3:].tolist()
    out = generate(model, PROMPTS[:2], max_new_tokens=9, eos_token_id=[free[0][0], 62])
    assert out[0, 3:].tolist().count(free[0][0]) == out.shape[1] - 3


def test_limits():
    model = ToyDecoder()
    assert generate(model, [1, 2]).shape == (1, 22)
    assert generate(model, [1, 2], max_length=5).shape == (1, 5)
    assert generate(model, [1, 2], max_length=3, max_new_tokens=5).shape == (1, 7)
    eos = new_tokens(model, [1, 2], max_new_tokens=1)
    assert new_tokens(model, [1, 2], max_new_tokens=9, eos_token_id=eos) == eos
    for limit in ({"min_new_tokens": 4}, {"min_length": 6}):
        made = new_tokens(model, [1, 2], max_new_tokens=4, eos_token_id=eos, **limit)
        assert len(made) == 4
        assert eos[0] not in made
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=eos)
    assert new_tokens(model, [1, 2]) == eos
    assert len(new_tokens(model, [1, 2], eos_token_id=[])) == 7
    assert len(new_tokens(model, [1, 2], eos_token_id=None)) == 7
    assert len(new_tokens(model, [1, 2], eos_token_id=[], max_length=5)) == 3


def test_an_end_beyond_the_vocabulary_never_comes():
    model = ToyDecoder()
    free = generate(model, PROMPTS, max_new_tokens=6)
    made = generate(model, PROMPTS, max_new_tokens=6, min_new_tokens=4, eos_token_id=[64, 50256])
    assert torch.equal(made[:, 6:], free[:, 6:])
    eos = new_tokens(model, [1, 2], max_new_tokens=1)
    assert new_tokens(model, [1, 2], max_new_tokens=9, eos_token_id=[64, *eos]) == eos
    ended = generate(model, PROMPTS[:2], max_new_tokens=3, eos_token_id=[64], stopping_criteria=[first_row_ends])
    assert ended[0, -1] == 64  # the default padding is the first eos, wherever it lies


def first_row_ends(ids, logits):
    return torch.arange(len(ids)) == 0


def test_a_default_limit_is_cut_to_the_positions_there_are():
    model = ToyDecoder(positions=10)
    assert generate(model, [1] * 8).shape == (1, 10)
    model.generation_config = GenerationConfig(max_new_tokens=100)
    assert generate(model, [1] * 4).shape == (1, 10)
    assert generate(model, [1] * 4, max_new_tokens=6).shape == (1, 10)
    with pytest.raises(ValueError, match="n_positions=10; ask for at most 6"):
        generate(model, [1] * 4, max_new_tokens=7)


# --- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forced, stop, count",
    [
        ([1, 2, 3, 4], "bcd", 3),  # b c d e: over three tokens
        ([0, 28, 5], "cb", 2),  # a cb f: one token
        ([0, 28, 5, 6], "ac", 2),  # a cb f g: the token goes on beyond it
        ([0, 29, 30, 1], "be", 3),  # a db eb b: the end of one token and the beginning of the next
        ([26, 2, 27, 4], "c<end>", 3),  # a special token may be named
        ([1, 2, 3, 4], ["zz", "d", "cd"], 3),  # any of several
        ([1, 2, 3, 4], "db", 4),  # none
    ],
)
def test_stop_strings_end_a_row(forced, stop, count):
    options = {"max_new_tokens": len(forced), "stop_strings": stop, "tokenizer": CharTokenizer()}
    assert new_tokens(ToyDecoder(forced=forced), [25], **options) == forced[:count]


def test_stop_strings_may_begin_in_the_prompt_but_not_lie_in_it():
    model = ToyDecoder(forced=[2, 3, 4])
    options = {"max_new_tokens": 3, "stop_strings": ["xbc"], "tokenizer": CharTokenizer()}
    assert new_tokens(model, [23, 1], **options) == [2]
    model.calls.clear()
    assert new_tokens(model, [23, 1, 2], **options) == [2, 3, 4]


def test_text_of_a_stop_string_is_never_shown():
    model = ToyDecoder(forced=[7, 8, 18, 19, 14, 18, 19, 14, 15, 20])  # h i s t o s t o p u
    shown = []
    generation = Generation(
        model, [0], max_new_tokens=10, stop_strings=["stop", "xyz"], tokenizer=CharTokenizer(), with_text=True
    )
    shown = [generation.texts[0] for _ in generation]
    assert shown == ["h", "i", "", "", "", "sto", "", "", ""]
    assert generation.finish_reasons == ["stop"]
    assert generation.stopped_by(0) == "stop"


def test_held_back_text_is_shown_at_the_end():
    model = ToyDecoder(forced=[7, 18, 19, 14])
    options = {"stop_strings": ["stop"], "tokenizer": CharTokenizer(), "with_text": True}
    generation = Generation(model, [0], max_new_tokens=4, **options)
    assert [generation.texts[0] for _ in generation] == ["h", "", "", "sto"]
    model.calls.clear()
    generation = Generation(model, [0], max_new_tokens=9, eos_token_id=14, **options)
    assert [generation.texts[0] for _ in generation] == ["h", "", "", "st"]
    model.calls.clear()
    generation = Generation(model, [0], max_new_tokens=9, **options)
    next(generation), next(generation)
    assert generation.flush() == ["s"]


# --- random streams --------------------------------------------------------------------------------------------------


def test_seeds_reproduce():
    model = ToyDecoder()
    options = {"do_sample": True, "max_new_tokens": 15}
    one, again, other = (new_tokens(model, [1, 2], seed=s, **options) for s in (4, 4, 5))
    assert one == again != other
    assert new_tokens(model, [1, 2], seed=np.int64(4), **{**options, "max_new_tokens": np.int32(15)}) == one
    assert generate(model, [[1, 2]] * 2, seed=[5, 4], **options)[:, 2:].tolist() == [other, one]
    longer = new_tokens(model, [1, 2], seed=4, do_sample=True, max_new_tokens=20)
    assert longer[:15] == one

    torch.manual_seed(0)
    globally = [new_tokens(model, [1, 2], **options) for _ in range(2)]
    torch.manual_seed(0)
    assert [new_tokens(model, [1, 2], **options) for _ in range(2)] == globally
    assert globally[0] != globally[1]
    with_generator = [
        new_tokens(model, [1, 2], generator=torch.Generator().manual_seed(8), **options) for _ in range(2)
    ]
    assert with_generator[0] == with_generator[1]


def test_a_sample_with_all_mass_on_one_token_is_greedy():
    model = ToyDecoder()
    greedy = new_tokens(model, [1, 2], max_new_tokens=10)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 0}, {"temperature": 1e-6}):
        assert new_tokens(model, [1, 2], max_new_tokens=10, do_sample=True, **options) == greedy


# --- processors, criteria, streamers ---------------------------------------------------------------------------------


def test_logits_processors_and_stopping_criteria():
    model = ToyDecoder()
    seen = []

    def only_even(ids, logits):
        seen.append(ids.shape[1])
        return logits.index_fill(1, torch.arange(1, logits.shape[1], 2), -torch.inf)

    out = generate(model, PROMPTS, max_new_tokens=6, logits_processor=[only_even])
    assert not (out[:, 6:] % 2).any()
    assert seen == [6, 7, 8, 9, 10, 11]
    out = generate(model, PROMPTS, max_new_tokens=6, stopping_criteria=[lambda ids, logits: ids.shape[1] == 8])
    assert out.shape == (4, 8)
    out = generate(
        model,
        PROMPTS,
        max_new_tokens=6,
        pad_token_id=0,
        stopping_criteria=[lambda ids, logits: torch.tensor([True, False, False, False])],
    )
    assert out.shape == (4, 12)
    assert out[0, 7:].eq(0).all()


class Recorder:
    def __init__(self, fail_after=None):
        self.got, self.ended, self.fail_after = [], 0, fail_after

    def put(self, value):
        if self.fail_after is not None and len(self.got) > self.fail_after:
            raise KeyboardInterrupt
        self.got.append(value.clone())

    def end(self):
        self.ended += 1


def test_streamer_gets_the_prompt_then_each_step():
    model, recorder = ToyDecoder(), Recorder()
    out = generate(model, PROMPTS, max_new_tokens=5, streamer=recorder)
    assert recorder.ended == 1
    assert [tuple(v.shape) for v in recorder.got] == [(4, 6)] + [(4,)] * 5
    assert torch.equal(torch.cat([recorder.got[0], torch.stack(recorder.got[1:], 1)], 1), out)


def test_stream_yields_what_generate_returns():
    model = ToyDecoder()
    out = generate(model, PROMPTS, max_new_tokens=5)
    steps = stream(model, PROMPTS, max_new_tokens=5)
    pieces = []
    for piece in steps:
        assert not torch.is_inference_mode_enabled()
        pieces.append(piece)
    assert torch.equal(torch.stack(pieces, 1), out[:, 6:])
    with pytest.raises(ValueError, match="empty"):
        model.stream([])


# --- interruptions and caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("broken")])
def test_an_interrupted_cache_is_whole(call, error):
    model, recorder = ToyDecoder(), Recorder()
    cache = KVCache(model.config, 1, max_length=64)
    expected = new_tokens(model, [1, 2, 3], max_new_tokens=9)
    model.calls.clear()
    model.fail_at = (call, error)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        generate(model, [1, 2, 3], max_new_tokens=9, past_key_values=cache, streamer=recorder)
    assert recorder.ended == 1
    assert cache.get_seq_length() == (0 if call == 1 else 3 + call - 2)
    assert cache.lengths.tolist() == [cache.get_seq_length()]
    made = [int(v) for v in recorder.got[1:]]
    model.fail_at = None
    out = generate(model, [1, 2, 3, *made], max_new_tokens=9 - len(made), past_key_values=cache)
    assert made + out[0, 3 + len(made) :].tolist() == expected


def test_an_interruption_between_steps_leaves_the_cache_whole():
    model, recorder = ToyDecoder(), Recorder(fail_after=3)
    cache = KVCache(model.config, 1, max_length=64)
    with pytest.raises(KeyboardInterrupt):
        generate(model, [1, 2, 3], max_new_tokens=9, past_key_values=cache, streamer=recorder)
    assert recorder.ended == 1
    assert cache.get_seq_length() == 3 + 3


def test_a_failing_choice_can_be_repeated():
    model = ToyDecoder()
    expected = new_tokens(model, [1, 2, 3], max_new_tokens=4)
    failures = iter([False, True, False, False, True, False])

    def fail_sometimes(ids, logits):
        if next(failures):
            raise RuntimeError("not now")
        return logits

    generation = Generation(model, [1, 2, 3], max_new_tokens=4, logits_processor=[fail_sometimes])
    made = []
    while not generation.is_done:
        try:
            made += next(generation).tolist()
        except RuntimeError:
            continue
    assert made == expected


def test_a_cache_is_filled_further():
    model = ToyDecoder()
    whole = generate(model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=8)
    cache = KVCache(model.config, 2)
    first = generate(model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=3, past_key_values=cache)
    model.calls.clear()
    second = generate(model, first, max_new_tokens=5, past_key_values=cache)
    assert torch.equal(second, whole)
    assert model.calls[0]["ids"].shape == (2, 1)
    with pytest.raises(ValueError, match="holds 2 rows of 10 tokens"):
        generate(model, first, max_new_tokens=5, past_key_values=cache)
    model.calls.clear()
    with pytest.raises(ValueError, match=r"holds 2 rows of 10 tokens.*at least one more"):  # none is left to read
        generate(model, whole[:, :10], max_new_tokens=5, past_key_values=cache)
    assert not model.calls
