"""The decoder families on a GPU: against transformers on the same GPU, and against themselves on the CPU."""

from pathlib import Path
from typing import Any

import alula
import pytest
import torch
from decoder_cases import LANGUAGE_MODELS, alula_model, hf_model, padding_mask, random_ids, worst


def pair(cls: str, seed: int) -> tuple[Any, Any]:
    """transformers' model and ours, float32, both on the GPU; ours of the same weights."""
    ours = alula_model(hf_model(seed, cls))
    theirs = hf_model(seed, cls)
    theirs.cuda()
    return theirs, ours.to("cuda")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_logits_equal_transformers(cls: str, seed: int) -> None:
    theirs, ours = pair(cls, seed)
    try:
        for batch, tokens, padding in ((1, 1, "none"), (3, 17, "none"), (3, 17, "right")):
            ids, mask = random_ids(ours, batch, tokens).cuda(), padding_mask(padding, batch, tokens)
            mask = None if mask is None else mask.cuda()
            expected = theirs(ids, attention_mask=mask).logits
            actual = ours(ids, attention_mask=mask).logits
            assert actual.device == ids.device
            real = None if mask is None else mask.cpu()
            assert worst(actual.cpu(), expected.cpu(), real) <= 1e-3
    finally:
        theirs.cpu()


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_steps_equal_one_pass(cls: str) -> None:
    ours = alula_model(hf_model(3, cls)).to("cuda")
    ids = random_ids(ours, 2, 20).cuda()
    whole = ours(ids).logits
    cache = ours.new_cache(2)
    steps = [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20)]
    assert worst(torch.cat(steps, 1).cpu(), whole.cpu()) <= 1e-3


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_tokens_equal_those_of_the_cpu(cls: str) -> None:
    ours = alula_model(hf_model(4, cls))
    ids = random_ids(ours, 2, 9)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    expected = ours.generate(ids, **options)
    actual = ours.to("cuda").generate(ids.cuda(), **options)
    assert actual.is_cuda
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_a_graph_gives_what_single_calls_give(cls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = alula_model(hf_model(5, cls)).to("cuda")
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 3}
    for batch in (1, 3):
        ids = random_ids(ours, batch, 9).cuda()
        captured = ours.generate(ids, **options)
        with monkeypatch.context() as patch:
            patch.setattr("alula.generation._FEWEST_GRAPH_STEPS", 10**9)
            assert torch.equal(ours.generate(ids, **options), captured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = alula_model(hf_model(2, "GPTBigCodeForCausalLM"), dtype)
    before = ours.state_dict()
    ours.to("cuda")
    assert ours.device.type == "cuda"
    for name, value in ours.state_dict().items():
        assert torch.equal(value.cpu(), before[name]), name
    ours.save_pretrained(tmp_path)
    again = alula.AutoModelForCausalLM.from_pretrained(tmp_path, device="cuda")
    assert again.device == ours.device
    ours.to("cpu")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_inputs_and_caches_elsewhere_are_refused() -> None:
    ours = alula_model(hf_model(2, "GPTBigCodeForCausalLM")).to("cuda")
    ids = random_ids(ours, 1, 5)
    with pytest.raises(ValueError, match="input_ids is on cpu, the model on cuda:0"):
        ours(ids)
    with pytest.raises(ValueError, match="past_key_values is on cpu, the model on cuda:0"):
        ours(ids.cuda(), past_key_values=alula.KVCache(ours.config, 1, dtype=ours.dtype))
