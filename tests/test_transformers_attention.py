"""attn_implementation="alula": attention alone on alula, through transformers' own dispatch."""
# ruff: noqa: E402

from __future__ import annotations

import copy
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from alula import ops
from alula.integrations.transformers import attention
from decoder_cases import hf_model, padding_mask, random_ids
from transformers_cases import IS_5, close, left_padded

MODELS = ("GPTBigCodeForCausalLM", "GPT2LMHeadModel")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Of each call of alula's attention: heads of the query, heads of the cache, whether keys were read in place."""
    seen: list[tuple[int, int, bool]] = []
    real = ops.attention

    def counted(q: torch.Tensor, kv_cache: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((q.shape[2], kv_cache.shape[1], kv_cache.is_contiguous()))
        return real(q, kv_cache, *args, **kwargs)

    monkeypatch.setattr(ops, "attention", counted)
    return seen


def two(cls: str, seed: int = 2, **fixed: Any) -> tuple[Any, Any]:
    plain = hf_model(seed, cls, **fixed)
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("alula")
    return plain, ours


def test_the_name() -> None:
    assert all(part not in attention.NAME for part in ("flash", "sdpa", "flex_attention", "/"))


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_forward(cls: str, seed: int, padding: str, calls: list) -> None:
    plain, ours = two(cls, seed)
    ids = random_ids(plain, 3, 9)
    mask = padding_mask(padding, 3, 9)
    close(ours(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits, mask)
    kv_heads = 1 if getattr(plain.config, "multi_query", False) else plain.config.n_head
    assert [call[:2] for call in calls] == [(plain.config.n_head, kv_heads)] * plain.config.n_layer


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("mode", ["greedy", "beams", "static", "lookup", "chunked"])
@pytest.mark.parametrize("merged", [False, True], ids=["its cache", "merged cache"])
def test_generate(cls: str, mode: str, merged: bool, calls: list) -> None:
    plain, ours = two(cls)
    ids = random_ids(plain, 2, 9)
    arguments: dict[str, Any] = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "static": {"cache_implementation": "static"},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "chunked": {"prefill_chunk_size": 4},
    }[mode]
    arguments = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 3, "eos_token_id": 0, **arguments}
    if mode == "lookup":
        ids = ids[:1].repeat(1, 2)
    else:
        arguments["attention_mask"] = left_padded(ids)
    expected = plain.generate(ids, **arguments)
    if merged:
        arguments.pop("cache_implementation", None)
        cache = at.make_cache(plain.config, 24 if mode == "static" else None)
        if mode == "static" and not IS_5:
            pytest.skip("4.57 reads the length of a static cache off transformers' own layers")
        arguments["past_key_values"] = cache
    assert torch.equal(ours.generate(ids, **arguments), expected)
    assert calls
    kv_heads = 1 if getattr(plain.config, "multi_query", False) else plain.config.n_head
    assert {call[1] for call in calls} == {kv_heads}


def test_cross_attention(calls: list) -> None:
    from decoder_cases import randomise

    config = transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=2, vocab_size=50, n_positions=32, add_cross_attention=True, is_decoder=True
    )
    config._attn_implementation = "eager"
    plain = transformers.GPT2LMHeadModel(config).eval()
    randomise(plain, 3)
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation("alula")
    ids, states = random_ids(plain, 2, 5), torch.randn(2, 4, 32)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for given in (None, mask):
        inputs = {"encoder_hidden_states": states, "encoder_attention_mask": given}
        close(ours(ids, **inputs).logits, plain(ids, **inputs).logits)
    assert len(calls) == 2 * 2 * 2


def test_from_pretrained(tmp_path: Any, calls: list) -> None:
    plain, _ = two("GPTBigCodeForCausalLM")
    plain.save_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="alula")
    ids = random_ids(plain, 1, 6)
    close(ours(ids).logits, plain(ids).logits)
    assert calls


def test_accelerates_on_top() -> None:
    plain, ours = two("GPT2LMHeadModel")
    report = at.accelerate(ours)
    ids = random_ids(plain, 2, 6)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3, "attention_mask": left_padded(ids)}
    assert torch.equal(ours.generate(ids, **arguments), plain.generate(ids, **arguments))
    assert report.fast_calls
    assert not report.plain_calls


def test_gradients_and_dropout_are_refused() -> None:
    _, ours = two("GPT2LMHeadModel")
    ids = random_ids(ours, 1, 4)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward"):
        ours(ids)
    with pytest.raises(RuntimeError, match="no dropout"):
        ours.train()(ids)


@pytest.mark.skipif(not IS_5, reason="4.57 never looks the name up for CodeGen, and runs its own attention")
def test_codegen_is_refused() -> None:
    model = copy.deepcopy(hf_model(2, "CodeGenForCausalLM"))
    model.config._attn_implementation = "alula"
    with pytest.raises(ValueError, match=r"CodeGen has no attention dispatch.*accelerate\(model\)"):
        model(random_ids(model, 1, 4))


def test_big_bird_is_refused() -> None:
    config = transformers.BigBirdConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=32, vocab_size=50, sep_token_id=2
    )
    config._attn_implementation = "alula"
    model = transformers.BigBirdModel(config).eval()
    if not IS_5:
        pytest.skip("4.57 never looks the name up for BigBird, and runs its own attention")
    with pytest.raises(ValueError, match="BigBird has no attention dispatch"):
        model(torch.randint(4, 50, (1, 16)))


def test_packed_sequences() -> None:
    plain, ours = two("GPT2LMHeadModel")
    ids = random_ids(plain, 1, 7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    close(*(model(ids, position_ids=positions, use_cache=False).logits for model in (ours, plain)))
