"""Steps on the device, run on the CPU, of the models whose step is more than a stack of decoder blocks: BigBird as a
decoder, and decoders that look at an encoder's states."""
# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

from typing import Any

import big_bird_cases
import decoder_cases
import pytest
import torch
from alula.generation import Generation
from device_generation_cases import (
    OPTIONS,
    PROMPTS,
    SAMPLED,
    Reads,
    captures,
    on_device,
    on_host,
)
from torch import Tensor


def big_bird(**options: Any) -> Any:
    cases = big_bird_cases
    fixed = {"is_decoder": True, "attention_type": "original_full", "num_hidden_layers": 2, "eos_token_id": None}
    return cases.alula_model(cases.hf_model(8, "BigBirdForCausalLM", **fixed, **options))


def with_encoder(name: str) -> Any:
    if name == "BigBirdForCausalLM":
        return big_bird(add_cross_attention=True)
    options = {"multi_query": False} if name == "GPTBigCodeForCausalLM" else {}
    return decoder_cases.alula_model(decoder_cases.hf_model(1, name, add_cross_attention=True, **options))


def encoded(model: Any, rows: int, padded: bool = True) -> dict[str, Tensor]:
    """States of an encoder, and which of them are tokens."""
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, 7, model.config.hidden_size, generator=generator)
    mask = torch.ones(rows, 7, dtype=torch.int64)
    if padded:
        mask[-1, :3] = 0
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


# --- BigBird ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_big_bird_chooses_as_on_the_host(options: dict[str, Any]) -> None:
    model = big_bird()
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = on_host(model, prompts, max_new_tokens=12, **options)
        assert torch.equal(model.generate(prompts, max_new_tokens=12, **options), expected)
    ends = {"eos_token_id": [int(expected[0, -9]), int(expected[1, -4])], "pad_token_id": 2}
    expected = on_host(model, PROMPTS, max_new_tokens=12, **options, **ends)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=12, **options, **ends), expected)


@pytest.mark.usefixtures("on_device")
def test_a_sparse_decoder_of_few_tokens_goes_on() -> None:
    cases = big_bird_cases
    model = cases.alula_model(
        cases.hf_model(9, "BigBirdForCausalLM", is_decoder=True, block_size=16, eos_token_id=None)
    )
    expected = on_host(model, PROMPTS, max_new_tokens=20)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=20), expected)


@pytest.mark.usefixtures("on_device")
def test_big_birds_step_is_captured_and_kept(captures: list[int]) -> None:
    model, options = big_bird(), {"max_new_tokens": 24, "eos_token_id": []}
    for prompts in (PROMPTS, PROMPTS[::-1]):
        assert torch.equal(model.generate(prompts, **options), on_host(model, prompts, **options))
    assert captures == [4]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("fed", [False, True])
def test_big_birds_step_waits_for_nothing(fed: bool) -> None:
    model = big_bird(add_cross_attention=fed)
    given = encoded(model, 3) if fed else {}
    steps = Generation(model, PROMPTS, max_new_tokens=20, eos_token_id=[], **given)
    next(steps)
    with Reads() as reads:
        steps._steps.queue()
    assert reads.count > 5
    assert not reads.found


# --- an encoder's states ---------------------------------------------------------------------------------------------


FED = ["GPT2LMHeadModel", "GPTBigCodeForCausalLM", "BigBirdForCausalLM"]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", FED)
@pytest.mark.parametrize("options", [{}, SAMPLED, {"num_return_sequences": 2}, {"repetition_penalty": 1.3}], ids=str)
def test_encoder_fed_models_choose_as_on_the_host(name: str, options: dict[str, Any]) -> None:
    model = with_encoder(name)
    for padded in (False, True):
        given = {**encoded(model, 3, padded), "max_new_tokens": 12, **options}
        expected = on_host(model, PROMPTS, **given)
        assert torch.equal(model.generate(PROMPTS, **given), expected)
        assert torch.equal(torch.stack(list(model.stream(PROMPTS, **given)), 1), expected[:, -12:])
        ends = {"eos_token_id": [int(expected[0, -9]), int(expected[1, -4])], "pad_token_id": 2}
        assert torch.equal(model.generate(PROMPTS, **given, **ends), on_host(model, PROMPTS, **given, **ends))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", FED)
def test_a_cache_that_holds_an_encoders_keys(name: str) -> None:
    """Filled by one call and gone on with by the next, which is told nothing of the encoder."""
    model = with_encoder(name)
    given = encoded(model, 1, padded=False)
    expected = on_host(model, PROMPTS[:1], max_new_tokens=14, eos_token_id=[], **given)
    cache = model.new_cache(1)
    first = model.generate(PROMPTS[:1], max_new_tokens=6, eos_token_id=[], past_key_values=cache, **given)
    assert torch.equal(first, expected[:, : first.shape[1]])
    rest = model.generate(first, torch.ones_like(first), max_new_tokens=8, eos_token_id=[], past_key_values=cache)
    assert torch.equal(rest, expected)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", FED[:2])
def test_encoder_fed_steps_are_captured_for_each_call(name: str, captures: list[int]) -> None:
    model = with_encoder(name)
    for rows in (2, 3):
        given = {**encoded(model, rows), "max_new_tokens": 24, "eos_token_id": []}
        assert torch.equal(model.generate(PROMPTS[:rows], **given), on_host(model, PROMPTS[:rows], **given))
    assert captures == [2, 3], "as many rows as are given: nothing is kept"
    steps = Generation(model, PROMPTS[:2], **{**encoded(model, 2), "max_new_tokens": 9, "eos_token_id": []})
    next(steps)
    with Reads() as reads:
        steps._steps.queue()
    assert not reads.found
