"""Checkpoints: every file form, to and from transformers with equal bits, saving whole or not at all, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from alula.config import AutoConfig, GPTBigCodeConfig
from alula.models import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPTBigCodeForCausalLM,
    GPTBigCodeForSequenceClassification,
    GPTBigCodeModel,
)
from alula.weights import Checkpoint, parse_size, plan_shards
from checkpoint_cases import load, reference, same, save, tensors
from decoder_cases import alula_model, random_ids, worst


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    """A warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small model's config.json and no weights."""
    reference().config.save_pretrained(tmp_path)
    return tmp_path


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("multi_query", [True, False], ids=["mq", "mh"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_to_and_from_transformers_with_equal_bits(
    tmp_path: Path, multi_query: bool, tied: bool, dtype: torch.dtype
) -> None:
    import copy

    theirs = copy.deepcopy(reference(multi_query=multi_query, tie_word_embeddings=tied)).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert isinstance(ours, GPTBigCodeForCausalLM)
    assert ours.dtype == ours.config.dtype == dtype
    assert same(ours.state_dict(), theirs.state_dict())
    for size in ("50GB", 9000):
        ours.save_pretrained(tmp_path / "ours", max_shard_size=size)
        back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(info.values())
        assert back.dtype == dtype
        assert back.config.architectures == ["GPTBigCodeForCausalLM"]
        assert same(dict(back.state_dict()), theirs.state_dict())
        assert same(load(tmp_path / "ours").state_dict(), theirs.state_dict())
    first = sorted(p.name for p in (tmp_path / "ours").iterdir())
    assert "model.safetensors" not in first, "the single file of the first save would be preferred"
    assert "model.safetensors.index.json" in first
    shards = [p for p in (tmp_path / "ours").iterdir() if p.suffix == ".safetensors"]
    assert len(shards) > 3
    assert all(len(safetensors.torch.load_file(p)) == 1 or p.stat().st_size < 9000 + 2000 for p in shards)
    ours.save_pretrained(tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").glob("*model*")) == ["model.safetensors"]


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy bin"])
def test_every_file_form(folder: Path, form: str, sharded: bool) -> None:
    state = tensors()
    names = list(state)
    parts = [names[::2], names[1::2]] if sharded else [names]
    weight_map = {}
    for i, part in enumerate(parts):
        stem = f"-{i + 1:05d}-of-00002" if sharded else ""
        values = {name: state[name] for name in part}
        if form == "safetensors":
            file = f"model{stem}.safetensors"
            save(values, folder, file)
        else:
            file = f"pytorch_model{stem}.bin"
            torch.save(values, folder / file, _use_new_zipfile_serialization=form == "bin")
        weight_map.update(dict.fromkeys(part, file))
    if sharded:
        index = "model.safetensors.index.json" if form == "safetensors" else "pytorch_model.bin.index.json"
        weight_map["lm_head.weight"] = weight_map["transformer.wte.weight"]  # a tied alias that no shard holds
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(load(folder).state_dict(), reference().state_dict())


def test_file_order(folder: Path) -> None:
    """safetensors, its index, then pytorch_model.bin, its index: each is found once those before it are gone."""
    state = tensors()
    files = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for i, file in enumerate(files):
        marked = {**state, "transformer.ln_f.bias": torch.full((48,), float(i))}
        if file.endswith("safetensors"):
            save(marked, folder)
        elif file.endswith("bin"):
            torch.save(marked, folder / file)
        else:
            shard = f"shard-{i}.{'safetensors' if i == 1 else 'bin'}"
            save(marked, folder, shard) if i == 1 else torch.save(marked, folder / shard)
            (folder / file).write_text(json.dumps({"weight_map": dict.fromkeys(marked, shard)}))
    for i, file in enumerate(files):
        assert load(folder).transformer.ln_f.bias[0] == i
        (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights; looked for model\.safetensors, .*bin\.index\.json"):
        load(folder)


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_prefix_may_be_there_or_not(folder: Path, prefixed: bool) -> None:
    state = {n if prefixed else n.removeprefix("transformer."): v for n, v in tensors().items()}
    save(state, folder)
    assert same(load(folder).state_dict(), reference().state_dict())
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base, GPTBigCodeModel)
    assert torch.equal(base.wte.weight, reference().transformer.wte.weight)
    base.save_pretrained(folder / "base")
    theirs, info = transformers.GPTBigCodeModel.from_pretrained(folder / "base", output_loading_info=True)
    assert not any(info.values())
    assert same(dict(theirs.state_dict()), base.state_dict())


def test_old_buffers_are_ignored_and_biases_are_not(folder: Path) -> None:
    state = tensors()
    state["transformer.bias"] = torch.ones(64, 64, dtype=torch.bool)
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save(state, folder)
    assert same(load(folder).state_dict(), reference().state_dict())
    del state["transformer.h.1.attn.c_attn.bias"]
    save(state, folder)
    with pytest.raises(ValueError, match=r"missing: transformer\.h\.1\.attn\.c_attn\.bias$"):
        load(folder)


def test_tied_alias(folder: Path) -> None:
    state = tensors()
    save({**state, "lm_head.weight": state["transformer.wte.weight"].clone()}, folder)
    assert same(load(folder).state_dict(), reference().state_dict())
    other = torch.randn(61, 48)
    save({**state, "lm_head.weight": other}, folder)
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from transformer\.wte\.weight.*wte\.weight is used"):
        assert same(load(folder).state_dict(), reference().state_dict())
    only = {n: v for n, v in state.items() if n != "transformer.wte.weight"}
    save({**only, "lm_head.weight": other}, folder)  # the table saved under its other name
    assert torch.equal(load(folder).transformer.wte.weight, other)
    save({**state, "lm_head.weight": torch.randn(60, 48)}, folder)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[60, 48\], but is tied to .* \[61, 48\]"):
        load(folder)
    save(state, folder)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load(folder, tie_word_embeddings=False)


def test_heads_of_other_tasks(folder: Path) -> None:
    save({**tensors(), "extra.weight": torch.zeros(2)}, folder)
    with pytest.warns(UserWarning, match=r"tensors not used by GPTBigCodeForCausalLM: extra\.weight"):
        load(folder)
    save(tensors(), folder)
    with pytest.warns(UserWarning, match=r"lacks score\.weight: initialised at random"):
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4, problem_type="regression")
    assert model.score.weight.shape == (4, 48)
    assert model.config.problem_type == "regression"
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias"):
        model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(folder / "tokens")
    back = AutoModelForTokenClassification.from_pretrained(folder / "tokens")
    assert back.config.num_labels == 3
    assert same(back.state_dict(), model.state_dict())
    theirs = transformers.GPTBigCodeForTokenClassification.from_pretrained(folder / "tokens")
    assert same(dict(theirs.state_dict()), model.state_dict())


def test_tensors_that_the_index_forgot_are_found(folder: Path) -> None:
    state = tensors()
    save(state, folder, "a.safetensors")
    index = {"weight_map": {name: "a.safetensors" for name in state if "wpe" not in name and "ln_f" not in name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = load(folder).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in state.items())


def test_dtype_and_device_arguments(folder: Path) -> None:
    save({n: v.bfloat16() for n, v in tensors().items()}, folder)
    for dtype in (None, "auto", "bfloat16", torch.bfloat16):
        assert load(folder, dtype=dtype).dtype == torch.bfloat16
    assert load(folder, torch_dtype=torch.float32).dtype == torch.float32
    wide = load(folder, dtype="float32", device="cpu")
    assert torch.equal(wide.transformer.wte.weight, tensors()["transformer.wte.weight"].bfloat16().float())
    assert load(folder, dtype=torch.float16).state_dict()["transformer.wpe.weight"].dtype == torch.float16
    mixed = {n: v.bfloat16() if v.dim() == 2 else v for n, v in tensors().items()}
    save(mixed, folder)
    assert load(folder).dtype == torch.bfloat16
    for kwargs, message in (
        ({"dtype": torch.float64}, r"dtype torch\.float64 is not supported; accepted: float32, bfloat16, float16"),
        ({"dtype": "int8"}, r"'int8' is not a floating-point dtype"),
        ({"dtype": "fast"}, r"'fast' is not"),
        ({"device": "cuda"}, r"device 'cuda' .*accepted: cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            load(folder, **kwargs)
    with pytest.raises(TypeError, match="unknown arguments: n_layers"):
        load(folder, n_layers=3)
    with pytest.raises(TypeError, match=r'unknown arguments: device_map \(here: device="cuda"\), foo$'):
        load(folder, device_map="auto", foo=1)


def test_arguments_about_downloading_change_nothing(folder: Path) -> None:
    save(tensors(), folder)
    about = {"trust_remote_code": True, "local_files_only": True, "revision": "main", "token": None, "cache_dir": "x"}
    model = load(folder, **about, low_cpu_mem_usage=True)
    assert model.config == load(folder).config
    for config in (AutoConfig.from_pretrained(folder, **about), GPTBigCodeConfig.from_pretrained(folder, **about)):
        assert not about.keys() & config.to_dict().keys()


def santacoder_files(folder: Path) -> Any:
    """The multi-query small model as bigcode/santacoder's original files have it; returns the model."""
    model = reference(multi_query=True, activation_function="gelu_fast")
    config = {k: getattr(model.config, k) for k in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    config |= {"model_type": "gpt2", "attention_head_type": "multiquery", "activation_function": "gelu_fast"}
    config |= {"n_inner": 70, "scale_attn_weights": model.config.scale_attn_weights}
    config |= {"layer_norm_epsilon": model.config.layer_norm_epsilon, "architectures": ["GPT2LMHeadCustomModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    state = {}
    for name, value in model.state_dict().items():
        if ".c_attn." in name:
            value = value.T if name.endswith("weight") else value
            state[name.replace("c_attn", "q_attn")] = value[..., :48].contiguous()
            state[name.replace("c_attn", "kv_attn")] = value[..., 48:].contiguous()
        elif ".h." in name and name.endswith("weight") and ".ln_" not in name:
            state[name] = value.T.contiguous()
        else:
            state[name] = value.clone()
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save(state, folder)
    return model


def test_original_santacoder_layout(tmp_path: Path) -> None:
    theirs = santacoder_files(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(ours.state_dict(), theirs.state_dict())
    ids = random_ids(ours, 2, 9)
    assert worst(ours(ids).logits, theirs(ids).logits) <= 2e-4
    ours.save_pretrained(tmp_path / "new")  # in the layout that transformers reads
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert same(dict(back.state_dict()), theirs.state_dict())
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["transformer.h.1.attn.kv_attn.bias"]
    save(state, tmp_path)
    with pytest.raises(ValueError, match=r"h\.1\.attn\.q_attn\.bias' and no .*kv_attn\.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    state["transformer.h.1.attn.kv_attn.bias"] = torch.zeros(33)
    save(state, tmp_path)
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn\.bias has shape \[81\], .* asks for \[80\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = alula_model(reference())
    model.save_pretrained(tmp_path, max_shard_size=9000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = alula_model(reference())
    other.transformer.ln_f.bias = torch.zeros(48)
    import alula.weights

    write = alula.weights.write_safetensors
    calls = []

    def fail_late(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            Path(args[0]).write_bytes(b"half")
            raise OSError("disk full")
        write(*args)

    monkeypatch.setattr(alula.weights, "write_safetensors", fail_late)
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path, max_shard_size=9000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    file = tmp_path / "config.json"
    with pytest.raises(ValueError, match="is not a folder"):
        model.save_pretrained(file)


def test_shard_sizes() -> None:
    assert [parse_size(s) for s in (7, "3B", "5KB", "2MB", "1.5GB", "1GiB", " 2 kib ")] == [
        7,
        3,
        5000,
        2_000_000,
        1_500_000_000,
        2**30,
        2048,
    ]
    for wrong in (0, -1, "5", "GB", "-3MB", "0GB", 2.5, None, True):
        with pytest.raises(ValueError, match=r"max_shard_size=.*accepted"):
            parse_size(wrong)
    assert plan_shards({"a": 5, "b": 5, "c": 11, "d": 1, "e": 9, "f": 1}, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    model = alula_model(reference())
    with pytest.raises(ValueError, match="max_shard_size='much'"):
        model.save_pretrained("/nonexistent/never-made", max_shard_size="much")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_loading_peaks_below_1_3_times_the_checkpoint(tmp_path: Path, form: str) -> None:
    """The peak of resident memory, which counts mapped file pages, above an interpreter with torch imported."""
    config = GPTBigCodeConfig(vocab_size=16384, n_positions=256, n_embd=768, n_layer=6, n_head=6, multi_query=False)
    model = GPTBigCodeForCausalLM(config, dtype=torch.bfloat16, init_weights=False)
    for slot in model.weight_slots().values():
        slot.write(torch.full(slot.shape, 0.01, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path, max_shard_size="20MB" if form == "sharded" else "50GB")
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert size > 100e6
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    del model
    script = f"""
        import alula.models, torch
        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
        torch.zeros(1)
        before = peak()
        model = alula.models.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
        assert model.dtype == torch.bfloat16
        print(peak() - before)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, env=os.environ
    )
    grown = int(out.stdout.split()[-1])
    assert 0.9 * size < grown < 1.3 * size, f"{grown / size:.2f} x the checkpoint"


def test_checkpoint_reads_through_one_map(folder: Path) -> None:
    save(tensors(), folder)
    checkpoint = Checkpoint(folder)
    one, again = checkpoint.read("transformer.wpe.weight"), checkpoint.read("transformer.wpe.weight")
    assert one.data_ptr() == again.data_ptr()
    with pytest.raises(ValueError, match="does not fit"):
        GPTBigCodeForSequenceClassification.from_pretrained(folder, vocab_size=60)
