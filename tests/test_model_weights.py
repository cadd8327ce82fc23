"""The weights of a model in memory: read as transformers has them, written by assignment, never trained."""

from __future__ import annotations

import copy
import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from alula.config import CodeGenConfig, GPT2Config, GPTBigCodeConfig
from alula.models import AutoModelForCausalLM, GPTBigCodeForCausalLM, GPTBigCodeForTokenClassification
from decoder_cases import TOLERANCE, alula_model, hf_model, random_ids, random_values, worst


@pytest.mark.parametrize("seed", range(6))
def test_state_dict_has_the_names_layout_and_bits_of_transformers(seed: int) -> None:
    reference = hf_model(seed)
    model = alula_model(reference)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.num_parameters() == reference.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == reference.num_parameters(exclude_embeddings=True)
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in reference.named_parameters()}
    assert {n for n, _ in model.transformer.h.named_parameters()} == {
        n for n, _ in reference.transformer.h.named_parameters()
    }
    if reference.config.tie_word_embeddings:
        assert model.lm_head.stored("weight").data is model.transformer.wte.stored("weight").data
        assert ours["lm_head.weight"] is ours["transformer.wte.weight"]
    wrapper = torch.nn.Module()  # inside a module of somebody else's
    wrapper.inner = model
    state = wrapper.state_dict()
    assert set(state) == {f"inner.{name}" for name in ours}
    state["inner.transformer.ln_f.bias"] = state["inner.transformer.ln_f.bias"] + 1
    wrapper.load_state_dict(state)
    assert torch.equal(model.transformer.ln_f.bias, theirs["transformer.ln_f.bias"] + 1)


def test_change_of_dtype_repacks() -> None:
    reference = hf_model(13)
    model = alula_model(reference)
    ids = random_ids(model, 1, 8)
    before = model(ids).logits
    assert model.to(torch.bfloat16) is model
    assert model.dtype == torch.bfloat16
    direct = alula_model(copy.deepcopy(reference).bfloat16(), torch.bfloat16)
    assert torch.equal(model(ids).logits, direct(ids).logits)
    assert model(ids).past_key_values.dtype == torch.bfloat16
    model.float()
    assert model.dtype == torch.float32
    assert 0 < worst(model(ids).logits, before) < 0.3
    assert model.half().dtype == torch.float16
    assert model.to("cpu").dtype == torch.float16


def test_copies_and_pickles_compute_the_same_and_are_independent() -> None:
    model = alula_model(hf_model(14, tie_word_embeddings=True))
    ids = random_ids(model, 1, 8)
    before = model(ids).logits
    twin, back = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, back):
        assert torch.equal(other(ids).logits, before)
        assert other.lm_head.stored("weight").data is other.transformer.wte.stored("weight").data
        other.transformer.wte.weight = torch.zeros_like(other.transformer.wte.weight)
        assert not other(ids).logits.any()
    assert torch.equal(model(ids).logits, before)


def test_assigned_weights_are_used() -> None:
    reference = copy.deepcopy(hf_model(3, multi_query=False, n_embd=48, n_head=2))
    model = alula_model(reference)
    ids = random_ids(model, 1, 8)
    model(ids)
    for theirs, ours in (
        (reference.transformer.h[0].attn.c_attn, model.transformer.h[0].attn.c_attn),
        (reference.transformer.ln_f, model.transformer.ln_f),
        (reference.transformer.wpe, model.transformer.wpe),
        (reference.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_fc),
    ):
        theirs.weight.data *= 0.5
        ours.weight = theirs.weight
        assert torch.equal(ours.weight, theirs.weight)
    assert worst(model(ids).logits, reference(ids).logits) <= TOLERANCE
    with pytest.raises(RuntimeError):  # a read weight is a copy: changing it must not pass in silence
        model.transformer.ln_f.weight.mul_(2)
    layer = model.transformer.h[0].mlp.c_fc
    x = torch.randn(3, 48)
    assert worst(layer(x), reference.transformer.h[0].mlp.c_fc(x)) <= 1e-5
    assert worst(model.transformer.ln_f(x), reference.transformer.ln_f(x)) <= 1e-5


def test_weights_that_change_while_they_are_bound_are_bound_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another thread: block 0 changes when block 1 is bound."""
    model = alula_model(hf_model(3, cls="GPT2LMHeadModel", n_layer=2))
    first, second = model.transformer.h
    ids = random_ids(model, 1, 5)
    bind = second.bind

    def bind_late() -> Any:
        monkeypatch.undo()
        first.ln_1.weight = torch.zeros_like(first.ln_1.weight)
        return bind()

    second.ln_1.weight = second.ln_1.weight  # nothing is bound any more
    monkeypatch.setattr(second, "bind", bind_late)
    before = model(ids).logits
    after = model(ids).logits
    assert torch.equal(after, copy.deepcopy(model)(ids).logits)
    assert not torch.equal(after, before)


WRITES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "an operator": lambda layer: operator.imul(layer.weight, 2),
    "an index": lambda layer: operator.setitem(layer.weight, 0, 1.0),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(layer.shapes["weight"])),
    "in data": lambda layer: layer.weight.data.zero_(),
    "in data's rows": lambda layer: operator.setitem(layer.weight.data, slice(1), 0.0),
    "in what is detached": lambda layer: layer.weight.detach().zero_(),
    "initialisation": lambda layer: torch.nn.init.normal_(layer.weight),
    "initialisation of data": lambda layer: torch.nn.init.zeros_(layer.bias.data),
    "a function": lambda layer: torch.relu_(layer.weight),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_writing_into_a_copy_of_a_weight_is_an_error(write: Callable[[Any], Any], mode: Callable[[], Any]) -> None:
    model = alula_model(hf_model(3, cls="GPT2LMHeadModel"))
    ids = random_ids(model, 1, 5)
    before = model(ids).logits
    with mode(), pytest.raises(RuntimeError, match=r"is a copy of a weight.*Assign"):
        write(model.transformer.h[0].mlp.c_fc)
    assert torch.equal(model(ids).logits, before)


def test_a_copy_of_a_weight_is_a_tensor_like_any_other() -> None:
    reference = hf_model(3, cls="GPT2LMHeadModel")
    model = alula_model(reference)
    for name, theirs in reference.named_parameters():
        ours = model.get_parameter(name)
        assert isinstance(ours, torch.nn.Parameter)
        assert not ours.requires_grad
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.data, theirs)
        for plain in (ours + 0, ours.clone(), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(plain) is torch.Tensor
            assert torch.equal(plain, theirs)
        assert torch.equal(torch.empty_like(theirs).copy_(ours), theirs)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == dict(reference.named_parameters()).keys()


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied: bool) -> None:
    model = alula_model(hf_model(15, tie_word_embeddings=tied, vocab_size=97))
    ids = random_ids(model, 2, 9)
    before, table, head = model(ids).logits, model.transformer.wte.weight, model.lm_head.weight
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    embeddings = model.resize_token_embeddings(101, pad_to_multiple_of=16)
    assert embeddings is model.get_input_embeddings()
    assert embeddings.num_embeddings == model.config.vocab_size == 112
    after = model(ids).logits
    assert after.shape[-1] == 112
    assert torch.equal(after[..., :97], before)
    assert torch.allclose(model.transformer.wte.weight[97:], table.mean(0), atol=1e-6)
    assert torch.allclose(model.lm_head.weight[97:], head.mean(0), atol=1e-6)
    model(torch.tensor([[111]]))
    model.resize_token_embeddings(50, mean_resizing=False)
    assert torch.equal(model.lm_head.weight, head[:50])
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    assert model.config.vocab_size == 64
    assert model.transformer.wte.weight[50:].std() < 0.1
    for wrong in ({"new_num_tokens": 0}, {"new_num_tokens": 9.5}, {"pad_to_multiple_of": -8}):
        with pytest.raises(ValueError, match="positive integer"):
            model.resize_token_embeddings(**wrong)
    assert model.config.vocab_size == 64


def test_set_embeddings() -> None:
    model = alula_model(hf_model(16, tie_word_embeddings=True, vocab_size=97))
    ids, width = random_ids(model, 1, 6), model.config.n_embd
    new = torch.nn.Embedding(97, width)
    model.set_input_embeddings(new)
    assert torch.equal(model.get_input_embeddings().weight, new.weight)
    assert torch.equal(model.get_output_embeddings().weight, new.weight)
    reference = copy.deepcopy(hf_model(16, tie_word_embeddings=True, vocab_size=97))
    reference.set_input_embeddings(new)
    reference.lm_head.weight = new.weight
    assert worst(model(ids).logits, reference(ids).logits) <= TOLERANCE
    head = torch.nn.Linear(width, 97, bias=False)
    model.set_output_embeddings(head)
    reference.set_output_embeddings(head)
    assert not model.config.tie_word_embeddings
    assert worst(model(ids).logits, reference(ids).logits) <= TOLERANCE
    assert torch.equal(model.get_input_embeddings().weight, new.weight)
    with pytest.raises(ValueError, match=rf"\[V, {width}\]"):
        model.set_input_embeddings(torch.nn.Embedding(97, width + 1))
    with pytest.raises(ValueError, match="96 rows"):
        model.set_output_embeddings(torch.zeros(96, width))
    assert GPTBigCodeForTokenClassification(model.config).get_output_embeddings() is None


SIZES = {"n_embd": 256, "n_head": 4, "n_layer": 2}
INITIALISED = {
    "multi-query": lambda: GPTBigCodeConfig(**random_values(0, **SIZES, multi_query=True)),
    "multi-head": lambda: GPTBigCodeConfig(**random_values(0, **SIZES, multi_query=False)),
    "GPT-2": lambda: GPT2Config(**random_values(0, "gpt2", **SIZES)),
    "CodeGen": lambda: CodeGenConfig(**random_values(0, "codegen", **SIZES)),
}


@pytest.mark.parametrize("make", INITIALISED.values(), ids=INITIALISED.keys())
def test_random_initialisation(make: Callable[[], Any]) -> None:
    config = make()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any()
        elif "ln_" in name:
            assert (value == 1).all()
        else:
            expected = 0.02 / (2 * 2) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            assert abs(value.float().std().item() - expected) < 0.1 * expected, name
    torch.manual_seed(3)
    again = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_decode_bytes_counts_what_a_step_reads() -> None:
    values = random_values(0, n_embd=64, n_head=2, n_layer=2, vocab_size=320, n_inner=None, multi_query=True)
    block = 64 * (64 + 64) + 64 * 64 + 2 * 64 * 256 + (128 + 64 + 256 + 64) + 4 * 64
    expected = 2 * block + 2 * 64 + 320 * 64
    for tied in (True, False):
        config = GPTBigCodeConfig(**{**values, "tie_word_embeddings": tied})
        for dtype in (torch.float32, torch.bfloat16):
            assert GPTBigCodeForCausalLM(config, dtype=dtype).decode_bytes() == expected * dtype.itemsize


def test_gradients_are_refused_and_never_silently_missing() -> None:
    model = alula_model(hf_model(1))
    ids = random_ids(model, 1, 5)
    with torch.enable_grad():
        assert not model(ids).logits.requires_grad
        model.train()
        with pytest.raises(RuntimeError, match="cannot train yet"):
            model(ids)
        with torch.no_grad():
            model(ids)
        model.eval()
        embeds = torch.randn(1, 5, model.config.n_embd, requires_grad=True)
        with pytest.raises(RuntimeError, match="no backward yet"):
            model(inputs_embeds=embeds)
        with torch.no_grad():
            assert model(inputs_embeds=embeds).logits.shape[1] == 5
        with pytest.raises(RuntimeError, match="no backward yet"):
            model.requires_grad_()
        model.requires_grad_(False)
        for _, weight in model.named_parameters():
            assert not weight.requires_grad
            with pytest.raises(RuntimeError):
                weight.requires_grad_(True)


def test_inference_mode_and_normal_mode_mix() -> None:
    model = alula_model(hf_model(2))
    ids = random_ids(model, 2, 9)
    with torch.inference_mode():
        cache = model(ids[:, :4]).past_key_values
    middle = model(ids[:, 4:5], past_key_values=cache)
    with torch.inference_mode():
        last = model(ids[:, 5:], past_key_values=cache).logits
    whole = model(ids).logits
    assert worst(torch.cat([middle.logits, last], 1), whole[:, 4:]) <= 1e-5
