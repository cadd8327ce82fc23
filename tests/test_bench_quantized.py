"""`alula bench model` with quantized weights: what each engine is held to, and that alula passes."""

import pytest
from alula.bench import model_rounds, presets, report
from alula.bench.run import main

pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", model_rounds.QUANTIZED)
def test_alula_is_right_and_timed(dtype, tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["--preset", "toy", "--dtype", dtype, "--quick", "--prompt-tokens", "16", "--threads", "1"]
    arguments += ["--peers", "hf-sdpa", "--cache", str(tmp_path / "cache"), "--json", str(path)]
    assert main(["model", *arguments]) == 0
    assert f"{dtype} weights are not measured with transformers" in capsys.readouterr().err
    decode, prefill = report.read_records(path)[1:]
    for record in (decode, prefill):
        assert (record["engine"], record["weights"], record["dtype"]) == ("alula", dtype, dtype)
        assert record["correct"]
        assert 0 < record["max_error"] < record["tolerance"]
    assert (decode["limit"], prefill["limit"]) == ("read", "int8_dot")
    names = {folder.name for folder in (tmp_path / "cache").iterdir()}
    assert names == {"toy-bf16-20", f"toy-bf16-20-{dtype}-dequantized"}


def test_a_step_reads_fewer_bytes():
    config = presets.PRESETS["gpt2"]
    bf16, int8, int4 = (
        presets.step_bytes(config, model_rounds.ELEMENT_BYTES[dtype], 1, 0) for dtype in ("bf16", "int8", "int4")
    )
    assert bf16 == 2 * int8
    assert int4 == int8 * 17 // 32
    keys = presets.step_bytes(config, 1, 1, 100) - int8
    assert keys == presets.step_bytes(config, 2, 1, 100) - bf16


@pytest.mark.parametrize(("dtype", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_gguf_has_the_peers_formats(dtype, kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    from alula.bench import model_folder
    from alula.bench.peers.gguf_writer import write_gguf

    folder = model_folder.ensure(tmp_path, "toy", "bf16")
    write_gguf(folder, tmp_path / "q.gguf", dtype)
    tensors = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"] == tensors["token_embd.weight"] == kind
    assert tensors["position_embd.weight"] == tensors["blk.0.ffn_up.bias"] == "F32"
