"""A Hugging Face folder with random weights: the one checkpoint that every engine is loaded from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from alula.bench import presets, report
from safetensors.torch import save_file

SEED = 20
SHARD_BYTES = 2 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ensure(parent: Path, name: str, dtype: str) -> Path:
    """The folder of the preset `name` in `dtype` under `parent`; written if it is not there yet."""
    folder = parent / f"{name}-{dtype}-{SEED}"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, presets.config_of(name), dtype)
    return folder


def write(folder: Path, config: presets.Config, dtype: str) -> None:
    """Sharded safetensors and a stand-in tokenizer, then config.json: a folder that has it is complete."""
    generator = torch.Generator().manual_seed(SEED)
    groups = list(presets.family(config).tensors(config))
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    names: list[str] = []

    def flush() -> None:
        if shard:
            names.append(f"model-{len(names) + 1:05}.safetensors")
            save_file(shard, folder / names[-1], metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, names[-1]))
            shard.clear()

    total = 0
    for group in report.progress(groups, f"writing {folder.name}"):
        for spec in group:
            tensor = torch.randn(spec.shape, generator=generator).mul_(spec.std).add_(spec.mean).to(DTYPES[dtype])
            shard[spec.name] = tensor
            total += tensor.nbytes
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    _write_tokenizer(folder, config["vocab_size"])
    torch_dtype = str(DTYPES[dtype]).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config, "dtype": torch_dtype}, indent=2))


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """One word for each id (t0, t1, ...): converters ask for a tokenizer, prompts are ids."""
    tokens = {f"t{token}": token for token in range(vocabulary)}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "t0"},
            }
        )
    )
    special = {"bos_token": "t0", "eos_token": "t0", "unk_token": "t0"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of the weights in the folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def dequantized(folder: Path, dtype: str, model: str) -> Path:
    """A folder beside `folder` with the values, in fp32, that alula's weights in `dtype` stand for. `model` is the name
    of the class that reads them: AutoModelForCausalLM, AutoModel."""
    import alula

    made = folder.with_name(f"{folder.name}-{dtype}-dequantized")
    if not made.exists():
        shutil.rmtree(unfinished := made.with_name(made.name + ".unfinished"), ignore_errors=True)
        quantized = getattr(alula, model).from_pretrained(folder, dtype="float32", quantize=dtype)
        quantized.dequantize().save_pretrained(unfinished)
        shutil.copyfile(folder / "tokenizer.json", unfinished / "tokenizer.json")
        unfinished.rename(made)
    return made
