"""accelerate(model, keep_weights=False): the model's matrices are given up for the packed ones, and made again."""
# ruff: noqa: E402

from __future__ import annotations

import copy
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from decoder_cases import hf_model, random_ids
from torch import nn
from transformers_cases import LANGUAGE_MODELS, close

BIG_BIRD = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 70,
    "max_position_embeddings": 320,
    "block_size": 16,
    "num_random_blocks": 2,
    "sep_token_id": 2,
}
CLASSES = (*LANGUAGE_MODELS, "GPT2ForSequenceClassification", "BigBirdForMaskedLM")


def fresh(cls: str = "GPT2LMHeadModel", **fixed: Any) -> Any:
    if cls.startswith("BigBird"):
        torch.manual_seed(3)
        return getattr(transformers, cls)(transformers.BigBirdConfig(**BIG_BIRD)).eval()
    return copy.deepcopy(hf_model(3, cls, **fixed))


def bits(model: nn.Module) -> dict[str, tuple]:
    """Name -> (dtype, requires_grad, values) of every parameter, in order."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: (p.dtype, p.requires_grad, p.detach().clone()) for name, p in named}


def same_bits(one: dict[str, tuple], other: dict[str, tuple]) -> None:
    assert list(one) == list(other)
    for name, (dtype, requires_grad, value) in one.items():
        assert (dtype, requires_grad) == other[name][:2], name
        assert torch.equal(value.view(torch.uint8), other[name][2].view(torch.uint8)), name


def without_memory(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


def output(model: Any, tokens: int = 7) -> torch.Tensor:
    ids = random_ids(model, 2, tokens) if hasattr(model.config, "n_embd") else torch.arange(4, 4 + tokens).repeat(2, 1)
    return model(ids).logits


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_same_bits_come_back(cls: str, dtype: torch.dtype) -> None:
    model = fresh(cls).to(dtype)
    next(iter(model.parameters())).requires_grad_(False)
    before, kept = bits(model), copy.deepcopy(model)
    report = at.accelerate(model, keep_weights=False)
    at.accelerate(kept)
    assert torch.equal(output(model), output(kept))
    assert report.fast_calls == 1
    gone = without_memory(model)
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and (".h." in name or ".layer." in name)}
    untied = {"lm_head.weight"} if cls in LANGUAGE_MODELS and not model.config.tie_word_embeddings else set()
    assert gone == matrices | untied
    assert report.released_bytes == sum(before[name][2].nbytes for name in gone)
    assert f"given up  {report.released_bytes / 1e6:.1f} MB" in str(report)
    assert at.restore(model)
    assert not without_memory(model)
    same_bits(before, bits(model))
    assert not any("_alula" in key for module in model.modules() for key in module.__dict__)
    assert not any(module._state_dict_hooks or module._load_state_dict_pre_hooks for module in model.modules())


@pytest.mark.parametrize("cls", CLASSES)
def test_memory_is_given_up(cls: str) -> None:
    """No tensor of the model holds what its matrices held."""
    model = fresh(cls)
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 2}
    report = at.accelerate(model, keep_weights=False)
    held = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() == 2 and not p.is_meta}
    count = len(without_memory(model))
    assert count
    assert len(held) == len(pointers) - count
    assert report.packed_bytes >= report.released_bytes


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_and_saving(cls: str, tmp_path: Any) -> None:
    model, plain = fresh(cls), fresh(cls)
    at.accelerate(model, keep_weights=False)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
    for target, kind in ((plain, "plain"), (model, "fast")):
        target.save_pretrained(tmp_path / kind)
    saved = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("plain", "fast")]
    assert saved[0] == saved[1]
    assert without_memory(model)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("assign", [False, True])
def test_loads(cls: str, assign: bool) -> None:
    model, plain = fresh(cls), fresh(cls)
    at.accelerate(model, keep_weights=False)
    gone = without_memory(model)
    other = {name: value.clone() * 0.5 for name, value in plain.state_dict().items()}
    for target in (model, plain):
        target.load_state_dict({name: value.clone() for name, value in other.items()}, assign=assign)
        target.tie_weights()
    close(output(model), output(plain))
    assert without_memory(model) == gone
    at.restore(model)
    same_bits(bits(plain), bits(model))


def test_loads_into_a_part() -> None:
    model, plain = fresh(n_layer=3), fresh(n_layer=3)
    at.accelerate(model, keep_weights=False)
    gone = without_memory(model)
    for target in (model, plain):
        mlp = target.transformer.h[1].mlp
        mlp.load_state_dict({name: value * 2 for name, value in mlp.state_dict().items()})
    close(output(model), output(plain))
    assert without_memory(model) == gone


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
def test_to(cls: str, tied: bool) -> None:
    model, plain = (fresh(cls, **({"tie_word_embeddings": tied} if cls in LANGUAGE_MODELS else {})) for _ in range(2))
    at.accelerate(model, keep_weights=False)
    gone = without_memory(model)
    model.to("cpu").to(torch.bfloat16)
    kept = at.accelerate_model(plain.to(torch.bfloat16))
    assert without_memory(model) == gone
    assert torch.equal(output(model), output(kept))
    assert without_memory(model) == gone
    at.restore(model)
    at.restore(kept)
    same_bits(bits(kept), bits(model))


def test_what_is_replaced_is_followed() -> None:
    model, plain = fresh(n_layer=3), fresh(n_layer=3)
    at.accelerate(model, keep_weights=False)
    gone = without_memory(model)
    with torch.no_grad():
        for target in (model, plain):
            target.transformer.h[0].attn.c_attn.bias.add_(1)
    close(output(model), output(plain))
    for target in (model, plain):
        weight = torch.randn(plain.transformer.h[2].mlp.c_fc.weight.shape, generator=torch.Generator().manual_seed(0))
        target.transformer.h[2].mlp.c_fc.weight = nn.Parameter(weight)
    close(output(model), output(plain))
    assert without_memory(model) == gone
    at.refresh(model)
    close(output(model), output(plain))
    at.restore(model)
    same_bits(bits(plain), bits(model))


@pytest.mark.parametrize("part", ["block", "head"])
def test_writing_in_place_is_an_error(part: str) -> None:
    model = fresh("CodeGenForCausalLM")
    before = bits(model)
    at.accelerate(model, keep_weights=False)
    weight = model.lm_head.weight if part == "head" else model.transformer.h[0].mlp.fc_in.weight
    with torch.no_grad():
        weight.mul_(2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"weight of a Linear was written in place, but was given up"):
            output(model)
    at.restore(model)
    same_bits(before, bits(model))


READS = {
    "item": lambda mlp, x: mlp.c_fc.weight.sum().item(),
    "its layer": lambda mlp, x: mlp.c_fc(x),
    "layers around it": lambda mlp, x: mlp(x),
    "a product": lambda mlp, x: x @ mlp.c_fc.weight,
    "a product with a bias": lambda mlp, x: torch.addmm(mlp.c_fc.bias, x[0], mlp.c_fc.weight),
    "of its transpose": lambda mlp, x: torch.nn.functional.linear(x, mlp.c_fc.weight.T),
    "of its data": lambda mlp, x: x @ mlp.c_fc.weight.data,
    "detached": lambda mlp, x: torch.einsum("bte,ef->btf", x, mlp.c_fc.weight.detach()),
    "copying": lambda mlp, x: torch.empty(mlp.c_fc.weight.shape).copy_(mlp.c_fc.weight),
    "moving": lambda mlp, x: mlp.c_fc.weight.to("cpu"),
    "writing": lambda mlp, x: mlp.c_fc.weight.copy_(torch.zeros(mlp.c_fc.weight.shape)),
    "writing its data": lambda mlp, x: mlp.c_fc.weight.data.copy_(torch.zeros(mlp.c_fc.weight.shape)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_fails(read: Any) -> None:
    """PyTorch's products of a tensor on the CPU and one on the meta device give what is in unwritten memory."""
    model = fresh()
    before = bits(model)
    at.accelerate(model, keep_weights=False)
    mlp = model.transformer.h[0].mlp
    assert mlp.c_fc.weight.is_meta
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        read(mlp, torch.randn(1, 3, model.config.n_embd))
    at.restore(model)
    same_bits(before, bits(model))


@pytest.mark.parametrize("cls", ["GPT2LMHeadModel", "CodeGenForCausalLM"])
def test_an_unpickled_model_asks_to_be_accelerated(cls: str, tmp_path: Any) -> None:
    """The methods put on its modules are not part of a pickle."""
    model = fresh(cls)
    expected = output(at.accelerate_model(model, keep_weights=False))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with pytest.raises(RuntimeError, match=r"given up .*unpickled needs accelerate\(model\) once more"):
        output(again)
    assert torch.equal(output(at.accelerate_model(again)), expected)


def test_again() -> None:
    """A second call leaves it; True and False say otherwise."""
    model = fresh("CodeGenForCausalLM")
    before = bits(model)
    expected = output(at.accelerate_model(model))
    for keep, is_released in ((None, False), (False, True), (None, True), (False, True), (True, False), (None, False)):
        report = at.accelerate(model, keep_weights=keep)
        assert bool(without_memory(model)) == is_released == bool(report.released_bytes)
        assert torch.equal(output(model), expected)
    at.restore(model)
    same_bits(before, bits(model))


def test_copies_and_pickles(tmp_path: Any) -> None:
    model = fresh("GPTBigCodeForCausalLM")
    before = bits(model)
    expected = output(at.accelerate_model(model, keep_weights=False))
    twin = copy.deepcopy(model)
    assert without_memory(twin) == without_memory(model)
    assert torch.equal(output(twin), expected)
    at.restore(model)
    same_bits(before, bits(model))
    assert torch.equal(output(twin), expected)
    torch.save(twin, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    at.accelerate(again, keep_weights=False)
    assert without_memory(again)
    assert torch.equal(output(again), expected)
    for other in (twin, again):
        at.restore(other)
        same_bits(before, bits(other))


def test_shared_matrices_stay() -> None:
    model = fresh("CodeGenForCausalLM", n_layer=2)
    model.transformer.h[1].mlp.fc_in.weight = model.transformer.h[0].mlp.fc_in.weight
    plain = copy.deepcopy(model)
    at.accelerate(model, keep_weights=False)
    assert not any("fc_in.weight" in name for name in without_memory(model))
    assert model.transformer.h[1].mlp.fc_in.weight is model.transformer.h[0].mlp.fc_in.weight
    close(output(model), output(plain))


def test_what_needs_the_own_blocks_is_an_error() -> None:
    model = fresh()
    at.accelerate(model, keep_weights=False)
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"forward hook.*given up \(keep_weights=False\).*keep_weights=True"):
        output(model)
    at.accelerate(model, keep_weights=True)
    with pytest.warns(UserWarning, match="forward hook"):
        output(model)
    handle.remove()
    model.train()
    at_work = pytest.raises(RuntimeError, match=r"training mode.*restore\(model\)")
    with at_work:
        output(model)


def test_gradient_through_the_head_is_an_error() -> None:
    model = fresh("CodeGenForCausalLM")
    at.accelerate(model, keep_weights=False)
    x = torch.randn(1, 2, model.config.n_embd, requires_grad=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"given up.*restore\(model\)"):
        model.lm_head(x)


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_generates_and_compiles(cls: str) -> None:
    model, plain = fresh(cls), fresh(cls)
    report = at.accelerate(model, keep_weights=False)
    ids = random_ids(plain, 2, 6)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3, "num_beams": 2}
    assert torch.equal(model.generate(ids, **arguments), plain.generate(ids, **arguments))
    assert report.fast_calls
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(ids).logits, plain(ids).logits)
    torch._dynamo.reset()


def test_in_a_pipeline() -> None:
    from test_transformers_host import tokenizer

    model, plain = fresh(), fresh()
    said = []
    for target in (plain, at.accelerate_model(model, keep_weights=False)):
        words = tokenizer(plain.config.vocab_size)
        pipe = transformers.pipeline("text-generation", model=target, tokenizer=words, device="cpu")
        said.append(pipe(["w5 w6 w7", "w9"], max_new_tokens=6, do_sample=False, batch_size=2))
    assert said[0] == said[1]
    assert without_memory(model)


def test_nothing_is_given_up_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(n_layer=3)
    before = bits(model)
    from alula.integrations.transformers import packing

    real, calls = packing.PackedStack._release, []

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(packing.PackedStack, "_release", fails)
    with pytest.raises(MemoryError):
        at.accelerate(model, keep_weights=False)
    same_bits(before, bits(model))
    assert not any("_alula" in key for module in model.modules() for key in module.__dict__)
