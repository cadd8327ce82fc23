"""What is refused about quantized models and folders: each with what is wrong, and what is accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alula
import pytest
import safetensors.torch
import torch
from decoder_cases import random_ids
from test_quantized_models import fresh
from torch import Tensor

CLS = "GPTBigCodeForCausalLM"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `int4`, the same model; not to be changed."""
    parent = tmp_path_factory.mktemp("folders")
    fresh(CLS).save_pretrained(parent / "plain")
    fresh(CLS).quantize("int4", group_size=32).save_pretrained(parent / "int4")
    return parent


@pytest.fixture
def changed(folders: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor], dict[str, Any]], None]], Path]:
    """A copy of `int4` after a change of its tensors and its config.json."""

    def make(change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders / "int4", folder)
        state = safetensors.torch.load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(state, config)
        safetensors.torch.save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def load(folder: Path, **options: Any) -> Any:
    return alula.GPTBigCodeForCausalLM.from_pretrained(folder, **options)


def test_formats_and_group_sizes(folders: Path) -> None:
    for options, message in (
        ({"quantize": "int3"}, r"quantize='int3'; accepted: int8, int4, int4_asymmetric, nf4"),
        ({"quantize": "dense"}, r"quantize='dense'; accepted"),
        ({"quantize": True}, r"quantize=True; accepted"),
        (
            {"quantize": "int4", "group_size": 48},
            r"group_size 48 does not go with format 'int4'; accepted: 32, 64, 128",
        ),
        ({"quantize": "int8", "group_size": 64}, r"group_size 64 .*'int8'; accepted: none, it has no groups"),
        ({"quantize": "nf4", "group_size": 32}, r"group_size 32 .*'nf4'; accepted: 64"),
        ({"quantize": "int8", "activations": "int4"}, r"unknown activations 'int4'; accepted: int8, full"),
        ({"quantize": "int8", "keep": ["lm_heads"]}, r"keep names 'lm_heads', which is no matrix of GPTBigCode"),
        ({"quantize": "int8", "keep": [3]}, r"keep=\[3\]; accepted: names of modules"),
        ({"group_size": 64}, r"group_size goes with quantize, one of int8"),
        ({"keep": "lm_head"}, r"keep goes with quantize"),
        ({"activations": "full"}, r"activations='full' goes with quantized weights"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folders / "plain", **options)
    model = fresh(CLS)
    with pytest.raises(ValueError, match="quantize='int5'"):
        model.quantize("int5")
    assert not model.is_quantized
    with pytest.raises(ValueError, match="the model is not quantized"):
        model.set_activations("full")


def test_a_group_size_that_does_not_divide_k_is_padded(folders: Path) -> None:
    model = load(folders / "plain", quantize="int4", group_size=128)
    out = model.transformer.h[0].mlp.c_proj.stored("weight")
    assert out.in_features == 230
    assert out.data.shape[1] == 2 * (64 + 128 * 16)


def test_twice(folders: Path) -> None:
    model = load(folders / "int4")
    with pytest.raises(ValueError, match="quantized already, and cannot be quantized twice; load the original"):
        model.quantize("int8")
    with pytest.raises(ValueError, match=r"is quantized already \(int4_32\), and cannot be quantized twice"):
        load(folders / "int4", quantize="int8")


def test_training(folders: Path) -> None:
    model = load(folders / "int4").train()
    ids = random_ids(model, 1, 4)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="a quantized model cannot be trained"):
        model(ids, labels=ids)
    with pytest.raises(RuntimeError, match="cannot require grad"):
        model.requires_grad_()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"another library \(GPTQ\).*load the original checkpoint"),
        ({"quant_method": "awq", "bits": 4}, r"another library \(AWQ\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\).*model\.dequantize\(\)"),
        ({"load_in_8bit": True}, r"\(bitsandbytes\)"),
        ({"quant_method": "torchao"}, r"\('torchao'\).*before it was quantized, and quantize that with alula"),
        ({}, r"another library \(None\)"),
        ([1], r"quantization_config is a list, expected an object"),
        ({"quant_method": "alula"}, r"quantization_config cannot be read: quantize=None; accepted"),
        ({"quant_method": "alula", "format": "int4", "group_size": "x"}, r"cannot be read: group_size x"),
    ],
)
def test_config_of_others(changed: Any, values: Any, message: str) -> None:
    def change(state: dict, config: dict) -> None:
        config["quantization_config"] = values

    folder = changed(change)
    for loader in (load, alula.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message) as error:
            loader(folder)
        assert str(folder) in str(error.value)


FC = "transformer.h.1.mlp.c_fc.weight"


def test_mixed_and_truncated(changed: Any, folders: Path) -> None:
    plain = safetensors.torch.load_file(folders / "plain" / "model.safetensors")
    name = FC + ".int4_32"

    def truncated(state: dict, config: dict) -> None:
        state[name] = state[name][:-1].clone()

    def narrower(state: dict, config: dict) -> None:
        state[name] = state[name][:, :-64].clone()

    def other_dtype(state: dict, config: dict) -> None:
        state[name] = state[name].float()

    def other_format(state: dict, config: dict) -> None:
        state[FC + ".nf4_64"] = state.pop(name)

    def two_formats(state: dict, config: dict) -> None:
        state[FC + ".int8"] = state[name].clone()

    def dense(state: dict, config: dict) -> None:
        del state[name]
        state[FC] = plain[FC]

    def both(state: dict, config: dict) -> None:
        state[FC] = plain[FC]

    def missing(state: dict, config: dict) -> None:
        del state[name]

    def other_config(state: dict, config: dict) -> None:
        config["quantization_config"]["group_size"] = 64

    def kept(state: dict, config: dict) -> None:
        config["quantization_config"]["modules_to_not_convert"] = [FC]

    def silent(state: dict, config: dict) -> None:
        del config["quantization_config"]

    def other_shape(state: dict, config: dict) -> None:
        config["n_inner"] = 300

    fc = FC.replace(".", r"\.")
    for change, message in (
        (truncated, rf"{fc}\.int4_32 is torch\.uint8 \[7, 1728\], expected torch\.uint8 \[8, 1728\] \(truncated\?\)"),
        (narrower, rf"{fc}\.int4_32 is torch\.uint8 \[8, 1664\]"),
        (other_dtype, rf"{fc}\.int4_32 is torch\.float32"),
        (other_format, rf"{fc}\.nf4_64 is nf4_64, and config\.json says int4_32"),
        (two_formats, rf"both '{fc}\.int(4_32|8)' and '{fc}\.int(8|4_32)', one matrix"),
        (dense, rf"{fc} is not packed, and config\.json says int4_32"),
        (both, rf"{fc}\.int4_32 is packed, and there is also {fc}"),
        (missing, rf"missing: {fc}"),
        (other_config, r"int4_32 is int4_32, and config\.json says int4_64"),
        (kept, rf"{fc}\.int4_32 is packed, and config\.json says that it is not"),
        (silent, r"holds packed tensors .* no quantization_config; write the folder again with `alula quantize`"),
        (other_shape, r"expected torch\.uint8 \[10, 1728\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load(changed(change))


def test_a_folder_whose_tensors_lie_anywhere(changed: Any, folders: Path) -> None:
    """Written by the safetensors package, which aligns to 8 bytes and knows no errors."""
    ids = torch.arange(4, 15)[None]
    again = load(changed(lambda state, config: None))
    assert torch.equal(again(ids).logits, load(folders / "int4")(ids).logits)
    assert again.quantization_report().rows[0].relative_error is None


def test_cut_off_file(changed: Any) -> None:
    folder = changed(lambda state, config: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        load(folder)


def test_weights_that_no_format_holds(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "plain", tmp_path / "nan")
    state = safetensors.torch.load_file(tmp_path / "nan" / "model.safetensors")
    state[FC][3, 5] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{FC} cannot be quantized: .*"):
        load(tmp_path / "nan", quantize="int8")
