"""Models that another library has changed, by that library itself: refused with what to do about it, or working."""
# ruff: noqa: E402

from __future__ import annotations

import copy
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import alula.integrations.transformers as at
import torch
from decoder_cases import hf_model, random_ids
from transformers_cases import close, same_state, state_of


def fresh(cls: str = "GPT2LMHeadModel", **fixed: Any) -> Any:
    return copy.deepcopy(hf_model(3, cls, **fixed))


def refused(model: Any, match: str) -> None:
    before = state_of(model)
    with pytest.raises((TypeError, ValueError), match=match):
        at.accelerate(model)
    same_state(before, state_of(model))


# --- peft ------------------------------------------------------------------------------------------------------------


def lora(cls: str) -> Any:
    peft = pytest.importorskip("peft")
    names = {"GPT2LMHeadModel": ["c_attn"], "GPTBigCodeForCausalLM": ["c_attn"], "CodeGenForCausalLM": ["qkv_proj"]}
    fan_in_fan_out = cls == "GPT2LMHeadModel"
    return peft.LoraConfig(target_modules=names[cls], r=4, init_lora_weights=False, fan_in_fan_out=fan_in_fan_out)


@pytest.mark.parametrize("cls", ["GPT2LMHeadModel", "GPTBigCodeForCausalLM", "CodeGenForCausalLM"])
def test_peft(cls: str) -> None:
    config = lora(cls)
    import peft

    wrapped = peft.get_peft_model(fresh(cls), config).eval()
    refused(wrapped, r"wrapped by PEFT \(PeftModel.*merge_and_unload\(\)")
    refused(wrapped.base_model.model, "merge_and_unload|adapters")  # the model inside, with adapters in its blocks
    ids = random_ids(wrapped, 2, 6)
    expected = wrapped(ids).logits
    merged = wrapped.merge_and_unload().eval()
    report = at.accelerate(merged)  # what the error says works
    close(merged(ids).logits, expected)
    assert report.fast_calls == 1


def test_peft_through_transformers() -> None:
    config = lora("GPT2LMHeadModel")
    model = fresh()
    model.add_adapter(config)
    refused(model.eval(), r"PEFT adapters loaded; merge them")


def test_an_adapter_put_on_afterwards() -> None:
    config = lora("GPT2LMHeadModel")
    model = fresh()
    at.accelerate(model)
    model.add_adapter(config)
    with pytest.raises(ValueError, match=r"changed into what alula cannot run: .*c_attn is a peft.*restore\(model\)"):
        model.eval()(random_ids(model, 1, 4))
    at.restore(model)
    assert model(random_ids(model, 1, 4)).logits.isfinite().all()


# --- device_map ------------------------------------------------------------------------------------------------------


def test_device_map(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    plain = fresh("GPTBigCodeForCausalLM", n_layer=2)
    plain.save_pretrained(tmp_path / "model")
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(tmp_path / "model", device_map="cpu", attn_implementation="eager").eval()
    report = at.accelerate(whole)
    ids = random_ids(plain, 2, 5)
    close(whole(ids).logits, plain(ids).logits)
    assert report.fast_calls == 1
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.h.0": "cpu"}
    places |= {"transformer.h.1": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    spread = load(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk"), attn_implementation="eager"
    ).eval()
    with pytest.raises(ValueError, match=r"spread over devices \(cpu, disk\) by device_map; accepted: one device"):
        at.accelerate(spread)


# --- quantized by others ---------------------------------------------------------------------------------------------


def quantized(path: Any, library: str) -> Any:
    pytest.importorskip("accelerate")
    if library == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif library == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("optimum.quanto")
        config = transformers.QuantoConfig(weights="int8")
    fresh("GPTBigCodeForCausalLM").save_pretrained(path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path, quantization_config=config, attn_implementation="eager", device_map="cpu").eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao", "quanto"])
def test_quantized_by(library: str, tmp_path: Any) -> None:
    try:
        model = quantized(tmp_path, library)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{library} does not load here: {error}")
    with pytest.raises(ValueError, match=rf"quantized by another library \({library}\); alula reads float32"):
        at.accelerate(model)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):  # whoever hides it meets its matrices
        model.__dict__.pop(name, None)
    if "quantization_config" in model.config.__dict__:
        del model.config.quantization_config
    with pytest.raises(ValueError, match=r"could be replaced: .*(accepted: Linear|plain tensors|has dtype)"):
        at.accelerate(model)


# --- torch -----------------------------------------------------------------------------------------------------------


def test_quantized_by_torch() -> None:
    model = fresh("GPTBigCodeForCausalLM")
    changed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with pytest.raises(ValueError, match=r"could be replaced: .*accepted: Linear"):
        at.accelerate(changed)


def test_compiled() -> None:
    model = fresh()
    with pytest.raises(ValueError, match=r"compiled \(torch\.compile\); accelerate it first"):
        at.accelerate(torch.compile(model))
    report = at.accelerate(model)  # in that order it works
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(model, 1, 4)
    close(compiled(ids).logits, fresh()(ids).logits)
    assert at.restore(compiled) == len(report.states)
