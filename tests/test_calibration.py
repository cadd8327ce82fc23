"""Calibrated quantization of models: each product is nearer on the text than without; folders; what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import alula
import pytest
import torch
from alula.calibration import calibration_ids
from alula.cli import main
from alula.models import matrix
from alula.models.matrix import matrices
from alula.testing import quantized
from decoder_cases import LANGUAGE_MODELS
from quantized_cases import FORMATS
from test_quantized_models import fresh, original
from torch import Tensor

FOUR_BITS = [case for case in FORMATS if case[0] != "int8"]
CASES = [(cls, *case) for cls in LANGUAGE_MODELS for case in FOUR_BITS]


def text_ids(model: Any, count: int = 1500, seed: int = 3) -> Tensor:
    """Ids that follow from each other, with tokens that never occur."""
    draw = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    steps = torch.randint(0, 3, (count,), generator=draw)
    return (steps.cumsum(0) * 7) % (vocab - 20)


class Recorded:
    """Everything that pack_calibrated was asked and gave back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, Tensor, Any]] = []
        pack = matrix.pack_calibrated

        def record(value: Tensor, format: str, group_size: int, activations: str, h: Tensor) -> Any:
            before = h.clone()
            packed = pack(value, format, group_size, activations, h)
            self.calls.append((value.clone(), before, packed))
            return packed

        monkeypatch.setattr(matrix, "pack_calibrated", record)


def product_error(value: Tensor, h: Tensor, packed: Any) -> float:
    """||(W - Q) X^T|| from the second moment."""
    off = value.double() - quantized.dequantize(packed)
    return float(((off @ h.double()) * off).sum().clamp(min=0).sqrt())


@pytest.mark.parametrize(("cls", "name", "group_size"), CASES)
def test_products_and_logits_are_nearer(
    cls: str, name: str, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    ids = text_ids(original(cls))
    model = fresh(cls).quantize(name, group_size=group_size, activations="full", calibration=ids)
    plain = fresh(cls).quantize(name, group_size=group_size, activations="full")
    per_block = 2 if cls.startswith("CodeGen") else 4
    assert len(recorded.calls) == 2 * per_block + 1
    for value, h, packed in recorded.calls:
        before = alula.ops.pack(value, name, group_size)
        assert product_error(value, h, packed) < product_error(value, h, before)
    for ours, theirs in zip(matrices(model), matrices(plain), strict=True):
        assert ours.stored().data.shape == theirs.stored().data.shape
        assert ours.stored()[1:] == theirs.stored()[1:]
    unseen = text_ids(model, 240, seed=4).view(4, 60)
    exact = original(cls)(unseen).logits
    errors = [float((m(unseen).logits - exact).norm()) for m in (model, plain)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_second_moments_are_those_of_the_products_inputs(cls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first block's first product, seen through the quantized table; of the output projection; and after a
    block, the stream is what the model makes of it."""
    recorded = Recorded(monkeypatch)
    ids = text_ids(original(cls))
    model = fresh(cls).quantize("int4", activations="full", calibration=ids, keep=["h.1"])
    base, dense = model.base_model, original(cls).base_model
    rows = [row[None] for row in ids.split(64)]

    def moment(inputs: list[Tensor]) -> Tensor:
        x = torch.cat([part[0] for part in inputs]).double()
        return x.T @ x

    def near(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    hidden = [base(row, output_hidden_states=True).hidden_states for row in rows]
    by_shape = {tuple(value.shape): h for value, h, _ in recorded.calls}
    first = recorded.calls[1 if model.lm_head.is_tied else 0][1]
    near(first, moment([base.h[0].ln_1(states[0]) for states in hidden]))
    source = dense if model.lm_head.is_tied else base
    near(by_shape[model.config.vocab_size, 96], moment([source(row).last_hidden_state for row in rows]))


def test_inputs_of_later_products_come_from_quantized_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    ids = text_ids(original("GPT2LMHeadModel"))
    model = fresh("GPT2LMHeadModel").quantize("int4", activations="full", calibration=ids)
    block = model.base_model.h[1]
    x = torch.cat([model(r[None], output_hidden_states=True).hidden_states[1][0] for r in ids.split(64)]).double()
    x = block.ln_1(x.float()).double()
    expected = x.T @ x
    torch.testing.assert_close(recorded.calls[4][1].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_folder_and_determinism(cls: str, tmp_path: Path) -> None:
    ids = text_ids(original(cls))
    model, again = (fresh(cls, torch.bfloat16).quantize("int4", calibration=ids) for _ in range(2))
    for ours, theirs in zip(matrices(model), matrices(again), strict=True):
        assert torch.equal(ours.stored().data, theirs.stored().data)
    model.save_pretrained(tmp_path / "q")
    fresh(cls, torch.bfloat16).quantize("int4").save_pretrained(tmp_path / "plain")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("q", "plain")]
    assert abs(sizes[0] - sizes[1]) < 512  # the digits of relative errors
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("q", "plain")]
    assert configs[0] == configs[1]
    loaded = type(model).from_pretrained(tmp_path / "q")
    x = text_ids(model, 40)[None]
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert [r.relative_error for r in loaded.quantization_report().rows] == [
        r.relative_error for r in model.quantization_report().rows
    ]


def test_keep_rows_and_modes() -> None:
    cls = "GPTBigCodeForCausalLM"
    ids = text_ids(original(cls), 1536)
    model = fresh(cls).quantize("int4", calibration=ids, keep=["lm_head", "c_fc"])
    formats = {row.layer.split(".")[-2]: row.format for row in model.quantization_report().rows}
    assert formats["wte"] == formats["c_fc"] == "float32"
    assert formats["c_attn"] == formats["c_proj"] == "int4, groups of 64"
    for given in (ids.view(-1, 64), ids.int(), ids.tolist()):  # rows of the model's length are what a text is cut into
        other = fresh(cls).quantize("int4", calibration=given, keep=["lm_head", "c_fc"])
        assert torch.equal(other(ids[None, :30]).logits, model(ids[None, :30]).logits)
    with torch.inference_mode():
        other = fresh(cls).train().quantize("int4", calibration=ids, keep=["lm_head", "c_fc"])
    assert torch.equal(other.eval()(ids[None, :30]).logits, model(ids[None, :30]).logits)
    seen = []
    fresh(cls).quantize("int4", calibration=ids, progress=lambda found: seen.extend(found) or found)
    assert [m.name for m in seen] == [m.name for m in matrices(model)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_settings_change_nothing(dtype: torch.dtype) -> None:
    """A default dtype, and autocast, which would round products of more than 1024 inputs."""
    config = alula.GPT2Config(vocab_size=90, n_embd=64, n_layer=1, n_head=2, n_positions=32, n_inner=1100)
    torch.manual_seed(2)
    model = alula.GPT2LMHeadModel(config)
    ids = text_ids(model, 1200)
    expected = copy.deepcopy(model).quantize("int4", calibration=ids)
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model.quantize("int4", calibration=ids)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(matrices(model), matrices(expected), strict=True):
        assert torch.equal(ours.stored().data, theirs.stored().data)


def test_other_heads() -> None:
    config = alula.GPT2Config(vocab_size=90, n_embd=64, n_layer=1, n_head=2, n_positions=32, num_labels=40)
    torch.manual_seed(1)
    model = alula.GPT2ForTokenClassification(config)
    exact = model(text_ids(model, 30)[None]).logits
    model.quantize("int4", group_size=32, calibration=text_ids(model, 400))
    assert [row.format for row in model.quantization_report().rows] == ["int4, groups of 32"] * 6
    assert (model(text_ids(model, 30)[None]).logits - exact).norm() < 0.3 * exact.norm()
    base = alula.CodeGenModel(alula.CodeGenConfig(vocab_size=90, n_embd=64, n_layer=1, n_head=4, rotary_dim=8))
    assert base.quantize("nf4", calibration=text_ids(base, 400)).is_quantized


def test_refusals() -> None:
    cls = "GPTBigCodeForCausalLM"
    model = fresh(cls)
    ids = text_ids(model)
    for format, given, words in (
        ("int8", ids, "calibration is for int4, int4_asymmetric and nf4; int8"),
        ("int4", ids[:0], r"calibration is torch.int64 \[0\]; accepted: token ids of a text"),
        ("int4", ids.float(), r"calibration is torch.float32 \[1500\]"),
        ("int4", ids.view(1, 3, 500), r"accepted: token ids of a text, int64 \[n\] or \[rows, n\]"),
        ("int4", ids + 100, "calibration holds token 2..; accepted: 0 to 160"),
        ("int4", ids - 100, "calibration holds token -100; accepted: 0 to 160"),
        ("int4", ids[:229], "has 229 tokens, and the widest matrix multiplies 230 values: give at least 230 tokens"),
        ("int5", ids, "quantize='int5'"),
    ):
        with pytest.raises(ValueError, match=words):
            model.quantize(format, calibration=given)
        assert not model.is_quantized
        assert getattr(model.config, "quantization_config", None) is None
    before = model(ids[None, :20]).logits
    assert torch.equal(before, original(cls)(ids[None, :20]).logits)
    bird = fresh("BigBirdForMaskedLM")
    with pytest.raises(ValueError, match=r"GPTBigCode, GPT-2 and CodeGen without cross-attention.* BigBirdForMaskedLM"):
        bird.quantize("int4", calibration=ids)
    config = alula.GPT2Config(vocab_size=90, n_embd=64, n_layer=1, n_head=2, n_positions=32, add_cross_attention=True)
    with pytest.raises(ValueError, match="without cross-attention, not for this GPT2LMHeadModel"):
        alula.GPT2LMHeadModel(config).quantize("int4", calibration=ids)
    model.quantize("int4", calibration=ids)
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize("int4", calibration=ids)


@pytest.mark.parametrize("given", ["def f(x):", ["a", "b"], [[1, 2], [3]], {"input_ids": [1, 2]}, [None], iter([1])])
def test_what_is_no_tensor_is_refused_by_name(given: Any) -> None:
    model = fresh("GPTBigCodeForCausalLM")
    words = rf"calibration is a {type(given).__name__} that is no tensor \(.*\); accepted: token ids of a text, int64"
    with pytest.raises(ValueError, match=words):
        model.quantize("int4", calibration=given)
    assert not model.is_quantized


@pytest.mark.parametrize("change", [lambda found: found[:3], lambda found: found[::-1], lambda found: [*found, 1]])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_progress_that_leaves_matrices_out_is_refused(change: Any, calibrated: bool) -> None:
    model = fresh("GPTBigCodeForCausalLM")
    ids = text_ids(model)
    with pytest.raises(ValueError, match="progress must give back all 9 matrices"):
        model.quantize("int4", calibration=ids if calibrated else None, progress=change)
    for found in matrices(model):  # what was not reached is dense, and says so
        assert found.is_quantized == bool(found.layers[0].stored("weight").code)
    assert model(ids[None, :20]).logits.isfinite().all()


def test_activations_that_are_not_finite_are_refused() -> None:
    model = fresh("GPT2LMHeadModel")
    name = "transformer.h.1.mlp.c_fc"
    bias = model.get_submodule(name).bias.clone()
    bias[3] = torch.inf
    model.get_submodule(name).bias = bias
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_proj\.weight cannot be quantized: its inputs are not finite"):
        model.quantize("int4", calibration=text_ids(model))


@pytest.mark.parametrize("cls", LANGUAGE_MODELS)
def test_an_interrupt_leaves_a_model_that_works(cls: str, tmp_path: Path) -> None:
    ids = text_ids(original(cls))

    def stop_at(count: int) -> Any:
        def progress(found: list[Any]) -> Iterator[Any]:
            yield from found[:count]
            raise KeyboardInterrupt

        return progress

    model = fresh(cls)
    with pytest.raises(KeyboardInterrupt):
        model.quantize("int4", calibration=ids, progress=stop_at(0))
    assert not model.is_quantized
    assert torch.equal(model(ids[None, :20]).logits, original(cls)(ids[None, :20]).logits)
    with pytest.raises(KeyboardInterrupt):
        model.quantize("int4", calibration=ids, progress=stop_at(2))
    rows = [row.format for row in model.quantization_report().rows]
    assert rows.count("int4, groups of 64") == 2
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(ids[None, :20]).logits, model(ids[None, :20]).logits)


# --- the command -----------------------------------------------------------------------------------------------------

TINY = Path(alula.__file__).parent / "assets" / "tiny-python"
QUANTIZE = ["quantize", str(TINY)]


def test_choice_of_tokens() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = alula.AutoTokenizer.from_pretrained(TINY)
    texts = [Path(file).read_text() for file in (alula.cache.__file__, alula.cli.__file__)]
    whole = calibration_ids(tokenizer, texts, 10**6)
    starts = (whole == tokenizer.bos_token_id).nonzero().flatten().tolist()
    assert starts == [0, 1 + len(tokenizer.encode(texts[0], verbose=False))]
    some = calibration_ids(tokenizer, texts, 1000)
    assert torch.equal(some, torch.cat([whole[:512], whole[512 * (len(whole.split(512)) // 2) :][:488]]))
    assert len(calibration_ids(tokenizer, texts)) == len(whole) < 16384
    with pytest.raises(ValueError, match="has no token"):
        calibration_ids(tokenizer, [""])
    with pytest.raises(ValueError, match="0 calibration tokens"):
        calibration_ids(tokenizer, texts, 0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    text = alula.cli.__file__
    out, plain = tmp_path / "out", tmp_path / "plain"
    options = ["--format", "int4_asymmetric", "--group-size", "32", "--keep", "h.3"]
    assert main([*QUANTIZE, str(out), *options, "--calibration", text, "--calibration-tokens", "1500"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert "int4_asymmetric, groups of 32" in captured.out
    assert main([*QUANTIZE, str(plain), *options]) == 0
    capsys.readouterr()
    assert {file.name for file in out.iterdir()} == {file.name for file in plain.iterdir()}
    assert (out / "config.json").read_text() == (plain / "config.json").read_text()
    scores = []
    for model in (TINY, out, plain):
        assert main(["evaluate", "--json", "--model", str(model), "--text", text]) == 0
        scores.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert scores[1] < scores[2]
    tokenizer = alula.AutoTokenizer.from_pretrained(TINY)
    ids = calibration_ids(tokenizer, [Path(text).read_text()], 1500)
    here = alula.AutoModelForCausalLM.from_pretrained(TINY)
    here.quantize("int4_asymmetric", group_size=32, keep=["h.3"], calibration=ids)
    loaded = alula.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(ids[None, :50]).logits, here(ids[None, :50]).logits)


def test_the_default_is_as_many_tokens_as_the_widest_matrix_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(alula.calibration, "CALIBRATION_TOKENS", 100)
    given: list[int] = []
    choose = alula.calibration.calibration_ids
    monkeypatch.setattr(alula.calibration, "calibration_ids", lambda *args: given.append(args[2]) or choose(*args))
    command = [*QUANTIZE, str(tmp_path / "out"), "--format", "nf4", "--keep", "h", "--calibration", alula.cli.__file__]
    assert main(command) == 0, capsys.readouterr().err
    assert given == [768]


def test_command_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    short, empty, binary = tmp_path / "short", tmp_path / "empty", tmp_path / "binary"
    short.write_text("def f(x):\n    return x\n")
    empty.write_text("")
    binary.write_bytes(b"ab\xff")
    out = str(tmp_path / "out")
    for options, words in (
        (["int8", "--calibration", short], "--calibration goes with int4, int4_asymmetric and nf4; int8"),
        (["int4", "--calibration-tokens", "99"], "--calibration-tokens goes with --calibration FILE"),
        (["int4", "--calibration", empty], "--calibration .*empty is empty"),
        (["int4", "--calibration", binary], "binary is not UTF-8 text: byte 0xff at 2"),
        (["int4", "--calibration", tmp_path / "none"], "--calibration .*none cannot be read"),
        (["int4", "--calibration", short], "has 10 tokens, and the widest matrix multiplies 768 values"),
        (["int4", "--calibration", alula.cli.__file__, "--calibration-tokens", "700"], "has 700 tokens"),
        (["int4", "--calibration", short, "--calibration-tokens", "0"], "--calibration-tokens 0; accepted: 1 and more"),
        (["int4", "--calibration", ""], "--calibration has an empty name"),
    ):
        assert main([*QUANTIZE, out, "--format", *map(str, options)]) == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert re.search(words, captured.err)
    alula.AutoModelForCausalLM.from_pretrained(TINY).quantize("int8").save_pretrained(tmp_path / "int8")
    for file in TINY.glob("*.json"):
        if file.name.startswith(("tokenizer", "special")):
            (tmp_path / "int8" / file.name).write_bytes(file.read_bytes())
    arguments = ["quantize", str(tmp_path / "int8"), out, "--format", "int4", "--calibration", alula.cli.__file__]
    assert main(arguments) == 2
    assert "quantized already" in capsys.readouterr().err
    assert not Path(out).exists()


def test_ctrl_c_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    pack, calls = matrix.pack_calibrated, []

    def interrupt(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pack(*arguments)

    monkeypatch.setattr(matrix, "pack_calibrated", interrupt)
    text = alula.cli.__file__
    assert main([*QUANTIZE, str(tmp_path / "out"), "--format", "int4", "--calibration", text]) == 130
    assert "stopped by Ctrl-C" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
