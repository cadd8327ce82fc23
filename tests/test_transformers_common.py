"""What transformers' common model tests ask of every model, asked of accelerated ones.

The patterns are those of its generation, cache, attention-output and padding tests; each is written here against an
accelerated model, mostly without a plain one beside it.
"""
# ruff: noqa: E402

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula.integrations.transformers.cache import decoder_cache
from big_bird_cases import needs_causal_decoder
from decoder_cases import random_ids
from test_transformers_big_bird import pair as big_bird_pair
from transformers_cases import IS_5, LANGUAGE_MODELS, close, pair

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3}


@pytest.fixture(params=(*LANGUAGE_MODELS, pytest.param("BigBirdForCausalLM", marks=needs_causal_decoder)))
def model(request: pytest.FixtureRequest) -> Any:
    """A language model of each family; BigBird's as a decoder, which transformers runs with full attention only."""
    if request.param == "BigBirdForCausalLM":
        models = big_bird_pair(request.param, is_decoder=True, attention_type="original_full")
    else:
        models = pair(2, request.param)
    yield models.fast
    assert models.report.fast_calls
    assert not models.report.plain_calls


def kv_heads(model: Any) -> int:
    return 1 if getattr(model.config, "multi_query", False) else model.config.num_attention_heads


def check_cache(model: Any, cache: Any, batch: int, length: int) -> None:
    config = model.config
    cache = decoder_cache(cache)
    assert len(cache.layers) == config.num_hidden_layers
    for layer in cache.layers:
        expected = (batch, kv_heads(model), length, config.hidden_size // config.num_attention_heads)
        assert layer.keys.shape == layer.values.shape == expected


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generate_dict_outputs(model: Any, use_cache: bool) -> None:
    ids = random_ids(model, 2, 7)
    out = model.generate(
        ids,
        max_new_tokens=4,
        use_cache=use_cache,
        output_attentions=True,
        output_hidden_states=True,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert out.sequences.shape == (2, 11)
    assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == 4
    for step, (score, attentions, hidden) in enumerate(zip(out.scores, out.attentions, out.hidden_states, strict=True)):
        assert score.shape == (2, model.config.vocab_size)
        tokens = 1 if use_cache and step else 7 + step
        assert len(attentions) == model.config.num_hidden_layers
        assert {a.shape for a in attentions} == {(2, model.config.num_attention_heads, tokens, 7 + step)}
        assert len(hidden) == model.config.num_hidden_layers + 1
        assert {h.shape for h in hidden} == {(2, tokens, model.config.hidden_size)}
    if use_cache:
        check_cache(model, out.past_key_values, 2, 10)
    else:
        assert out.past_key_values is None


def test_beam_search_dict_outputs(model: Any) -> None:
    out = model.generate(
        random_ids(model, 2, 5),
        max_new_tokens=4,
        num_beams=3,
        num_return_sequences=2,
        output_scores=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    assert out.sequences.shape[0] == out.sequences_scores.shape[0] == 4
    assert {score.shape for score in out.scores} == {(6, model.config.vocab_size)}
    check_cache(model, out.past_key_values, 6, 8)


def test_sample_generate(model: Any) -> None:
    ids = random_ids(model, 2, 5)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(model.generate(ids, max_new_tokens=6, num_return_sequences=2, **{**GREEDY, "do_sample": True}))
    assert drawn[0].shape == (4, 11)
    assert torch.equal(*drawn)


def test_generate_continue_from_past_key_values(model: Any) -> None:
    ids = random_ids(model, 1, 6)
    arguments = {**GREEDY, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=6, **arguments)
    first = model.generate(ids, max_new_tokens=3, **arguments)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, **arguments)
    assert torch.equal(whole.sequences, second.sequences)
    for one, other in zip(whole.past_key_values.layers, second.past_key_values.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-5)


def test_generate_continue_from_inputs_embeds(model: Any) -> None:
    ids = random_ids(model, 1, 6)
    embeds = model.get_input_embeddings()(ids)
    from_ids = model.generate(ids, max_new_tokens=5, **GREEDY)
    from_embeds = model.generate(inputs_embeds=embeds, max_new_tokens=5, **GREEDY)
    assert torch.equal(from_ids[:, 6:], from_embeds)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_static_cache(model: Any, beams: int) -> None:
    ids = random_ids(model, 2, 5)
    arguments = {**GREEDY, "max_new_tokens": 5, "num_beams": beams, "return_dict_in_generate": True}
    static = model.generate(ids, cache_implementation="static", **arguments)
    assert torch.equal(static.sequences, model.generate(ids, **arguments).sequences)
    cache = static.past_key_values
    assert isinstance(cache, transformers.StaticCache)
    maximum = cache.get_max_length() if IS_5 else cache.get_max_cache_shape()
    assert maximum >= 5 + 5 - 1
    check_cache(model, cache, 2 * beams, maximum)
    twin = copy.deepcopy(model)
    at.restore(twin)
    assert not hasattr(twin, "_cache")  # 4.57 keeps it between calls


def test_generate_methods_with_logits_to_keep(model: Any) -> None:
    ids = random_ids(model, 2, 7)
    full = model(ids).logits
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of the class has no logits_to_keep")
    close(model(ids, logits_to_keep=1).logits, full[:, -1:])
    close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])


def test_assisted_decoding_matches_greedy_search(model: Any) -> None:
    ids = random_ids(model, 1, 6)
    expected = model.generate(ids, max_new_tokens=8, **{**GREEDY, "eos_token_id": 0})
    assistant = copy.deepcopy(model)
    found = model.generate(ids, max_new_tokens=8, assistant_model=assistant, **{**GREEDY, "eos_token_id": 0})
    assert torch.equal(found, expected)


def test_prompt_lookup_matches_greedy_search(model: Any) -> None:
    ids = random_ids(model, 1, 5).repeat(1, 3)
    arguments = {**GREEDY, "max_new_tokens": 8, "eos_token_id": 0}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **arguments), model.generate(ids, **arguments))


# --- padding ---------------------------------------------------------------------------------------------------------


def test_left_padding_compatibility(model: Any) -> None:
    ids = random_ids(model, 2, 6)
    alone = model(ids).logits[:, -1]
    padded = torch.cat([torch.full((2, 3), 3), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    close(model(padded, attention_mask=mask, position_ids=positions).logits[:, -1], alone)
    tokens = model.generate(ids, max_new_tokens=6, **GREEDY)[:, 6:]
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=6, **GREEDY)[:, 9:], tokens)


def test_right_padding_changes_nothing_before_it(model: Any) -> None:
    ids = random_ids(model, 2, 6)
    mask = torch.tensor([[1] * 4 + [0] * 2, [1] * 6])
    out = model(ids, attention_mask=mask).logits
    close(out[:1, :4], model(ids[:1, :4]).logits)
    close(out[1:], model(ids[1:]).logits)


def test_a_row_in_a_batch(model: Any) -> None:
    """Equal bits of what alula runs; PyTorch runs a product of BigBird's head: other rows and threads, other bits."""
    ids = random_ids(model, 3, 6)
    states, logits = model.base_model(ids)[0], model(ids).logits
    for row in range(3):
        alone = ids[row : row + 1]
        assert torch.equal(model.base_model(alone)[0], states[row : row + 1])
        found = model(alone).logits
        close(found, logits[row : row + 1])
        assert model.config.model_type == "big_bird" or torch.equal(found, logits[row : row + 1])


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_attention_outputs(model: Any) -> None:
    ids = random_ids(model, 2, 6)
    out = model(ids, output_attentions=True)
    assert len(out.attentions) == model.config.num_hidden_layers
    for attention in out.attentions:
        assert attention.shape == (2, model.config.num_attention_heads, 6, 6)
        assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-5)
        assert not attention.triu(1).any()
    both = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(both) == len(out) + 1


def test_hidden_states_output(model: Any) -> None:
    ids = random_ids(model, 2, 6)
    out = model.base_model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_model_outputs_equivalence(model: Any) -> None:
    ids = random_ids(model, 2, 6)
    for flags in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
        named = model(ids, use_cache=False, **flags)
        plain = model(ids, use_cache=False, return_dict=False, **flags)
        assert isinstance(plain, tuple)
        for one, other in zip(named.to_tuple(), plain, strict=True):
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (one, other)), strict=True):
                assert torch.equal(a, b)


def test_determinism(model: Any) -> None:
    ids = random_ids(model, 2, 6)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_forward_signature(model: Any) -> None:
    model(random_ids(model, 1, 2))
    names = list(inspect.signature(model.base_model.forward).parameters)
    assert names[0] == "input_ids"
    assert names == list(inspect.signature(type(model.base_model).forward).parameters)[1:]


def test_inputs_embeds_matches_input_ids(model: Any) -> None:
    ids = random_ids(model, 2, 6)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(ids).logits, model(inputs_embeds=embeds).logits)


# --- cache -----------------------------------------------------------------------------------------------------------


def test_past_key_values_format(model: Any) -> None:
    out = model(random_ids(model, 2, 6), use_cache=True)
    check_cache(model, out.past_key_values, 2, 6)
    for key in decoder_cache(out.past_key_values).layers:
        assert key.keys.dtype == model.dtype


def test_decoder_model_past_with_large_inputs(model: Any) -> None:
    ids, more = random_ids(model, 2, 6), random_ids(model, 2, 3, seed=1)
    past = model(ids, use_cache=True).past_key_values
    whole = model(torch.cat([ids, more], 1), output_hidden_states=True).hidden_states[-1]
    step = model(more, past_key_values=past, output_hidden_states=True, use_cache=True).hidden_states[-1]
    close(step, whole[:, -3:])


def test_decoder_model_attention_mask_past(model: Any) -> None:
    ids = random_ids(model, 2, 8)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[:, 2:4] = 0
    past = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    whole = model(ids, attention_mask=mask).logits[:, -2:]
    close(model(ids[:, 6:], attention_mask=mask, past_key_values=past, use_cache=True).logits, whole)
    changed = ids.clone()
    changed[:, 2:4] = 5
    close(model(changed, attention_mask=mask).logits[:, -2:], whole)


def test_custom_4d_attention_mask(model: Any) -> None:
    """Three rows that share a beginning, in one row with a mask that keeps their ends apart."""
    prefix, ends = random_ids(model, 1, 4), random_ids(model, 3, 1, seed=1)
    rows = torch.cat([prefix.repeat(3, 1), ends], 1)
    expected = model(rows, use_cache=False).logits[:, -1]
    shared = torch.cat([prefix, ends.view(1, 3)], 1)
    visible = torch.tril(torch.ones(7, 7)).bool()
    visible[4:, 4:] = torch.eye(3).bool()
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~visible, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 4, 4, 4]])
    out = model(shared, attention_mask=mask, position_ids=positions, use_cache=False).logits
    close(out[0, -3:], expected)


# --- embeddings, saving ----------------------------------------------------------------------------------------------


def test_resize_tokens_embeddings(model: Any) -> None:
    ids = random_ids(model, 1, 5)
    before = model(ids).logits
    model = copy.deepcopy(model)
    report = at.accelerate(model)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 10, mean_resizing=False)
    after = model(ids).logits
    assert after.shape[-1] == size + 10
    close(after[..., :size], before)
    assert model(torch.full((1, 3), size + 5)).logits.isfinite().all()
    assert report.fast_calls
    assert "output projection" in str(at.accelerate(model).replaced)


def test_save_load(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = random_ids(model, 1, 5)
    close(again(ids).logits, model(ids).logits)
    at.accelerate(again)
    assert torch.equal(again(ids).logits, model(ids).logits)
