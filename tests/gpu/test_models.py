"""The decoder families on a GPU: against transformers on the same GPU, and against themselves on the CPU."""

from pathlib import Path
from typing import Any

import alula
import alula.generation
import pytest
import torch
from alula import cuda_graph, devices
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
    sampled = {"do_sample": True, "seed": 4, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2}
    for options in ({}, sampled, {"eos_token_id": [3, 9, 30, 70]}):
        options = {"max_new_tokens": 24, "pad_token_id": 3, **options}
        for batch in (1, 3):
            ids = random_ids(ours, batch, 9).cuda()
            captured = ours.generate(ids, **options)
            assert torch.equal(ours.generate(ids, **options), captured), "the graph that was kept"
            with monkeypatch.context() as patch:
                patch.setattr("alula.cuda_graph.FEWEST_GRAPH_STEPS", 10**9)
                cuda_graph._pools.clear()
                assert torch.equal(ours.generate(ids, **options), captured)
                cuda_graph._pools.clear()


def test_one_graph_serves_every_length_and_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = alula_model(hf_model(5, "GPTBigCodeForCausalLM"))
    prompts = [random_ids(ours, batch, length) for batch, length in ((3, 9), (4, 2), (3, 30))]
    options = {"max_new_tokens": 12, "eos_token_id": [], "pad_token_id": 3}
    expected = [ours.generate(ids, **options) for ids in prompts]
    ours.to("cuda")
    captures = []
    capture = cuda_graph.DecodeStep._capture
    monkeypatch.setattr(
        cuda_graph.DecodeStep, "_capture", lambda self, *args: captures.append(self.rows) or capture(self, *args)
    )
    for ids, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(ours.generate(ids.cuda(), **options).cpu(), tokens)
    assert captures == [4]


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_unequal_prompts_and_seeds_equal_those_of_the_cpu(cls: str) -> None:
    """float32 logits of both devices differ by roundings: a draw falls between two tokens once in a million."""
    ours = alula_model(hf_model(4, cls))
    prompts = [[5, 17, 3], [12], [7, 7, 8, 9, 1, 1]]
    for options in ({}, {"do_sample": True, "seed": 8, "temperature": 0.8, "top_p": 0.9, "top_k": 40}):
        options = {"max_new_tokens": 16, "eos_token_id": [], "pad_token_id": 3, **options}
        expected = ours.to("cpu").generate(prompts, **options)
        assert torch.equal(ours.to("cuda").generate(prompts, **options).cpu(), expected)


def test_a_step_waits_for_nothing() -> None:
    """torch itself raises where an operation would wait for the device."""
    ours = alula_model(hf_model(5, "CodeGenForCausalLM")).to("cuda")
    sampled = {"do_sample": True, "seed": 4, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    for options in ({}, sampled):
        steps = alula.generation.Generation(ours, [[1, 2], [3, 4]], max_new_tokens=40, eos_token_id=[5], **options)
        for _ in range(3):
            next(steps)  # prompt, capture
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                steps._steps.queue()
        finally:
            torch.cuda.set_sync_debug_mode("default")


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


@pytest.mark.parametrize("cls", ["GPTBigCodeForCausalLM", "GPT2LMHeadModel"])
def test_wrong_ids_are_named_once_the_gpu_has_come_to_them(cls: str) -> None:
    ours = alula_model(hf_model(2, cls)).to("cuda")
    devices.raise_id_fault(ours.device)
    wrong, fine = torch.tensor([[1, 100_000]]).cuda(), torch.tensor([[1, 2]]).cuda()

    def calls() -> None:
        ours(wrong)  # it may know already at the end of the call
        torch.cuda.synchronize()
        ours(fine)

    with pytest.raises(ValueError, match="input_ids holds 100000; accepted: 0 to"):
        calls()
    assert ours(fine).logits.isfinite().all()
    with pytest.raises(ValueError, match="input_ids holds the id 100000"):
        ours.generate(wrong, max_new_tokens=2)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_positions_that_do_not_exist_are_named(cls: str) -> None:
    ours = alula_model(hf_model(2, cls)).to("cuda")
    limit = ours.config.max_position_embeddings

    def calls() -> None:
        ours(torch.tensor([[1, 2]]).cuda(), position_ids=torch.tensor([[0, limit]]).cuda())
        torch.cuda.synchronize()
        devices.raise_id_fault(ours.device)

    with pytest.raises(ValueError, match=rf"position_ids.* holds {limit}; accepted: 0 to {limit - 1}"):
        calls()


def test_inputs_and_caches_elsewhere_are_refused() -> None:
    ours = alula_model(hf_model(2, "GPTBigCodeForCausalLM")).to("cuda")
    ids = random_ids(ours, 1, 5)
    with pytest.raises(ValueError, match="input_ids is on cpu, the model on cuda:0"):
        ours(ids)
    with pytest.raises(ValueError, match="past_key_values is on cpu, the model on cuda:0"):
        ours(ids.cuda(), past_key_values=alula.KVCache(ours.config, 1, dtype=ours.dtype))
