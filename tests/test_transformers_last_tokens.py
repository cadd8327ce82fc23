"""logits_to_keep of accelerated language models: the last block of these tokens alone, and nobody else can tell."""
# ruff: noqa: E402

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula.integrations.transformers import last_tokens, versions
from decoder_cases import hf_model, random_ids
from torch import Tensor, nn
from transformers_cases import IS_5, LANGUAGE_MODELS, Pair, close, left_padded, pair, same_state, state_of

# Releases 4 of transformers have the argument in GPT-2 alone.
CLASSES = LANGUAGE_MODELS if IS_5 else ("GPT2LMHeadModel",)
TOKENS = 30


@pytest.fixture(params=CLASSES)
def models(request: Any) -> Iterator[Pair]:
    """A pair whose accelerated model has shortened no pass yet; no word is left behind for a later one."""
    made = pair(2, request.param)
    made.fast.transformer._alula.shortened = 0
    yield made
    assert last_tokens._word.get() is None


def shortened(models: Pair) -> int:
    return models.fast.transformer._alula.shortened


def same_cache(one: Any, other: Any) -> None:
    """Equal bits in every layer."""
    one, other = (getattr(cache, "self_attention_cache", cache) for cache in (one, other))
    assert one.get_seq_length() == other.get_seq_length()
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


# --- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "left"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_bits(models: Pair, count: int, padding: bool) -> None:
    """Of logits, of the cache, and of what a later pass makes of it."""
    ids = random_ids(models.plain, 2, TOKENS)
    inputs = {"attention_mask": left_padded(ids)} if padding else {}
    whole = models.fast(ids, use_cache=True, **inputs)
    kept = models.fast(ids, use_cache=True, logits_to_keep=count, **inputs)
    assert shortened(models) == 1
    assert torch.equal(kept.logits, whole.logits[:, -count:])
    same_cache(kept.past_key_values, whole.past_key_values)
    after = [models.fast(ids[:, :1], past_key_values=run.past_key_values).logits for run in (kept, whole)]
    assert torch.equal(*after)
    real = left_padded(ids)[:, -count:] if padding else None
    close(kept.logits, models.plain(ids, logits_to_keep=count, **inputs).logits, real)
    models.prove()


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"labels": True},
        {"return_dict": False},
        {"inputs_embeds": True},
        {"token_type_ids": True},
        {"position_ids": True},
        {"output_attentions": True},
        {"dtype": torch.bfloat16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_equal_bits_with(models: Pair, options: dict[str, Any]) -> None:
    model, ids = models.fast, random_ids(models.plain, 2, TOKENS)
    inputs: dict[str, Any] = {"input_ids": ids, **options}
    if inputs.pop("dtype", None):
        model = copy.deepcopy(model).to(torch.bfloat16)
    if "labels" in inputs:
        inputs["labels"] = ids[:, -3:]
    if inputs.pop("inputs_embeds", None):
        inputs["inputs_embeds"] = model.transformer.wte(inputs.pop("input_ids"))
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = ids % 2
    if "position_ids" in inputs:  # two sequences in a row, or moved ones
        inputs["position_ids"] = torch.cat([torch.arange(11), torch.arange(TOKENS - 11)])[None].expand(2, -1)
        inputs["use_cache"] = False
    if options.get("output_attentions"):
        model.set_attn_implementation("eager")
    labels = inputs.pop("labels", None)
    whole = model(**inputs)
    if labels is not None:
        inputs["labels"] = labels
    kept = model(logits_to_keep=3, **inputs)
    assert model.transformer._alula.shortened == 1
    if options.get("return_dict") is False:
        assert type(kept) is tuple
        assert torch.equal(kept[0], whole[0][:, -3:])
        return
    assert torch.equal(kept.logits, whole.logits[:, -3:])
    for ours, theirs in zip(kept.attentions or (), whole.attentions or (), strict=True):
        assert torch.equal(ours, theirs)
    if labels is not None:
        close(kept.loss[None], models.plain(logits_to_keep=3, **inputs).loss[None])


def test_in_pieces_and_with_a_static_cache(models: Pair) -> None:
    ids = random_ids(models.plain, 2, TOKENS)
    expected = models.plain(ids).logits
    for cache in (transformers.DynamicCache(config=models.fast.config), at.make_cache(models.fast.config, 40)):
        for start, end in ((0, 11), (11, 17), (17, TOKENS)):
            extra = {} if IS_5 else {"cache_position": torch.arange(start, end)}
            out = models.fast(ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=2, **extra)
            close(out.logits, expected[:, end - 2 : end])
    assert shortened(models) == 6
    models.prove()


@pytest.mark.parametrize("count", [0, TOKENS, TOKENS + 5, -4, torch.tensor([1, 4])], ids=str)
def test_other_counts_are_left_to_transformers(models: Pair, count: Any) -> None:
    ids = random_ids(models.plain, 2, TOKENS)
    close(models.fast(ids, logits_to_keep=count).logits, models.plain(ids, logits_to_keep=count).logits)
    assert shortened(models) == 0
    models.prove()


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prompt_lookup_num_tokens": 3, "eos_token_id": 0},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=["greedy", "beams", "static", "lookup", "sampling", "hidden states"],
)
def test_generate(models: Pair, how: dict[str, Any]) -> None:
    ids = random_ids(models.plain, 1 if "prompt_lookup_num_tokens" in how else 2, 9)
    inputs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "pad_token_id": 3, **how}
    found = []
    for model in models[:2]:
        torch.manual_seed(5)
        found.append(model.generate(ids, **inputs))
    if "return_dict_in_generate" in how:
        for ours, theirs in zip(found[1].hidden_states, found[0].hidden_states, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                close(one, other)
        found = [out.sequences for out in found]
    assert torch.equal(*found)
    assert (shortened(models) == 0) == ("output_hidden_states" in how)
    models.prove()


# --- nobody else can tell -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [True, 1, [-1]] if versions.selects_hidden_states() else [True], ids=str)
def test_hidden_states_are_those_of_all_tokens(models: Pair, chosen: Any) -> None:
    ids = random_ids(models.plain, 2, TOKENS)
    ours, theirs = (model(ids, logits_to_keep=2, output_hidden_states=chosen) for model in (models.fast, models.plain))
    close(ours.logits, theirs.logits)
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)
    assert shortened(models) == 0
    models.prove()


def test_hidden_states_by_the_configuration(models: Pair) -> None:
    ids = random_ids(models.plain, 1, TOKENS)
    model = copy.deepcopy(models.fast)
    model.config.output_hidden_states = True
    assert all(state.shape[1] == TOKENS for state in model(ids, logits_to_keep=1).hidden_states)
    model.config.output_hidden_states = False
    assert model(ids, logits_to_keep=1).hidden_states is None
    assert model.transformer._alula.shortened == 1


def test_the_decoder_itself_gives_all_tokens(models: Pair) -> None:
    """Called by itself, before and after, and with the argument that is none of its own."""
    ids = random_ids(models.plain, 2, TOKENS)
    expected = models.plain.transformer(ids).last_hidden_state
    for _ in range(2):
        close(models.fast.transformer(ids).last_hidden_state, expected)
        assert models.fast(ids, logits_to_keep=1).logits.shape[1] == 1
    with pytest.warns(UserWarning, match="logits_to_keep is not known to alula"):
        close(models.fast.transformer(ids, logits_to_keep=1).last_hidden_state, expected)
    assert shortened(models) == 2


def hook_on_decoder(model: Any, seen: list[Tensor]) -> Any:
    return model.transformer.register_forward_hook(lambda *args: seen.append(args[-1][0]))


def hook_on_all(model: Any, seen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module is model.transformer:
            seen.append(output[0])

    return torch.nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.parametrize("register", [hook_on_decoder, hook_on_all])
def test_hooks_see_all_tokens(models: Pair, register: Any) -> None:
    ids, seen = random_ids(models.plain, 2, TOKENS), []
    handle = register(models.fast, seen)
    try:
        close(models.fast(ids, logits_to_keep=2).logits, models.plain(ids).logits[:, -2:])
    finally:
        handle.remove()
    close(seen[0], models.plain.transformer(ids).last_hidden_state)
    assert shortened(models) == 0
    models.fast(ids, logits_to_keep=2)
    assert shortened(models) == 1
    models.prove()


def test_other_calls_during_a_pass_give_all_tokens(models: Pair) -> None:
    """A hook inside the pass, another thread, another model: only the pass that was asked for is shortened."""
    ids, seen, model = random_ids(models.plain, 2, TOKENS), [], models.fast
    other = copy.deepcopy(model)

    def hook(*_: Any) -> None:
        handle.remove()
        seen.append(model.transformer(ids).last_hidden_state)
        seen.append(other.transformer(ids).last_hidden_state)
        thread = threading.Thread(target=lambda: seen.append(model.transformer(ids).last_hidden_state))
        thread.start()
        thread.join()

    handle = model.transformer.wte.register_forward_hook(hook)
    close(model(ids, logits_to_keep=2).logits, models.plain(ids).logits[:, -2:])
    assert len(seen) == 3
    for state in seen:
        close(state, models.plain.transformer(ids).last_hidden_state)
    assert (shortened(models), other.transformer._alula.shortened) == (1, 0)


def test_calls_that_transformers_blocks_run(models: Pair) -> None:
    """A hook inside the blocks, which even calls the decoder again."""
    ids, seen = random_ids(models.plain, 2, TOKENS), []
    model = copy.deepcopy(models.fast)

    def hook(*_: Any) -> None:
        handle.remove()
        seen.append(model.transformer(ids).last_hidden_state)

    handle = model.transformer.h[0].register_forward_hook(hook)
    with pytest.warns(UserWarning, match="forward hook"):
        close(model(ids, logits_to_keep=2, use_cache=False).logits, models.plain(ids).logits[:, -2:])
    close(seen[0], models.plain.transformer(ids).last_hidden_state)
    assert model.transformer._alula.shortened == 0


def test_a_decoder_in_other_hands(models: Pair) -> None:
    """Another forward over the decoder's, another over the language model's, another class's: each sees all tokens."""
    ids = random_ids(models.plain, 2, TOKENS)
    expected = models.plain(ids).logits[:, -2:]
    model = copy.deepcopy(models.fast)
    below, seen = model.transformer.forward, []

    def watch(*args: Any, **kwargs: Any) -> Any:
        out = below(*args, **kwargs)
        seen.append(out[0])
        return out

    model.transformer.forward = watch
    close(model(ids, logits_to_keep=2).logits, expected)
    assert seen[0].shape[1] == TOKENS

    model = copy.deepcopy(models.plain)
    theirs = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), model)
    model.forward = theirs
    report = at.accelerate(model)
    assert not any(item.what == "forward" for item in report.replaced)
    close(model(ids, logits_to_keep=2).logits, expected)
    assert model.transformer._alula.shortened == 0
    at.restore(model)
    assert model.forward is theirs


def test_a_subclass_with_a_forward_of_its_own() -> None:
    class Doubled(transformers.GPT2LMHeadModel):
        def forward(self, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
            return 2 * self.lm_head(self.transformer(ids)[0])[:, -logits_to_keep:]

    plain = hf_model(3, "GPT2LMHeadModel")
    model = copy.deepcopy(plain)
    model.__class__ = Doubled
    at.accelerate(model)
    ids = random_ids(plain, 1, 9)
    assert "forward" not in model.__dict__
    close(model(ids, logits_to_keep=2), 2 * plain(ids).logits[:, -2:])


def test_encoder_states_are_looked_at_by_all_tokens() -> None:
    models = pair(2, "GPT2LMHeadModel", add_cross_attention=True)
    models.fast.transformer._alula.shortened = 0
    ids = random_ids(models.plain, 2, TOKENS)
    states = torch.randn(2, 5, models.plain.config.n_embd)
    whole, kept = (models.fast(ids, encoder_hidden_states=states, logits_to_keep=count) for count in (0, 2))
    assert torch.equal(kept.logits, whole.logits[:, -2:])
    assert models.fast.transformer._alula.shortened == 0
    models.prove()


def test_a_class_that_was_patched_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pair(2, "GPT2LMHeadModel")
    models.fast.transformer._alula.shortened = 0
    ids = random_ids(models.plain, 2, TOKENS)

    def patched(self: nn.Module, ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        return self.transformer(ids)[0]

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", patched)
    close(models.fast(ids, logits_to_keep=2), models.plain(ids))
    assert models.fast.transformer._alula.shortened == 0


def test_more_than_rows_of_tokens() -> None:
    """GPT-2 takes ids [B, N, T], and then logits_to_keep counts what N counts."""
    models = pair(2, "GPT2LMHeadModel")
    models.fast.transformer._alula.shortened = 0
    ids = random_ids(models.plain, 6, 9).view(2, 3, 9)
    close(models.fast(ids, logits_to_keep=1).logits, models.plain(ids, logits_to_keep=1).logits)
    assert models.fast.transformer._alula.shortened == 0
    models.prove()


@pytest.mark.skipif(IS_5, reason="releases 5 have the argument in all three classes")
@pytest.mark.parametrize("cls", ["GPTBigCodeForCausalLM", "CodeGenForCausalLM"])
def test_classes_without_the_argument(cls: str) -> None:
    models = pair(2, cls)
    ids = random_ids(models.plain, 2, 9)
    assert "forward" not in models.fast.__dict__
    close(models.fast(ids, logits_to_keep=2).logits, models.plain(ids, logits_to_keep=2).logits)


# --- life of the forward --------------------------------------------------------------------------------------------


def test_put_on_once_and_taken_off(models: Pair) -> None:
    model = copy.deepcopy(models.plain)
    before = state_of(model)
    report = at.accelerate(model)
    assert [item.where for item in report.replaced if item.what == "forward"] == [""]
    assert "the decoder is told logits_to_keep" in str(report)
    assert inspect.signature(model.forward) == inspect.signature(models.plain.forward)
    assert model.forward.__self__ is model
    first = model.__dict__["forward"]
    assert at.accelerate(model).replaced == report.replaced
    assert model.__dict__["forward"] is first
    at.restore(model)
    same_state(before, state_of(model))
    ids = random_ids(model, 1, 6)
    assert torch.equal(first(ids, logits_to_keep=2).logits, model(ids, logits_to_keep=2).logits)  # kept by somebody


@pytest.mark.parametrize("place", ["wpe", "ln_f", "lm_head"])
def test_a_call_that_fails_leaves_nothing(models: Pair, place: str) -> None:
    if place == "wpe" and not hasattr(models.fast.transformer, "wpe"):
        place = "wte"
    ids, model = random_ids(models.plain, 2, TOKENS), copy.deepcopy(models.fast)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    owner = model if place == "lm_head" else model.transformer
    handle = getattr(owner, place).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"), warns_if(place == "ln_f"):
        model(ids, logits_to_keep=2)
    handle.remove()
    assert last_tokens._word.get() is None
    close(model.transformer(ids).last_hidden_state, models.plain.transformer(ids).last_hidden_state)


def test_a_call_that_is_refused_leaves_nothing(models: Pair) -> None:
    """Before the decoder takes the word, which is for no other decoder."""
    ids, model = random_ids(models.plain, 2, TOKENS), copy.deepcopy(models.fast)
    decoder, other = models.fast.transformer._alula, model.transformer._alula
    model.double()
    with pytest.raises(ValueError, match="changed into what alula cannot run"):
        model(ids, logits_to_keep=2)
    assert last_tokens._word.get() is None
    token = last_tokens._word.set((decoder, 2))
    assert [last_tokens.take(asks) for asks in (other, decoder, decoder)] == [0, 2, 0]
    last_tokens._word.reset(token)


def warns_if(expected: bool) -> Any:
    return pytest.warns(UserWarning, match="forward hook") if expected else contextlib.nullcontext()


def test_copies_and_pickles(models: Pair, tmp_path: Any) -> None:
    ids = random_ids(models.plain, 2, TOKENS)
    expected = models.plain(ids).logits[:, -2:]
    twin = copy.deepcopy(models.fast)
    assert twin.forward.__self__ is twin
    close(twin(ids, logits_to_keep=2).logits, expected)
    assert (twin.transformer._alula.shortened, shortened(models)) == (1, 0)
    try:
        torch.save(models.fast, tmp_path / "model.pt")
    except AttributeError as error:  # 5.17 leaves hooks on a model that no pickle holds
        with pytest.raises(AttributeError):
            torch.save(models.plain, tmp_path / "model.pt")
        pytest.skip(f"the plain model has no pickle either: {error}")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    close(again(ids, logits_to_keep=2).logits, expected)
    at.accelerate(again)
    close(again(ids, logits_to_keep=2).logits, expected)
    assert again.transformer._alula.shortened == 1
    at.restore(torch.load(tmp_path / "model.pt", weights_only=False))
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    at.restore(loaded)
    assert "forward" not in loaded.__dict__
    close(loaded(ids, logits_to_keep=2).logits, expected)


def test_weights_given_up() -> None:
    model = copy.deepcopy(hf_model(2, "GPT2LMHeadModel"))
    plain = copy.deepcopy(model)
    at.accelerate(model, keep_weights=False)
    ids = random_ids(plain, 2, TOKENS)
    close(model(ids, logits_to_keep=2).logits, plain(ids).logits[:, -2:])
    assert model.transformer._alula.shortened == 1


def test_compiled(models: Pair) -> None:
    """One graph for the language model; or the decoder alone compiled, in an eager language model: all tokens."""
    ids = random_ids(models.plain, 2, TOKENS)
    expected = models.plain(ids).logits[:, -2:]
    torch._dynamo.reset()
    try:
        whole, outer = copy.deepcopy(models.fast), copy.deepcopy(models.fast)
        compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
        close(compiled(ids, logits_to_keep=2).logits, expected)
        outer.transformer.compile(fullgraph=True, backend="aot_eager")
        close(outer(ids, logits_to_keep=2).logits, expected)
        assert last_tokens._word.get() is None
    finally:
        torch._dynamo.reset()
    assert (whole.transformer._alula.shortened, outer.transformer._alula.shortened) == (0, 0)
