"""Generation with GPTBigCode: the tokens that transformers makes, and what a step may allocate."""

from pathlib import Path

import pytest
import torch
from alula.config import GPTBigCodeConfig
from alula.generation import Generation, GenerationConfig
from alula.models import AutoModelForCausalLM, GPTBigCodeForCausalLM
from torch.utils._python_dispatch import TorchDispatchMode

PROMPTS = [[5, 17, 3, 99, 4], [42], [7, 7, 8, 61, 200, 1, 0, 33, 12], [250, 3]]


def make_config(**changes) -> dict:
    config = {"n_embd": 48, "n_head": 3, "n_layer": 3, "n_positions": 96, "vocab_size": 256, "multi_query": True}
    return config | {"eos_token_id": None, "bos_token_id": None, "initializer_range": 0.3} | changes


@pytest.fixture(scope="module", params=[True, False], ids=["multi_query", "multi_head"])
def pair(request, tmp_path_factory):
    """The same random checkpoint in transformers and in alula."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = transformers.GPTBigCodeConfig(**make_config(multi_query=request.param))
    theirs = transformers.GPTBigCodeForCausalLM._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(folder)
    return theirs, AutoModelForCausalLM.from_pretrained(folder)


def left_padded(prompts, pad):
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def both(pair, ids, mask, **options):
    theirs, ours = pair
    options = {"max_new_tokens": 40, "pad_token_id": 11, "do_sample": False, **options}
    return theirs.generate(ids, attention_mask=mask, **options), ours.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"max_length": 30, "max_new_tokens": None},
        {"do_sample": True, "top_k": 1, "temperature": 0.5},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_tokens_equal_transformers(pair, options):
    for prompts in ([PROMPTS[0]], PROMPTS):
        theirs, ours = both(pair, *left_padded(prompts, 11), **options)
        assert torch.equal(ours, theirs)


END = {"eos_token_id": "third", "max_new_tokens": 12}  # the first prompt's third token


@pytest.mark.parametrize(
    "name, values",
    [
        ("eos_token_id", END),
        ("max_length", {"max_length": 24}),
        ("max_new_tokens", {"max_new_tokens": 5}),
        ("min_length", {"min_length": 30, **END}),
        ("min_new_tokens", {"min_new_tokens": 9, **END}),
        ("repetition_penalty", {"repetition_penalty": 1.5, "max_new_tokens": 12}),
    ],
)
def test_none_is_what_transformers_has_for_it(pair, name, values):
    """Given by name it puts the model's own option out of force; in a configuration it leaves the model's."""
    transformers = pytest.importorskip("transformers")
    ids, mask = left_padded(PROMPTS, 11)
    values = {"pad_token_id": 11, "do_sample": False, **values}
    if "eos_token_id" in values:
        values["eos_token_id"] = int(both(pair, ids, mask)[0][0, ids.shape[1] + 2])
    kept = [model.generation_config for model in pair]
    try:
        pair[0].generation_config = transformers.GenerationConfig(**values)
        pair[1].generation_config = GenerationConfig(**values)
        found = []
        for options in ({}, {name: None}):
            if name == "max_length" and options:
                options["max_new_tokens"] = 20  # transformers has no length then
            theirs, ours = (model.generate(ids, attention_mask=mask, **options) for model in pair)
            assert torch.equal(ours, theirs)
            found.append(ours)
        assert not torch.equal(*found)
        config = GenerationConfig(pad_token_id=11)
        setattr(config, name, None)
        theirs_config = transformers.GenerationConfig(pad_token_id=11, **{name: None})
        for given in (config, theirs_config, config.updated(**values).updated(**dict.fromkeys(values))):
            assert torch.equal(pair[1].generate(ids, attention_mask=mask, generation_config=given), found[0])
        assert torch.equal(pair[0].generate(ids, attention_mask=mask, generation_config=theirs_config), found[0])
    finally:
        for model, config in zip(pair, kept, strict=True):
            model.generation_config = config


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 7}, {"max_length": 20, "repetition_penalty": 1.5}, {"do_sample": True, "top_k": 1}, {}],
    ids=str,
)
def test_configurations_of_transformers_are_taken(pair, options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(pad_token_id=11, **options)
    ids, mask = left_padded(PROMPTS, 11)
    theirs, ours = (model.generate(ids, attention_mask=mask, generation_config=config) for model in pair)
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="num_beams=3 is not supported; accepted: 1"):
        pair[1].generate(ids, generation_config=transformers.GenerationConfig(num_beams=3))
    with pytest.raises(ValueError, match="n_positions"):  # what it asks for is asked for
        pair[1].generate(ids, generation_config=transformers.GenerationConfig(max_new_tokens=4000))


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 12}, {"min_length": 15}], ids=str)
def test_ends_equal_transformers(pair, options):
    ids, mask = left_padded(PROMPTS, 11)
    free, _ = both(pair, ids, mask)
    eos = [int(free[0, 14]), int(free[1, 11]), int(free[2, 20])]
    theirs, ours = both(pair, ids, mask, eos_token_id=eos, **options)
    assert torch.equal(ours, theirs)
    assert (ours[:, 9:] == 11).any() or options


def test_a_row_of_a_batch_is_the_row_alone(pair):
    _, ours = pair
    for options in ({}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}):
        seeds = {"seed": 9} if options else {}
        together = ours.generate(PROMPTS, max_new_tokens=30, **options, **seeds)
        for b, prompt in enumerate(PROMPTS):
            seeds = {"seed": 9 + b} if options else {}
            alone = ours.generate(prompt, max_new_tokens=30, **options, **seeds)
            assert torch.equal(together[b, 9:], alone[0, len(prompt) :])


def test_rows_that_end_early_do_not_change_the_others(pair):
    _, ours = pair
    free = ours.generate(PROMPTS, max_new_tokens=30)[:, 9:]
    eos = int(free[1, 3])
    out = ours.generate(PROMPTS, max_new_tokens=30, eos_token_id=eos, pad_token_id=0)[:, 9:].tolist()
    for row, whole in zip(out, free.tolist(), strict=True):
        n = whole.index(eos) + 1 if eos in whole else len(row)
        assert row == (whole[:n] + [0] * 30)[: len(row)]


def test_stop_strings_equal_transformers(pair):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ids, mask = left_padded(PROMPTS, 11)
    free, _ = both(pair, ids, mask)
    printable = [
        text
        for row in free.tolist()
        for at in range(9, 40)
        if (text := tokenizer.decode(row[at : at + 2])).isascii() and text.isprintable()
    ]
    assert printable
    # Without an eos id transformers goes on with rows that a stop string has ended; with one, it pads them.
    unused = next(i for i in range(255, 0, -1) if not (free == i).any())
    for stop in ([printable[0]], printable[-2:], ["never"]):
        theirs, ours = both(pair, ids, mask, stop_strings=stop, tokenizer=tokenizer, eos_token_id=unused)
        assert torch.equal(ours, theirs), stop


def test_streamers_of_transformers_work(pair, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    out = pair[1].generate([66, 67], max_new_tokens=10, streamer=transformers.TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(out[0]) + "\n"


def test_generation_config_is_loaded_and_saved(tmp_path):
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**make_config(eos_token_id=7)))
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": [], "do_sample": true}')
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config == GenerationConfig(max_new_tokens=3, eos_token_id=[], do_sample=True)
    assert again.generate([1]).shape == (1, 4)
    again.save_pretrained(tmp_path / "copy")
    assert GenerationConfig.from_pretrained(tmp_path / "copy") == again.generation_config
    Path(tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(ValueError, match=r"generation_config\.json: temperature must be at least 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class NewMemory(TorchDispatchMode):
    """Adds up the elements of every tensor that an operation makes out of new memory."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {
            a.untyped_storage().data_ptr()
            for a in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(a, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 0, "top_p": 0.9, "repetition_penalty": 1.2}], ids=str
)
def test_a_step_allocates_nothing_that_grows_with_the_text(prompts, options):
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**make_config(n_positions=512)))
    generation = Generation(model, prompts, max_new_tokens=400, **options)
    steps = []
    for _ in range(400):
        if len(steps) < 20 or generation.length > 390:
            with NewMemory() as memory:
                next(generation)
            steps.append(memory.sizes)
        else:
            next(generation)
    assert len(steps[1]) > 2, "the mode sees the operations"
    assert steps[1] == steps[2] == steps[19] == steps[-1]
    # Nothing as large as one token row of the cache for the length of the text.
    assert max(steps[-1]) < 390 * 2 * 16 * 4
