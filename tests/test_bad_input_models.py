"""What a checkpoint or a call gets wrong is named, with what is accepted, and nothing is changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from alula.cache import KVCache
from alula.config import GPTBigCodeConfig
from alula.models import (
    AutoModel,
    AutoModelForCausalLM,
    GPTBigCodeForCausalLM,
    GPTBigCodeForSequenceClassification,
    GPTBigCodeForTokenClassification,
)
from checkpoint_cases import SMALL, load, reference, same, save, tensors
from decoder_cases import alula_model, hf_model, random_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small model's config.json and no weights."""
    reference().config.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model() -> GPTBigCodeForCausalLM:
    return alula_model(hf_model(1, **{**SMALL, "n_positions": 48}))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_named(folder: Path) -> None:
    state = tensors()
    state["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(70, 47)
    state["transformer.ln_f.weight"] = torch.zeros(48, dtype=torch.float64)
    state["transformer.wpe.weight"] = torch.zeros(state["transformer.wpe.weight"].shape, dtype=torch.int32)
    save(state, folder)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "transformer.h.0.mlp.c_fc.weight has shape [70, 47], the configuration asks for [70, 48]" in text
    assert "transformer.ln_f.weight has dtype torch.float64, accepted: float32, bfloat16, float16" in text
    assert "transformer.wpe.weight has dtype torch.int32" in text
    state = tensors()
    for name in ("transformer.h.0.ln_1.bias", "transformer.wpe.weight"):
        del state[name]
    save(state, folder)
    with pytest.raises(ValueError, match=r"missing: transformer\.wpe\.weight, transformer\.h\.0\.ln_1\.bias$"):
        load(folder)
    save({**tensors(), "ln_f.bias": torch.zeros(48)}, folder)
    with pytest.raises(ValueError, match=r"has both .*ln_f\.bias' and .*ln_f\.bias', which are one weight"):
        load(folder)
    save({n: v.double() for n, v in tensors().items()}, folder)
    with pytest.raises(ValueError, match=r"weights of dtype torch\.float64 is not supported"):
        load(folder)


def test_a_failed_load_state_dict_changes_nothing() -> None:
    model = alula_model(reference())
    before = model.state_dict()
    state = {name: value + 1 for name, value in before.items()}
    for wrong, message in (
        ({**state, "transformer.ln_f.bias": torch.zeros(47)}, r"ln_f\.bias has shape \[47\]"),
        ({**state, "surplus": torch.zeros(1)}, r"unexpected: surplus"),
        ({n: v for n, v in state.items() if "wpe" not in n}, r"missing: transformer\.wpe\.weight"),
        ({**state, "transformer.ln_f.bias": 3.0}, r"'transformer\.ln_f\.bias' is a float, expected a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(wrong)
        assert same(model.state_dict(), before)
    with pytest.warns(UserWarning, match="surplus"):
        keys = model.load_state_dict({"surplus": torch.zeros(1), "transformer.ln_f.bias": torch.ones(48)}, strict=False)
    assert keys.unexpected_keys == ["surplus"]
    assert "transformer.wte.weight" in keys.missing_keys
    assert (model.transformer.ln_f.bias == 1).all()
    assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
    assert same(model.state_dict(), state)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", 7, None]
)
def test_shard_names_stay_in_the_folder(folder: Path, shard: Any) -> None:
    save(tensors(), folder.parent, "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors(), shard)}))
    with pytest.raises(ValueError, match="accepted: the plain name of a file in the same folder"):
        load(folder)


def test_broken_indexes(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    state = tensors()
    save(state, folder, "a.safetensors")
    whole = dict.fromkeys(state, "a.safetensors")
    for values, error, message in (
        ({}, ValueError, "has no weight_map"),
        ({"weight_map": []}, ValueError, "has no weight_map"),
        ({"weight_map": {**whole, "transformer.wpe.weight": "b.safetensors"}}, FileNotFoundError, r"b\.safetensors is"),
        (
            {"weight_map": {**whole, "transformer.h.0.ln_9.bias": "a.safetensors"}},
            None,
            "a name that the index alone has and the model does not need",
        ),
    ):
        index.write_text(json.dumps(values))
        if error is None:
            assert same(load(folder).state_dict(), reference().state_dict()), message
        else:
            with pytest.raises(error, match=message):
                load(folder)
    save({n: v for n, v in state.items() if "wpe" not in n}, folder, "a.safetensors")
    index.write_text(json.dumps({"weight_map": whole}))
    with pytest.raises(ValueError, match=r"wpe\.weight \(the index places it in a\.safetensors, which lacks it\)"):
        load(folder)
    save({"transformer.wpe.weight": state["transformer.wpe.weight"]}, folder, "b.safetensors")
    index.write_text(json.dumps({"weight_map": {**whole, "transformer.wte.weight": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"places 'transformer\.w[pt]e\.weight' in"):
        load(folder)
    index.write_text("not json")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load(folder)


def test_pickles_other_than_tensors_are_refused(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "run"),)

    torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"tensors only: it holds a posix\.mkdir, and alula runs no code") as refused:
        load(folder)
    assert "weights_only" not in str(refused.value)  # PyTorch's advice is to let it run
    assert not (folder / "run").exists()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds a list, expected a dict"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"it is no file of torch\.save"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointers_of_git_lfs_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 503382240\n")
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer, not the file itself; run `git lfs pull`"):
        load(folder)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent is neither a model folder nor a config file"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(tmp_path / "absent", config=GPTBigCodeConfig())


def test_auto_classes(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"use AutoModelForCausalLM\.from_pretrained\(path\)"):
        AutoModelForCausalLM()
    config = GPTBigCodeConfig()
    config.__class__ = type("OtherConfig", (GPTBigCodeConfig,), {"model_type": "other"})
    with pytest.raises(ValueError, match="no class for model_type 'other'; accepted: gpt_bigcode, gpt2, codegen"):
        AutoModel.from_config(config)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    with pytest.raises(ValueError, match=r"model_type 'gpt_neox'; accepted: gpt_bigcode, gpt2"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"GPTBigCodeConfig reads model_type 'gpt_bigcode', but .* 'gpt_neox'"):
        load(folder)


# --- calls -----------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({}, "exactly one of input_ids and inputs_embeds"),
    "two inputs": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 3, 48)}, "exactly one"),
    "id too large": ({"input_ids": torch.tensor([[5, 61]])}, r"input_ids holds 61; accepted: 0 to 60"),
    "negative id": ({"input_ids": torch.tensor([[5, -1]])}, r"input_ids holds -1; accepted: 0 to 60"),
    "empty prompt": ({"input_ids": IDS[:, :0]}, r"input_ids has shape \[2, 0\]; accepted: \[batch, tokens\]"),
    "batch of none": ({"input_ids": IDS[:0]}, r"input_ids has shape \[0, 3\]"),
    "flat ids": ({"input_ids": IDS[0]}, r"input_ids has shape \[3\]"),
    "ids of floats": ({"input_ids": IDS.float()}, r"input_ids has dtype torch.float32; accepted: int64, int32"),
    "ids elsewhere": ({"input_ids": IDS.to("meta")}, "input_ids is on meta, the model on cpu"),
    "too long": (
        {"input_ids": torch.ones(1, 49, dtype=torch.int64)},
        "0 cached and 49 new tokens make 49, more than n_positions=48",
    ),
    "embeds too narrow": ({"inputs_embeds": torch.zeros(2, 3, 47)}, r"shape \[2, 3, 47\]; accepted: .*, 48\]"),
    "embeds of bf16": ({"inputs_embeds": torch.zeros(2, 3, 48).bfloat16()}, "inputs_embeds has dtype torch.bfloat16"),
    "embeds elsewhere": ({"inputs_embeds": torch.zeros(2, 3, 48, device="meta")}, "inputs_embeds is on meta"),
    "embeds empty": ({"inputs_embeds": torch.zeros(2, 0, 48)}, r"inputs_embeds has shape \[2, 0, 48\]"),
    "position too large": (
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 48]])},
        "position_ids holds 48; accepted: 0 to 47",
    ),
    "position too large for embeds": (
        {"inputs_embeds": torch.zeros(1, 2, 48), "position_ids": torch.tensor([[-1, 1]])},
        "position_ids holds -1; accepted: 0 to 47",
    ),
    "positions of a wrong shape": (
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1]])},
        r"position_ids has shape \[1, 2\]; accepted: \[2, 3\] or \[1, 3\]",
    ),
    "token type too large": (
        {"input_ids": IDS, "token_type_ids": torch.full((2, 3), 61)},
        "token_type_ids holds 61; accepted: 0 to 60",
    ),
    "token types of a wrong shape": ({"input_ids": IDS, "token_type_ids": IDS.T}, r"token_type_ids has shape \[3, 2\]"),
    "mask too short": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 2)},
        r"attention_mask has shape \[2, 2\]; accepted: \[2, 3\]",
    ),
    "mask of another batch": ({"input_ids": IDS, "attention_mask": torch.ones(1, 3)}, r"shape \[1, 3\]"),
    "flat mask": ({"input_ids": IDS, "attention_mask": torch.ones(3)}, r"shape \[3\]; accepted: .*\[2, 3\|1, 3\]"),
    "mask of other heads": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 2, 3, 3).bool()},
        r"shape \[2, 2, 3, 3\]; accepted: .*\[2\|1, 3\|1, 3\|1, 3\]",
    ),
    "mask of too many columns": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 4).bool()},
        r"shape \[2, 1, 3, 4\]",
    ),
    "full mask of integers": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 3, 3, dtype=torch.int64)},
        "attention_mask of 3 dimensions has dtype torch.int64; accepted: bool .* or floating point",
    ),
    "mask elsewhere": ({"input_ids": IDS, "attention_mask": torch.ones(2, 3, device="meta")}, "attention_mask is on"),
    "head mask of a wrong shape": (
        {"input_ids": IDS, "head_mask": torch.ones(2)},
        r"head_mask has shape \[2\]; accepted: \[3\] or \[2, 3\]",
    ),
    "encoder": (
        {"input_ids": IDS, "encoder_hidden_states": torch.zeros(2, 4, 48)},
        "need a model with cross-attention; the configuration has add_cross_attention=False",
    ),
    "too few logits": ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep=-1; accepted"),
    "logits out of range": ({"input_ids": IDS, "logits_to_keep": torch.tensor([3])}, r"\[3\] reaches outside the 3"),
    "logits by floats": ({"input_ids": IDS, "logits_to_keep": torch.tensor([0.5])}, "logits_to_keep has dtype"),
    "logits of other rows": ({"input_ids": IDS, "logits_to_keep": torch.tensor([[0]])}, "has 1 rows, the batch 2"),
    "logits by a wrong mask": (
        {"input_ids": IDS, "logits_to_keep": torch.ones(2, 2).bool()},
        r"dtype bool has shape \[2, 2\]; accepted: \[2, 3\]",
    ),
    "labels of a wrong shape": (
        {"input_ids": IDS, "labels": IDS[:, :2]},
        r"labels have shape \[2, 2\]; accepted: \[2, 3\]",
    ),
    "labels out of range": (
        {"input_ids": IDS, "labels": IDS + 55},
        r"label 61 is out of range; accepted: 0 to 60, or -100",
    ),
    "labels of floats": ({"input_ids": IDS, "labels": IDS.float()}, "labels have dtype torch.float32"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_cannot_be_right(model: GPTBigCodeForCausalLM, case: str) -> None:
    kwargs, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        model(**kwargs)


CACHED: dict[str, tuple[dict[str, Any], str]] = {
    "id out of range": ({"input_ids": IDS + 60}, r"input_ids holds 6[5-9]"),
    "another batch": ({"input_ids": IDS[:1]}, "past_key_values has a batch of 2, the input one of 1"),
    "too long": (
        {"input_ids": torch.ones(2, 45, dtype=torch.int64)},
        "4 cached and 45 new tokens make 49, more than n_positions=48",
    ),
    "mask of a wrong shape": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 5)},
        r"shape \[2, 5\]; accepted: \[2, 3\] or \[2, 7\]",
    ),
    "mask that contradicts the past": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 7)},
        "True of row 0, column 0, which was stored as False",
    ),
    "full mask after padding": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 3, 7).bool()},
        "cannot follow padding that past_key_values left out",
    ),
    "head mask": ({"input_ids": IDS, "head_mask": torch.ones(4)}, "head_mask has shape"),
    "embeds with a position out of range": (
        {"inputs_embeds": torch.zeros(2, 1, 48), "position_ids": torch.tensor([[99]])},
        "position_ids holds 99",
    ),
}


@pytest.mark.parametrize("case", CACHED)
def test_a_refused_call_leaves_the_cache_as_it_was(model: GPTBigCodeForCausalLM, case: str) -> None:
    kwargs, message = CACHED[case]
    prompt = random_ids(model, 2, 4)
    cache = model(prompt, attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])).past_key_values
    before = [layer.clone() for layer in cache.layers]
    expected = model(IDS, past_key_values=cache).logits
    cache.crop(4)
    with pytest.raises(ValueError, match=message):
        model(**kwargs, past_key_values=cache)
    assert (cache.get_seq_length(), cache.lengths.tolist()) == (4, [3, 4])
    for layer, (old, new) in enumerate(zip(before, cache.layers, strict=True)):
        assert torch.equal(old[0, :, :3], new[0, :, :3]), layer
        assert torch.equal(old[1, :, :4], new[1, :, :4]), layer
    assert torch.equal(model(IDS, past_key_values=cache).logits, expected)


def test_caches_of_another_kind(model: GPTBigCodeForCausalLM) -> None:
    import transformers

    with pytest.raises(TypeError, match=r"past_key_values is a DynamicCache; accepted: alula\.cache\.KVCache"):
        model(IDS, past_key_values=transformers.DynamicCache())
    with pytest.raises(TypeError, match="past_key_values is a tuple"):
        model(IDS, past_key_values=())
    config = GPTBigCodeConfig(**{**model.config.to_dict(), "n_layer": 5})
    for other in (KVCache(config, 2), KVCache(model.config, 2, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"past_key_values is of another model: .*; accepted: "):
            model(IDS, past_key_values=other)
    full = KVCache(model.config, 2, max_length=4, dtype=torch.float32)
    model(IDS, past_key_values=full)
    with pytest.raises(ValueError, match="max_length=4 tokens a row, 6 are needed"):
        model(IDS, past_key_values=full)
    assert full.get_seq_length() == 3
    model(IDS[:, :1], past_key_values=full)


def test_classification_heads() -> None:
    config = GPTBigCodeConfig(**{**SMALL, "n_positions": 48, "num_labels": 3, "n_inner": None})
    model = GPTBigCodeForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"a batch of 2 .* no pad_token_id .* set config\.pad_token_id"):
        model(IDS)
    config.pad_token_id = 0
    config.problem_type = "single_label_classification"
    for kwargs, message in (
        ({"labels": torch.tensor([1, 3])}, "label 3 is out of range; accepted: 0 to 2"),
        ({"labels": torch.tensor([1, 2, 0])}, r"labels have shape \[3\]; accepted: \[2\]"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels have dtype torch.float32; accepted: int64"),
        ({"input_ids": None}, "exactly one of"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": IDS, **kwargs})
    config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"labels have shape \[2\]; accepted for multi_label_classification: \[2, 3\]"):
        model(IDS, labels=torch.tensor([0.0, 1.0]))
    tokens = GPTBigCodeForTokenClassification(config)
    with pytest.raises(ValueError, match=r"labels have shape \[2\]; accepted: \[2, 3\]"):
        tokens(IDS, labels=torch.tensor([0, 1]))


def test_a_model_without_values() -> None:
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**SMALL), init_weights=False)
    with pytest.raises(RuntimeError, match="has no values: load or initialise it"):
        model(IDS)
    for convert in (lambda: model.double(), lambda: model.to(torch.float64)):
        with pytest.raises(ValueError, match=r"dtype torch\.float64 is not supported; accepted: float32, bfloat16"):
            convert()
    with pytest.raises(ValueError, match="device meta is not supported by this build; accepted: cpu"):
        model.to("meta")
