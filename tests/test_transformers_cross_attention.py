"""Decoders that look at an encoder: GPT-2's cross-attention on alula, and what is left to transformers' blocks."""
# ruff: noqa: E402

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula.integrations.transformers.cache import FixedLayer, GrowingLayer
from big_bird_cases import HAS_CAUSAL_DECODER
from decoder_cases import hf_model, padding_mask, random_ids, randomise
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers_cases import IS_5, TOLERANCE, Pair, close, same_state, state_of


def pair(seed: int = 3, **fixed: Any) -> Pair:
    plain = hf_model(seed, "GPT2LMHeadModel", add_cross_attention=True, is_decoder=True, **fixed)
    fast = copy.deepcopy(plain)
    return Pair(plain, fast, at.accelerate(fast))


def states_of(model: Any, batch: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, columns, model.config.n_embd, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
def test_everything_a_pass_returns(seed: int, kind: str) -> None:
    models = pair(seed)
    batch, tokens, columns = 1 + seed % 3, 4 + seed, 3 + 5 * (seed % 3)
    ids = random_ids(models.plain, batch, tokens, seed)
    inputs = {
        "attention_mask": padding_mask("right", batch, tokens),
        "encoder_hidden_states": states_of(models.plain, batch, columns, seed),
        "encoder_attention_mask": padding_mask(kind, batch, columns),
        "output_attentions": True,
        "output_hidden_states": True,
    }
    plain, fast = (model(ids, **inputs) for model in models[:2])
    assert list(plain.keys()) == list(fast.keys())
    close(fast.logits, plain.logits)
    for name in ("hidden_states", "attentions", "cross_attentions"):
        assert len(getattr(plain, name)) == len(getattr(fast, name))
        for theirs, ours in zip(getattr(plain, name), getattr(fast, name), strict=True):
            close(ours, theirs)
    plain, fast = (model(ids, return_dict=False, **inputs) for model in models[:2])
    assert [type(item) for item in plain] == [type(item) for item in fast]
    models.prove(2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_without_outputs(use_cache: bool) -> None:
    models = pair()
    ids, states = random_ids(models.plain, 2, 5), states_of(models.plain, 2, 7)
    plain, fast = (model(ids, encoder_hidden_states=states, use_cache=use_cache) for model in models[:2])
    close(fast.logits, plain.logits)
    assert type(fast.past_key_values) is type(plain.past_key_values)
    close(models.fast(ids).logits, models.plain(ids).logits)  # no encoder: no cross-attention
    models.prove(2)


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_keys_and_values_are_made_once(fixed: bool) -> None:
    """Steps read the cache: other states change nothing, in transformers as here."""
    models = pair()
    ids, states = random_ids(models.plain, 2, 8), states_of(models.plain, 2, 6)
    mask = padding_mask("right", 2, 6)
    found = []
    for model in models[:2]:
        config = model.config
        cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        if fixed:
            cache = EncoderDecoderCache(
                StaticCache(config=config, max_cache_len=12), StaticCache(config=config, max_cache_len=6)
            )
        logits = []
        for start, end in ((0, 5), (5, 6), (6, 8)):
            out = model(
                ids[:, start:end],
                encoder_hidden_states=states if not start else states + 1,
                encoder_attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **({} if IS_5 else {"cache_position": torch.arange(start, end)}),
            )
            logits.append(out.logits)
        assert out.past_key_values is cache
        assert all(cache.is_updated[layer] for layer in range(config.n_layer))
        found.append((torch.cat(logits, 1), cache))
    close(found[1][0], found[0][0])
    expected = models.plain(ids, encoder_hidden_states=states, encoder_attention_mask=mask).logits
    close(found[1][0], expected)
    kinds = {type(layer) for layer in found[1][1].cross_attention_cache.layers}
    assert kinds == {FixedLayer if fixed else GrowingLayer}
    for theirs, ours in zip(*(cache.cross_attention_cache.layers for _, cache in found), strict=True):
        close(ours.keys, theirs.keys)
        close(ours.values, theirs.values)
    models.prove(3)


def test_a_cache_changes_hands() -> None:
    """What the plain model stored is continued, and the other way round."""
    models = pair()
    ids, states = random_ids(models.plain, 2, 6), states_of(models.plain, 2, 4)
    expected = models.plain(ids, encoder_hidden_states=states).logits
    for first, second in ((models.plain, models.fast), (models.fast, models.plain)):
        cache = first(ids[:, :4], encoder_hidden_states=states, use_cache=True).past_key_values
        close(
            second(ids[:, 4:], encoder_hidden_states=states, past_key_values=cache, use_cache=True).logits,
            expected[:, 4:],
        )
    models.prove(2)


@pytest.mark.skipif(not IS_5, reason="4.57 refuses such a mask")
def test_masks_of_four_dimensions() -> None:
    models = pair()
    ids, states = random_ids(models.plain, 2, 5), states_of(models.plain, 2, 6)
    seen = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    seen[..., 0] = True
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    plain = models.plain(ids, encoder_hidden_states=states, encoder_attention_mask=added).logits
    for mask in (seen, added):
        close(models.fast(ids, encoder_hidden_states=states, encoder_attention_mask=mask).logits, plain)
    models.prove(2)


@pytest.mark.skipif(IS_5, reason="5.x has no head_mask")
def test_head_mask() -> None:
    models = pair(5, n_layer=3)
    ids, states = random_ids(models.plain, 2, 5), states_of(models.plain, 2, 6)
    mask = torch.rand(3, models.plain.config.n_head, generator=torch.Generator().manual_seed(1))
    close(*(model(ids, encoder_hidden_states=states, head_mask=mask).logits for model in models[1::-1]))
    models.prove(1)


def test_low_precision_is_no_worse_than_the_plain_model() -> None:
    exact = pair().plain
    ids, states = random_ids(exact, 2, 9), states_of(exact, 2, 5)
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    fast = copy.deepcopy(plain)
    report = at.accelerate(fast)
    reference = exact(ids, encoder_hidden_states=states.bfloat16().float()).logits.double()
    theirs, ours = (model(ids, encoder_hidden_states=states.bfloat16()).logits.double() for model in (plain, fast))
    assert (ours - reference).abs().max() <= 2 * (theirs - reference).abs().max() + 1e-3
    assert report.fast_calls == 1


def test_follows_its_weights_and_is_restored() -> None:
    shared = pair(n_layer=2)
    plain, fast = (copy.deepcopy(shared.plain) for _ in range(2))
    before = state_of(fast)
    models = Pair(plain, fast, at.accelerate(fast))
    ids, states = random_ids(plain, 2, 5), states_of(plain, 2, 6)
    models.fast(ids, encoder_hidden_states=states)
    assert at.restore(fast) == 2
    same_state(before, state_of(fast))
    models = Pair(plain, fast, at.accelerate(fast))
    for model in (plain, fast):
        with torch.no_grad():
            model.transformer.h[1].crossattention.c_attn.weight.mul_(-1)
            model.transformer.h[0].ln_cross_attn.weight.mul_(2)
    close(*(model(ids, encoder_hidden_states=states).logits for model in models[1::-1]))
    models.prove(1)


def test_report_names_it() -> None:
    report = pair().report
    assert "cross-attention in transformer -> linear, attention" in str(report)
    assert not any("cross" in item.where for item in report.left)


def encoder_decoder() -> Pair:
    encoder = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40
    )
    decoder = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=2, vocab_size=40, n_positions=32, is_decoder=True, add_cross_attention=True
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    plain = transformers.EncoderDecoderModel(config).eval()
    randomise(plain.decoder, 4)
    fast = copy.deepcopy(plain)
    return Pair(plain, fast, at.accelerate(fast))


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "sampling", "no cache", "static cache"],
)
def test_encoder_decoder_models_generate(mode: dict[str, Any]) -> None:
    models = encoder_decoder()
    ids = torch.randint(4, 40, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = padding_mask("right", 3, 6)
    found = []
    for model in models[:2]:
        torch.manual_seed(1)
        arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": mask, **mode}
        found.append(model.generate(ids, return_dict_in_generate=True, output_scores=True, **arguments))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for theirs, ours in zip(*(out.scores for out in found), strict=True):
        finite = theirs.isfinite()
        assert (theirs - ours)[finite].abs().max() <= TOLERANCE
    models.prove(6)


def test_compiled() -> None:
    torch._dynamo.reset()
    models = pair()
    compiled = torch.compile(copy.deepcopy(models.fast), fullgraph=True, backend="aot_eager")
    ids, states = random_ids(models.plain, 2, 5), states_of(models.plain, 2, 6)
    close(
        compiled(ids, encoder_hidden_states=states, use_cache=False).logits,
        models.plain(ids, encoder_hidden_states=states).logits,
    )
    torch._dynamo.reset()


# --- left to transformers' blocks: said and counted ------------------------------------------------------------------


def plainly(models: Pair, reason: str, **inputs: Any) -> None:
    with pytest.warns(UserWarning, match=re.escape(f"runs on transformers' own blocks: {reason}")):
        fast = models.fast(**inputs)
    close(fast[0].detach(), models.plain(**inputs)[0].detach())
    assert list(models.report.plain_calls) == [reason]


def test_states_that_require_grad() -> None:
    models = pair()
    ids, states = random_ids(models.plain, 2, 5), states_of(models.plain, 2, 4).requires_grad_()
    with torch.enable_grad():
        plainly(models, "encoder_hidden_states requires grad", input_ids=ids, encoder_hidden_states=states)
        models.fast(ids, encoder_hidden_states=states).logits.sum().backward()
    assert states.grad is not None


def test_states_for_a_model_without_cross_attention() -> None:
    plain = hf_model(3, "GPT2LMHeadModel")
    fast = copy.deepcopy(plain)
    at.accelerate(fast)
    ids, states = random_ids(plain, 1, 4), states_of(plain, 1, 4)
    said = []
    for model in (plain, fast):
        with pytest.raises((ValueError, AttributeError)) as error:
            model(ids, encoder_hidden_states=states)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_gpt_bigcode() -> None:
    """It does not run in transformers: both models say so, in the same words."""
    plain = hf_model(3, "GPTBigCodeForCausalLM", add_cross_attention=True, is_decoder=True, multi_query=False)
    fast = copy.deepcopy(plain)
    report = at.accelerate(fast)
    assert any("crossattention" in item.where for item in report.left)
    ids, states = random_ids(plain, 2, 5), states_of(plain, 2, 4)
    said = []
    for model in (plain, fast):
        with pytest.raises(RuntimeError) as error:
            model(ids, encoder_hidden_states=states)
        said.append(str(error.value))
    assert said[0] == said[1]
    close(fast(ids).logits, plain(ids).logits)


def test_big_bird() -> None:
    """There self-attention looks at the encoder, too, when there is one: only its own blocks do the same."""
    config = transformers.BigBirdConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=64,
        is_decoder=True,
        add_cross_attention=True,
        attention_type="original_full",
        sep_token_id=2,
    )
    plain = transformers.BigBirdModel(config).eval()
    fast = copy.deepcopy(plain)
    models = Pair(plain, fast, at.accelerate(fast))
    assert any("crossattention" in item.where for item in models.report.left)
    ids = torch.randint(4, 50, (2, 6))
    states = torch.randn(2, 6, 32)
    inputs = {"input_ids": ids, "encoder_hidden_states": states, "use_cache": False}
    plainly(models, "cross-attention (encoder_hidden_states)", **inputs)
    close(models.fast(ids)[0], models.plain(ids)[0])
    assert models.report.fast_calls == HAS_CAUSAL_DECODER
