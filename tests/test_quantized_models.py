"""Quantized models: against a dense model of the same values, against the original, rows of batches, folders."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import alula
import big_bird_cases
import decoder_cases
import pytest
import torch
from alula.models.layers import _OnDevice
from alula.models.matrix import matrices
from alula.testing.quantized import dequantize
from decoder_cases import LANGUAGE_MODELS, alula_model, hf_model, random_ids, worst
from quantized_cases import FORMATS
from torch import Tensor

SIZES = {"n_embd": 96, "n_head": 4, "n_layer": 2, "vocab_size": 161, "n_inner": 230, "n_positions": 64}
BIRD = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "block_size": 16}
# Difference of all logits to the original model's, as a share of these (2-norms): random weights, of
# which 4 bits keep little.
LOOSE = {"int8": 0.1, "int4": 0.5, "int4_asymmetric": 0.5, "nf4": 0.5}


@functools.lru_cache(maxsize=8)
def original(cls: str) -> Any:
    """A small dense model of each family; not to be changed."""
    if cls.startswith("BigBird"):
        is_decoder = cls == "BigBirdForCausalLM"
        return big_bird_cases.alula_model(big_bird_cases.hf_model(3, cls, **BIRD, is_decoder=is_decoder))
    extra = {"rotary_dim": 16} if cls.startswith("CodeGen") else {"tie_word_embeddings": cls.startswith("GPTBig")}
    return alula_model(hf_model(3, cls, **SIZES, **extra))


def fresh(cls: str, dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(original(cls)).to(dtype)


def dense_of(model: Any) -> Any:
    """A dense float32 model with the values that the bytes of a quantized one mean."""
    state = model.state_dict()
    for alias in model.tied_aliases():
        del state[alias]
    for matrix in matrices(model):
        if matrix.is_quantized:
            whole, first = dequantize(matrix.stored()).float(), 0
            for name, layer in zip(matrix.names, matrix.layers, strict=True):
                count = layer.shapes["weight"][0] if matrix.dim == 0 else layer.in_features
                if len(matrix.names) == 1:
                    count = whole.shape[0]
                state[name] = layer._to_checkpoint(whole.narrow(matrix.dim, first, count).contiguous())
                first += count
    dense = type(model)(copy.deepcopy(model.config), dtype=torch.float32, init_weights=False)
    dense.load_state_dict({name: value.float() for name, value in state.items()})
    assert not dense.is_quantized
    return dense


def outputs(model: Any, batch: int = 2, tokens: int = 13) -> Tensor:
    cases = big_bird_cases if model.config.model_type == "big_bird" else decoder_cases
    return model(cases.random_ids(model, batch, tokens))[0]


CASES = [(cls, *case) for cls in LANGUAGE_MODELS for case in FORMATS]
CASES += [(cls, "int8", None) for cls in ("BigBirdForMaskedLM", "BigBirdForCausalLM", "BigBirdForQuestionAnswering")]
CASES += [("BigBirdForMaskedLM", "int4", 32), ("GPT2ForSequenceClassification", "int8", None)]


@pytest.mark.parametrize(("cls", "name", "group_size"), CASES)
def test_against_a_dense_model_of_the_same_values_and_the_original(cls: str, name: str, group_size: int | None) -> None:
    before = outputs(original(cls))
    model = fresh(cls).quantize(name, group_size=group_size, activations="full")
    dense = dense_of(model)
    found, expected = outputs(model), outputs(dense)
    assert worst(found, expected) <= 2e-5 * max(1.0, expected.abs().max().item())
    assert torch.equal(found, outputs(model))
    # The whole output: which single logit is farthest off is chance, not the format's doing.
    assert 0 < float((found - before).norm()) <= LOOSE[name] * float(before.norm())
    model.set_activations("int8")
    rounded = outputs(model)
    assert 0 < float((rounded - expected).norm()) <= LOOSE["int8"] * float(expected.norm())
    assert not torch.equal(rounded, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_other_dtypes(cls: str, dtype: torch.dtype) -> None:
    """Twice the error of the dense model of the same values in the same dtype, and a floor."""
    model = fresh(cls, dtype).quantize("int4", activations="full")
    exact = dense_of(model)
    found, expected, rounded = outputs(model), outputs(exact), outputs(exact.to(dtype))
    assert found.dtype == dtype
    assert worst(found, expected) <= 2 * worst(rounded, expected) + 0.01 * expected.abs().max().item()
    wide = model.to(torch.float32)
    assert wide.dtype == torch.float32
    assert wide.is_quantized
    assert worst(outputs(wide), expected) <= 2e-5 * expected.abs().max().item()


@pytest.mark.parametrize(("cls", "name"), [(c, n) for c in LANGUAGE_MODELS for n in ("int8", "int4", "nf4")])
def test_a_row_of_a_batch_is_the_row_alone(cls: str, name: str) -> None:
    model = fresh(cls).quantize(name)
    ids = random_ids(model, 5, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[3, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(5):
        start = 12 - int(mask[row].sum())
        assert torch.equal(model(ids[row : row + 1, start:]).logits[0], together[row, start:])
    cache = model(ids[:1, :7], use_cache=True).past_key_values
    steps = [model(ids[:1, i : i + 1], past_key_values=cache).logits for i in range(7, 12)]
    assert torch.equal(torch.cat(steps, 1), model(ids[:1]).logits[:, 7:])


@pytest.mark.parametrize(("cls", "name"), [(c, n) for c in LANGUAGE_MODELS for n in ("int8", "int4_asymmetric")])
def test_greedy_generation(cls: str, name: str) -> None:
    model = fresh(cls).quantize(name)
    ids = random_ids(model, 2, 6)
    tokens = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 15)
    for step in range(6, 15):
        assert torch.equal(model(tokens[:, :step]).logits[:, -1].argmax(-1), tokens[:, step])


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_op_by_op_and_in_one_call(cls: str) -> None:
    """Hidden states and attentions are collected between the ops of a block."""
    model = fresh(cls).quantize("int4", group_size=32)
    ids = random_ids(model, 2, 9)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(out.logits, model(ids).logits)
    padded = torch.cat([ids, ids[:, :2]], 1)
    mask = torch.ones_like(padded)
    mask[:, 9:] = 0
    assert torch.equal(model(padded, attention_mask=mask).logits[:, :9], out.logits)


def test_cross_attention() -> None:
    values = {**SIZES, "add_cross_attention": True}
    plain = alula_model(hf_model(5, "GPT2LMHeadModel", **values))
    model = copy.deepcopy(plain).quantize("int8", activations="full")
    ids, states = random_ids(model, 2, 7), torch.randn(2, 5, 96)
    found = model(ids, encoder_hidden_states=states).logits
    expected = dense_of(model)(ids, encoder_hidden_states=states).logits
    assert worst(found, expected) <= 2e-5 * expected.abs().max().item()


@pytest.mark.parametrize(
    ("cls", "name", "group_size"),
    [(cls, *case) for cls in LANGUAGE_MODELS for case in FORMATS[::2]] + [("BigBirdForMaskedLM", "int8", None)],
)
def test_folder_round_trip(tmp_path: Path, cls: str, name: str, group_size: int | None) -> None:
    model = fresh(cls, torch.bfloat16).quantize(name, group_size=group_size, keep="h.1" if "Bird" not in cls else ())
    model.save_pretrained(tmp_path / "a", max_shard_size=40_000)
    back = getattr(alula, cls).from_pretrained(tmp_path / "a")
    assert back.is_quantized
    assert back.dtype == torch.bfloat16
    assert back.config.quantization_config == model.config.quantization_config
    for ours, theirs in zip(matrices(back), matrices(model), strict=True):
        assert ours.names == theirs.names
        assert ours.is_quantized == theirs.is_quantized
        if ours.is_quantized:
            assert ours.stored()[1:] == theirs.stored()[1:]
            assert torch.equal(ours.stored().data, theirs.stored().data)
            assert ours.stored().data.data_ptr() % 64 == 0
    assert torch.equal(outputs(back), outputs(model))
    rows = [(r.layer, r.format, r.bytes, r.relative_error) for r in back.quantization_report().rows]
    assert rows == [(r.layer, r.format, r.bytes, r.relative_error) for r in model.quantization_report().rows]
    back.save_pretrained(tmp_path / "b", max_shard_size=40_000)
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()
    }
    back.save_pretrained(tmp_path / "a")  # over the files that it is mapped from
    assert torch.equal(outputs(getattr(alula, cls).from_pretrained(tmp_path / "a")), outputs(model))
    assert torch.equal(outputs(back), outputs(model))


@pytest.mark.parametrize("cls", [*LANGUAGE_MODELS, "BigBirdForMaskedLM"])
@pytest.mark.parametrize("size", ["50GB", 30_000])
def test_quantized_while_loading_is_quantized_later(tmp_path: Path, cls: str, size: Any) -> None:
    model = fresh(cls)
    model.save_pretrained(tmp_path, max_shard_size=size)
    for name in ("int8", "int4_asymmetric"):
        loaded = getattr(alula, cls).from_pretrained(tmp_path, quantize=name, keep=["embeddings"])
        later = fresh(cls).quantize(name, keep=["embeddings"])
        assert str(loaded.quantization_report()) == str(later.quantization_report())
        assert torch.equal(outputs(loaded), outputs(later))
    again = fresh(cls).quantize("int8")
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again), outputs(fresh(cls).quantize("int8")))


def test_a_folder_in_other_classes_and_dtypes(tmp_path: Path) -> None:
    for cls, base in (("GPTBigCodeForCausalLM", "GPTBigCodeModel"), ("CodeGenForCausalLM", "CodeGenModel")):
        model = fresh(cls).quantize("int4", keep="lm_head")
        folder = tmp_path / cls
        model.save_pretrained(folder)
        ids = random_ids(model, 2, 5)
        if cls.startswith("CodeGen"):  # a head of its own
            with pytest.warns(UserWarning, match=r"not used by CodeGenModel: lm_head\.weight, lm_head\.bias"):
                bare = getattr(alula, base).from_pretrained(folder)
        else:
            bare = getattr(alula, base).from_pretrained(folder)
            assert not bare.wte.stored("weight").code
        assert torch.equal(bare(ids).last_hidden_state, model.transformer(ids).last_hidden_state)
        model.transformer.save_pretrained(folder / "base")
        again = getattr(alula, base).from_pretrained(folder / "base", dtype="bfloat16", activations="full")
        assert again.dtype == torch.bfloat16
        assert again.config.quantization_config["activations"] == "full"
        assert worst(again(ids).last_hidden_state, model.transformer(ids).last_hidden_state) < 0.3


def test_report() -> None:
    model = fresh("CodeGenForCausalLM").quantize("int4", group_size=32, keep=["lm_head", "h.1.mlp.fc_out"])
    report = model.quantization_report()
    by_name = {row.layer: row for row in report.rows}
    kept = "transformer.h.1.attn.out_proj.weight+transformer.h.1.mlp.fc_out.weight"
    assert [row.format for row in report.rows].count("int4, groups of 32") == 4
    assert by_name[kept].format == by_name["lm_head.weight"].format == "float32"
    assert by_name[kept].relative_error == 0.0
    assert by_name[kept].bytes == 4 * 96 * (96 + 230)
    table = by_name["transformer.wte.weight"]
    weight = original("CodeGenForCausalLM").transformer.wte.weight
    error = (model.transformer.wte.weight - weight).norm() / weight.norm()
    assert table.relative_error == pytest.approx(error.item(), rel=1e-5)
    assert table.shape == (161, 96)
    assert table.bytes == 6 * 3 * (64 + 32 * 16)
    state = original("CodeGenForCausalLM").state_dict()
    assert report.dense_bytes == sum(t.nbytes for t in state.values())
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "format", "shape", "bytes", "relative", "error"]
    assert len(lines) == 1 + 6 + 2
    assert report.to_dict()["total_bytes"] == report.total_bytes < 0.6 * report.dense_bytes
    model.transformer.wte.weight = weight
    assert model.quantization_report().rows[0].relative_error is None


def test_dequantize_and_back(tmp_path: Path) -> None:
    model = fresh("GPT2LMHeadModel").quantize("nf4", activations="full")
    before, state = outputs(model), model.state_dict()
    model.dequantize()
    assert not model.is_quantized
    assert worst(outputs(model), before) <= 2e-5 * before.abs().max().item()
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    model.quantize("int8")
    assert model.is_quantized


def test_keep() -> None:
    tied, untied = "GPTBigCodeForCausalLM", "GPT2LMHeadModel"

    def kept(cls: str, keep: Any) -> list[str]:
        model = fresh(cls).quantize("int8", keep=keep)
        names = [m.name for m in matrices(model) if not m.is_quantized]
        assert model.config.quantization_config["modules_to_not_convert"] == names
        return names

    table, head = "transformer.wte.weight", "lm_head.weight"
    assert kept(tied, ()) == kept(untied, ()) == []
    assert kept(tied, "lm_head") == kept(tied, "embeddings") == kept(tied, ["transformer.wte"]) == [table]
    assert kept(untied, "lm_head") == [head]
    assert kept(untied, ["embeddings", "lm_head"]) == [table, head]
    assert kept(untied, "h.1.mlp") == [f"transformer.h.1.mlp.{n}.weight" for n in ("c_fc", "c_proj")]
    assert kept("BigBirdForMaskedLM", "lm_head") == (
        ["bert.embeddings.word_embeddings.weight"]
        if original("BigBirdForMaskedLM").cls.predictions.decoder.is_tied
        else ["cls.predictions.decoder.weight"]
    )
    with pytest.raises(ValueError, match=r"keep names 'h\.7', which is no matrix of GPT2LMHeadModel; accepted"):
        kept(untied, "h.7")
    for labels, is_quantized in ((31, False), (32, True)):
        config = alula.GPT2Config(n_embd=64, n_head=2, n_layer=1, vocab_size=64, n_positions=8, num_labels=labels)
        classifier = alula.GPT2ForSequenceClassification(config).quantize("int8")
        assert bool(classifier.score.stored("weight").code) == is_quantized


def test_embeddings_of_a_quantized_model() -> None:
    model = fresh("GPTBigCodeForCausalLM").quantize("int8")
    table = torch.randn(170, 96)
    model.set_input_embeddings(table)
    assert model.lm_head.stored("weight").format == "int8"
    assert (model.transformer.wte.weight - table).norm() < 0.01 * table.norm()
    with pytest.raises(ValueError, match="quantized embeddings cannot change"):
        model.resize_token_embeddings(200)
    model.set_output_embeddings(table)
    assert model.lm_head.stored("weight").format == "int8"
    assert not model.lm_head.is_tied
    free = fresh("GPTBigCodeForCausalLM").quantize("int8", keep="embeddings")
    free.resize_token_embeddings(200)
    assert free(torch.tensor([[199]])).logits.shape == (1, 1, 200)


@pytest.mark.parametrize(("name", "dtype"), [("int8", "bfloat16"), ("int4", "bfloat16"), ("int4", "float32")])
def test_loading_peaks_below_the_quantized_size_and_one_tensor(tmp_path: Path, name: str, dtype: str) -> None:
    """The peak of resident memory, which counts mapped file pages, above an interpreter with torch imported."""
    config = alula.CodeGenConfig(vocab_size=16384, n_positions=256, n_embd=1024, n_layer=6, n_head=16, rotary_dim=32)
    model = alula.CodeGenForCausalLM(config, dtype=getattr(torch, dtype), init_weights=False)
    for slot in model.weight_slots().values():
        slot.write(torch.randn(slot.shape).to(model.dtype))
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    largest = max(slot.nbytes for slot in model.weight_slots().values())
    del model
    script = f"""
        import alula.models, torch
        def peak():
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
        torch.zeros(1)
        before = peak()
        model = alula.models.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, quantize={name!r})
        grown = peak() - before
        report = model.quantization_report()
        print(grown, report.total_bytes, report.dense_bytes)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, env=os.environ
    )
    grown, total, dense = map(int, out.stdout.split())
    # 40 MB: the code of the modules that loading imports, and the parts of a tensor that errors are measured on.
    assert total < grown < total + largest + 40e6, f"{grown / 1e6:.0f} MB for {total / 1e6:.0f} MB"
    assert dense > 1.8 * total


def test_layers_that_share_a_matrix_share_its_copy_on_a_device() -> None:
    """As `model.to` needs it: merged matrices stay one. The device is torch's "meta", which every machine has."""
    copies, meta, matrix = _OnDevice(), torch.device("meta"), torch.zeros(3)
    first = copies.copy(matrix, meta)
    assert first.device == meta
    assert copies.copy(torch.zeros(3), meta) is not first
    assert copies.copy(matrix, meta) is first
    assert copies.copy(matrix, torch.device("cpu")) is matrix
    assert copies.copy(first, meta) is first


def test_quantized_bytes_and_errors_stay_when_the_dtype_changes() -> None:
    model = fresh("CodeGenForCausalLM").quantize("int4")
    before, report = [m.stored().data for m in matrices(model) if m.is_quantized], model.quantization_report()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for data, matrix in zip(before, [m for m in matrices(model) if m.is_quantized], strict=True):
        assert matrix.stored().data is data
    errors = [row.relative_error for row in model.quantization_report().rows]
    assert errors == [row.relative_error for row in report.rows]
