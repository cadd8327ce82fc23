"""One pass of an accelerated model against the plain one: every class, every input, every output."""
# ruff: noqa: E402

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula.integrations.transformers import state
from alula.integrations.transformers.cache import decoder_cache
from decoder_cases import hf_model, padding_mask, random_ids
from transformers_cases import IS_5, LANGUAGE_MODELS, close, left_padded, pair

HEADS = (
    "GPTBigCodeForSequenceClassification",
    "GPTBigCodeForTokenClassification",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("seed", range(6))
def test_random_models(cls: str, seed: int) -> None:
    models = pair(seed, cls)
    for kind in ("none", "left", "right", "holes"):
        ids = random_ids(models.plain, 3, 9, seed)
        mask = padding_mask(kind, 3, 9)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"attention_mask": mask, "position_ids": positions, "labels": ids}
        plain, fast = (model(ids, **inputs) for model in models[:2])
        close(fast.logits, plain.logits, mask)
        if kind in ("none", "right"):
            close(fast.loss[None], plain.loss[None])
    models.prove(4)


@pytest.mark.parametrize("cls", HEADS)
def test_heads(cls: str) -> None:
    models = pair(3, cls)
    ids, inputs = random_ids(models.plain, 2, 8), {}
    if cls == "GPT2DoubleHeadsModel":
        ids = ids.view(2, 2, 4)
        inputs = {"mc_token_ids": torch.tensor([[1, 3], [2, 0]]), "mc_labels": torch.tensor([0, 1]), "labels": ids}
    plain, fast = (model(ids, **inputs) for model in models[:2])
    assert plain.keys() == fast.keys()
    for key, value in plain.items():
        if isinstance(value, torch.Tensor):
            close(fast[key].reshape(-1, 1), value.reshape(-1, 1))
    models.prove(1)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("config_flag", [False, True], ids=["argument", "configuration"])
def test_outputs(cls: str, config_flag: bool) -> None:
    """Hidden states, attentions, tuples: the same entries in the same order, with and without the flags."""
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 7)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    plain, fast = (copy.deepcopy(model) for model in models[:2])
    if config_flag:
        for model in (plain, fast):
            for name, value in wanted.items():
                setattr(model.config, name, value)
    inputs = {} if config_flag else wanted
    theirs, ours = plain(ids, **inputs), fast(ids, **inputs)
    assert list(theirs.keys()) == list(ours.keys())
    for kind in ("hidden_states", "attentions"):
        assert len(ours[kind]) == len(theirs[kind]) == plain.config.n_layer + (kind == "hidden_states")
        for one, other in zip(ours[kind], theirs[kind], strict=True):
            close(one, other)
    theirs, ours = plain(ids, return_dict=False, **inputs), fast(ids, return_dict=False, **inputs)
    assert [type(item) for item in theirs] == [type(item) for item in ours]
    close(ours[0], theirs[0])
    theirs, ours = plain.transformer(ids, return_dict=False), fast.transformer(ids, return_dict=False)
    assert [type(item) for item in theirs] == [type(item) for item in ours]


@pytest.mark.skipif(not IS_5, reason="4.57 takes flags only")
@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_some_hidden_states(cls: str) -> None:
    """CodeGen takes any choice for all of them, and every class 0 and none for a flag that is not set."""
    models = pair(1, cls, n_layer=3)
    ids = random_ids(models.plain, 1, 5)
    for wanted in (1, [0, -1], [2, 9], -2, 0, []):
        theirs, ours = (model.transformer(ids, output_hidden_states=wanted).hidden_states for model in models[:2])
        if theirs is None:
            assert ours is None
            continue
        assert [state is None for state in theirs] == [state is None for state in ours]
        for one, other in zip(ours, theirs, strict=True):
            if one is not None:
                close(one, other)


def test_hidden_states_of_other_meaning_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases in which the argument is a flag, or counts otherwise, get what they mean by it."""
    monkeypatch.setattr(state, "_SELECTS_HIDDEN_STATES", False)
    models = pair(1, "GPT2LMHeadModel", n_layer=3)
    ids = random_ids(models.plain, 1, 5)
    # 4.57 takes whatever is true for the flag: so does alula there, and has nothing to leave.
    left = pytest.warns(UserWarning, match="output_hidden_states that is no flag") if IS_5 else nullcontext()
    with left:
        ours = models.fast(ids, output_hidden_states=1).hidden_states
    theirs = models.plain(ids, output_hidden_states=1).hidden_states
    assert [given is None for given in theirs] == [given is None for given in ours]
    assert models.report.fast_calls == (0 if IS_5 else 1)
    models.fast(ids, output_hidden_states=True)
    assert models.report.fast_calls == (1 if IS_5 else 2)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_cache_or_none(cls: str, use_cache: bool) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 1, 5)
    plain, fast = (model(ids, use_cache=use_cache).past_key_values for model in models[:2])
    assert (plain is None) == (fast is None) == (not use_cache)
    if use_cache:
        assert int(fast.get_seq_length()) == 5


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_inputs(cls: str) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 6)
    embeds = models.plain.transformer.wte(ids)
    for inputs in (
        {"input_ids": ids, "token_type_ids": ids.flip(1)},
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "position_ids": torch.arange(6)[None] + 3},
        {"input_ids": ids, "position_ids": torch.tensor([[5, 3, 8, 1, 0, 2]]), "attention_mask": torch.ones(2, 6)},
        {"input_ids": ids, "logits_to_keep": 2},
    ):
        if "logits_to_keep" in inputs and not IS_5 and cls != "GPT2LMHeadModel":
            continue
        close(*(model(**inputs).logits for model in models[1::-1]))
    models.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("steps", [(5, 1, 1), (3, 4, 2), (1, 1, 5)])
def test_in_steps(cls: str, steps: tuple[int, ...]) -> None:
    """Columns given in steps, with left padding, equal the plain model's."""
    models = pair(2, cls)
    ids = random_ids(models.plain, 3, sum(steps))
    mask = left_padded(ids)
    mask[:, sum(steps) - 1] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [None, None]
    start = 0
    for count in steps:
        end = start + count
        outputs = [
            model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            for model, cache in zip(models[:2], caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        close(outputs[1].logits, outputs[0].logits, mask[:, start:end])
        start = end
    for ours, theirs in zip(*(decoder_cache(cache).layers for cache in caches[::-1]), strict=True):
        assert ours.keys.shape == theirs.keys.shape
        real = mask.bool()[:, None, :, None].expand(theirs.keys.shape)
        assert (ours.keys - theirs.keys)[real].abs().max() < 1e-4
        assert (ours.values - theirs.values)[real].abs().max() < 1e-4
    models.prove(len(steps))


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_four_dimensions(cls: str, kind: str) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 6)
    visible = torch.tril(torch.ones(6, 6)).bool()[None, None].repeat(2, 1, 1, 1)
    visible[0, 0, 4, 1:3] = False
    visible[1, 0, 2, 5] = IS_5 or cls == "CodeGenForCausalLM"  # eager GPT-2 in 4.57 adds its own causal limit
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    mask[1, 0, 3, 0] = 0.75
    fast = models.fast(ids, attention_mask=visible if kind == "bool" else mask, use_cache=False).logits
    if kind == "bool":  # what eager attention makes of a bool mask is no mask at all
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    close(fast, models.plain(ids, attention_mask=mask, use_cache=False).logits)
    models.prove(1)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS if IS_5 else LANGUAGE_MODELS[:2])
def test_packed_sequences(cls: str) -> None:
    """Positions that start again, with no mask and no cache, keep sequences apart."""
    models = pair(2, cls)
    ids = random_ids(models.plain, 1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    plain, fast = (model(ids, position_ids=positions, use_cache=False).logits for model in models[:2])
    close(fast, plain)
    alone = models.fast(ids[:, 4:6], use_cache=False).logits
    close(fast[:, 4:6], alone)
    models.prove(2)


@pytest.mark.skipif(IS_5, reason="5.x has no head_mask")
@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_head_mask(cls: str, per_layer: bool) -> None:
    models = pair(2, cls)
    config = models.plain.config
    mask = torch.ones(config.n_layer, config.n_head)
    mask[-1, 0], mask[0, -1] = 0.0, 0.5
    given = mask if per_layer else mask[0]
    ids = random_ids(models.plain, 1, 6)
    if cls == "GPTBigCodeForCausalLM":  # the reference ignores it
        assert torch.isfinite(models.fast(ids, head_mask=given).logits).all()
        return
    close(models.fast(ids, head_mask=given).logits, models.plain(ids, head_mask=given).logits)
    models.prove(1)


def test_wrong_inputs_say_what_the_plain_model_says() -> None:
    models = pair(2, "GPT2LMHeadModel")
    ids = random_ids(models.plain, 1, 4)
    embeds = models.plain.transformer.wte(ids)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        said = []
        for model in models[:2]:
            with pytest.raises(ValueError) as error:
                model(**inputs)
            said.append(str(error.value))
        assert said[0] == said[1]
    with pytest.raises(IndexError):
        models.fast(torch.zeros(1, models.plain.config.n_positions + 1, dtype=torch.int64))
    cache = models.fast(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds"):
        models.fast(ids.repeat(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_threads_and_inference_mode(cls: str, threads: None) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 9)
    expected = models.fast(ids).logits
    torch.set_num_threads(2)
    with torch.inference_mode():
        out = models.fast(ids, use_cache=True)
        step = models.fast(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert torch.equal(out.logits, expected)
    again = models.fast(ids[:, :1], past_key_values=step.past_key_values, use_cache=True)
    assert torch.isfinite(again.logits).all()


def test_low_precision_is_no_worse_than_the_plain_model() -> None:
    for cls in LANGUAGE_MODELS:
        exact = hf_model(4, cls)
        ids = random_ids(exact, 2, 9)
        plain = copy.deepcopy(exact).to(torch.bfloat16)
        fast = copy.deepcopy(plain)
        at.accelerate(fast)
        reference = exact(ids).logits.double()
        budget = (plain(ids).logits.double() - reference).abs().max()
        assert (fast(ids).logits.double() - reference).abs().max() <= 2 * budget + 1e-3


def test_labels_and_items(tmp_path: Any) -> None:
    models = pair(2, "GPT2LMHeadModel")
    ids = random_ids(models.plain, 2, 6)
    losses = [model(ids, labels=ids, num_items_in_batch=7).loss for model in models[:2]]
    close(losses[1][None], losses[0][None])
    models.prove(1)
