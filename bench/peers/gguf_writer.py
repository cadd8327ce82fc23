"""A Hugging Face folder with random weights as a GGUF file: what llama.cpp needs to be measured, no real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from .base import Missing

# Hugging Face's name of a part of a GPTBigCode or GPT-2 layer -> GGUF's
LAYER_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

# (model_type, multi_query) -> llama.cpp's graph
GRAPHS = {("gpt_bigcode", True): "starcoder", ("gpt2", None): "gpt2"}


QUANTIZED = {"int8": gguf.GGMLQuantizationType.Q8_0, "int4": gguf.GGMLQuantizationType.Q4_0}
FILE_TYPES = {
    "fp32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "int8": gguf.LlamaFileType.MOSTLY_Q8_0,
    "int4": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Write the model of `folder` to `path`: matrices in `dtype` (fp32, bf16, int8 as Q8_0, int4 as Q4_0), the
    rest in fp32.

    The language-model head is tied to the word table and therefore not written a second time.
    Raises Missing for models that llama.cpp has no graph for.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = (config["model_type"], config.get("multi_query"))
    if kind not in GRAPHS:
        raise Missing(f"no GGUF layout is written for {kind[0]} with multi_query={kind[1]}")
    is_turned = config["model_type"] == "gpt2"  # its matrices lie as (in, out)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, GRAPHS[kind])
    _write_metadata(writer, config, dtype)
    for name, tensor in _tensors(folder):
        matrix = tensor.ndim == 2 and name != "position_embd.weight"
        if matrix and is_turned and name != "token_embd.weight":
            tensor = tensor.T
        if dtype in QUANTIZED and matrix:
            rows = np.ascontiguousarray(tensor.float().numpy())
            writer.add_tensor(name, gguf.quants.quantize(rows, QUANTIZED[dtype]), raw_dtype=QUANTIZED[dtype])
        elif dtype == "bf16" and matrix:
            data = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def _write_metadata(writer: gguf.GGUFWriter, config: dict, dtype: str) -> None:
    vocabulary = config["vocab_size"]
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    if config.get("multi_query"):
        writer.add_head_count_kv(1)
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{token}".encode() for token in range(vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the folder under GGUF's names."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield _gguf_name(name.removeprefix("transformer.")), tensors.get_tensor(name)


def _gguf_name(name: str) -> str:
    outside = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    part, _, kind = name.rpartition(".")
    if part in outside:
        return f"{outside[part]}.{kind}"
    _, layer, inner = part.split(".", 2)
    return f"blk.{layer}.{LAYER_PARTS[inner]}.{kind}"
