"""Every way of ``generate`` gives the plain model's tokens and scores on an accelerated one."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import torch
from decoder_cases import random_ids
from transformers_cases import IS_5, LANGUAGE_MODELS, TOLERANCE, Pair, left_padded, pair

MODES = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 3},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
}


def both(models: Pair, ids: torch.Tensor, **arguments) -> tuple:
    outputs = []
    for model in (models.plain, models.fast):
        torch.manual_seed(5)
        values = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 3, "eos_token_id": None, **arguments}
        outputs.append(
            model.generate(ids, return_dict_in_generate=True, output_scores=True, output_logits=True, **values)
        )
    return tuple(outputs)


def same(plain, fast) -> None:
    assert torch.equal(plain.sequences, fast.sequences)
    for kind in ("scores", "logits"):
        theirs, ours = getattr(plain, kind), getattr(fast, kind)
        assert (theirs is None) == (ours is None)
        for one, other in zip(theirs or (), ours or (), strict=True):
            finite = one.isfinite()
            assert torch.equal(finite, other.isfinite())
            assert (one - other)[finite].abs().max() <= TOLERANCE
    if getattr(plain, "sequences_scores", None) is not None:
        assert torch.allclose(plain.sequences_scores, fast.sequences_scores, atol=TOLERANCE)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_modes(cls: str, mode: str, padded: bool) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 9)
    mask = left_padded(ids) if padded else torch.ones_like(ids)
    plain, fast = both(models, ids, attention_mask=mask, **MODES[mode])
    same(plain, fast)
    models.prove()


@pytest.mark.parametrize("multi_query", [True, False])
def test_both_kinds_of_gpt_bigcode(multi_query: bool) -> None:
    models = pair(5, multi_query=multi_query)
    ids = random_ids(models.plain, 3, 11)
    same(*both(models, ids, attention_mask=left_padded(ids), num_beams=2))
    models.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_assisted(cls: str, sample: bool) -> None:
    models = pair(2, cls)
    helper = pair(6, cls, vocab_size=models.plain.config.vocab_size)
    ids = random_ids(models.plain, 1, 9).repeat(1, 2)
    outputs = []
    for model, assistant in ((models.plain, helper.plain), (models.fast, helper.fast)):
        torch.manual_seed(3)
        assistant.generation_config.num_assistant_tokens = 4
        arguments = {"max_new_tokens": 14, "do_sample": sample, "pad_token_id": 3, "eos_token_id": 0}
        outputs.append(model.generate(ids, assistant_model=assistant, **arguments))
    assert torch.equal(*outputs)
    models.prove()
    helper.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_prompt_lookup(cls: str) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 1, 6).repeat(1, 3)
    same(*both(models, ids, prompt_lookup_num_tokens=4, max_new_tokens=16, eos_token_id=0))
    models.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_attentions_and_hidden_states(cls: str) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 7)
    plain, fast = both(models, ids, output_attentions=True, output_hidden_states=True)
    same(plain, fast)
    for kind in ("attentions", "hidden_states"):
        for step, other in zip(getattr(plain, kind), getattr(fast, kind), strict=True):
            for one, ours in zip(step, other, strict=True):
                assert one.shape == ours.shape
                assert (one - ours).abs().max() <= TOLERANCE
    models.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_from_embeddings(cls: str) -> None:
    models = pair(2, cls)
    embeds = models.plain.get_input_embeddings()(random_ids(models.plain, 2, 7))
    tokens = [
        model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, pad_token_id=3, eos_token_id=None)
        for model in (models.plain, models.fast)
    ]
    assert torch.equal(*tokens)
    models.prove()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_continues_a_cache(cls: str, fixed: bool) -> None:
    """A cache kept from one call serves the next; the tokens are those of one long call."""
    import alula.integrations.transformers as at

    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 7)
    arguments = {"do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    whole = models.plain.generate(ids, max_new_tokens=12, **arguments)
    cache = at.make_cache(models.fast.config, 40 if fixed else None)
    first = models.fast.generate(ids, max_new_tokens=5, past_key_values=cache, **arguments)
    assert int(cache.get_seq_length()) == 7 + 5 - 1
    again = models.fast.generate(first, max_new_tokens=7, past_key_values=cache, **arguments)
    assert torch.equal(again, whole)
    models.prove()


def test_contrastive_search_by_hand() -> None:
    """What contrastive search asks of a cache: rows repeated, one of each group kept, the last column dropped."""
    results = []
    models = pair(2, "GPT2LMHeadModel")
    ids = random_ids(models.plain, 2, 6)
    for model in (models.plain, models.fast):
        out = model(ids, use_cache=True)
        cache, tokens = out.past_key_values, []
        for _ in range(5):
            top = out.logits[:, -1].topk(3).indices
            cache.batch_repeat_interleave(3)
            tried = model(top.view(-1, 1), past_key_values=cache, use_cache=True)
            best = tried.logits[:, -1].max(-1).values.view(-1, 3).argmin(1)
            chosen = best + 3 * torch.arange(2)
            cache.batch_select_indices(chosen)
            cache.crop(-1)
            token = top.gather(1, best[:, None])
            out = model(token, past_key_values=cache, use_cache=True)
            tokens.append(token)
        results.append(torch.cat(tokens, 1))
    assert torch.equal(*results)
    models.prove()


@pytest.mark.filterwarnings("ignore:alula. .* the cache offloads its layers")
@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_offloaded_cache_is_as_on_the_plain_model(cls: str) -> None:
    """Offloading needs a GPU: both say so, in the same words."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    models = pair(2, cls)
    said = []
    for model in (models.plain, models.fast):
        with pytest.raises((AssertionError, RuntimeError, ValueError)) as error:
            model.generate(random_ids(model, 1, 5), max_new_tokens=3, cache_implementation="offloaded")
        said.append(str(error.value))
    assert not models.report.fast_calls  # a torch that is built for CUDA fails before the first pass
    offloads = {"the cache offloads its layers": 1}
    assert models.report.plain_calls in ([offloads, {}] if torch.backends.cuda.is_built() else [offloads])
    assert said[0] == said[1]


def test_streamer_and_stopping() -> None:
    from transformers import StoppingCriteriaList

    class Keeps:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    models = pair(2)
    ids = random_ids(models.plain, 1, 6)
    seen = []
    for model in (models.plain, models.fast):
        keeps = Keeps()
        stop = StoppingCriteriaList([lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 11])])
        model.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=3,
            eos_token_id=None,
            streamer=keeps,
            stopping_criteria=stop,
        )
        seen.append(keeps.seen)
    assert seen[0] == seen[1]
    models.prove()


@pytest.mark.skipif(not IS_5, reason="4.57 compares with no eos token")
def test_prompt_lookup_without_end() -> None:
    models = pair(2)
    ids = random_ids(models.plain, 1, 6).repeat(1, 3)
    same(*both(models, ids, prompt_lookup_num_tokens=4))
