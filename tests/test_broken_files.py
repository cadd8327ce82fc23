"""Files cut short, with bytes changed, or with values that make no sense: read, or refused with a ValueError,
TypeError or FileNotFoundError that says what is wrong; never another error, a crash, or a wait without end."""

import copy
import json
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import alula
import pytest
import torch
from alula.safetensors_file import SafetensorsFile
from spiece_cases import pieces, spiece

REFUSALS = (ValueError, TypeError, FileNotFoundError)
HEAD = 3000  # bytes from the start that are changed: headers, and not the weights behind them
ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 10**7, 10**12, 10**30, -(10**30), 0.5, -0.1, 1e308, float("nan"), float("inf")),
    *("", "x", "gpt2", "int4", [], [1], [None], [[1]], {}, {"a": 1}),
]
TINY = Path(alula.__file__).parent / "assets" / "tiny-python"


def with_other_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut short, or with bytes of the head changed, taken out or put in."""
    changed, head = bytearray(data), min(len(data), HEAD)
    kind = rng.randrange(5)
    if kind == 0:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 1:
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(head)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        at = rng.randrange(head)
        del changed[at : at + rng.randrange(1, 30)]
    elif kind == 3:
        at = rng.randrange(head)
        changed[at:at] = rng.randbytes(rng.randrange(1, 20))
    else:  # other digits: still JSON, with other numbers
        digits = [i for i in range(head) if chr(changed[i]).isdigit()]
        for _ in range(3 if digits else 0):
            changed[rng.choice(digits)] = rng.randrange(48, 58)
    return bytes(changed)


def with_other_values(data: bytes, rng: random.Random) -> bytes:
    """JSON with up to three values, at any depth, replaced by odd ones or left out."""
    root = json.loads(data)
    for _ in range(rng.randrange(1, 4)):
        at: Any = root
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(at[key], dict | list) and rng.random() < 0.7:
                at = at[key]
            elif rng.random() < 0.2:
                del at[key]
                break
            else:
                at[key] = copy.deepcopy(rng.choice(ODD))
                break
    return json.dumps(root).encode()


def read_or_refused(read: Callable[[], Any], file: Path, make: Callable[[bytes, random.Random], bytes]) -> None:
    """`read` after each of many changes of `file`, which is put back at the end."""
    whole = file.read_bytes()
    refusals: dict[int, str] = {}
    for number in range(60):
        file.write_bytes(make(whole, random.Random(zlib.crc32(f"{file.name} {make.__name__} {number}".encode()))))
        try:
            read()
        except REFUSALS as error:
            refusals[number] = str(error)
        except Exception as error:
            raise AssertionError(f"change {number} of {file.name}: {error!r}") from error
    file.write_bytes(whole)
    read()
    assert len(refusals) > 5
    assert min(map(len, refusals.values())) > 15, "a refusal says too little"


@pytest.fixture
def model(tmp_path: Path) -> alula.GPTBigCodeForCausalLM:
    torch.manual_seed(0)
    config = alula.GPTBigCodeConfig(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    return alula.GPTBigCodeForCausalLM(config)


@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.filterwarnings("ignore")
def test_model_folders(model: alula.GPTBigCodeForCausalLM, quantize: str | None, tmp_path: Path) -> None:
    (model.quantize(quantize, group_size=32) if quantize else model).save_pretrained(tmp_path)

    def load() -> Any:
        return alula.AutoModelForCausalLM.from_pretrained(tmp_path)

    read_or_refused(load, tmp_path / "model.safetensors", with_other_bytes)
    read_or_refused(load, tmp_path / "config.json", with_other_bytes)
    read_or_refused(load, tmp_path / "config.json", with_other_values)


def test_safetensors_headers(model: alula.GPTBigCodeForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"

    def other_header(data: bytes, rng: random.Random) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = with_other_values(data[8 : 8 + length].rstrip(), rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    def read_all() -> None:
        opened = SafetensorsFile(file)
        for name in opened.names():
            opened.read(name)

    read_or_refused(read_all, file, other_header)


@pytest.mark.filterwarnings("ignore")
def test_shards_and_pickles(model: alula.GPTBigCodeForCausalLM, tmp_path: Path) -> None:
    def load() -> Any:
        return alula.AutoModelForCausalLM.from_pretrained(tmp_path)

    model.save_pretrained(tmp_path, max_shard_size="20KB")
    read_or_refused(load, tmp_path / "model.safetensors.index.json", with_other_values)
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(dict(model.state_dict()), tmp_path / "pytorch_model.bin")
    read_or_refused(load, tmp_path / "pytorch_model.bin", with_other_bytes)


@pytest.mark.filterwarnings("ignore")
def test_generation_config(model: alula.GPTBigCodeForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    options = {"do_sample": True, "temperature": 0.5, "top_k": 3, "eos_token_id": [1], "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(options))

    def generate() -> None:
        alula.AutoModelForCausalLM.from_pretrained(tmp_path).generate(torch.tensor([[1, 2]]), max_new_tokens=2)

    read_or_refused(generate, tmp_path / "generation_config.json", with_other_values)


@pytest.mark.filterwarnings("ignore")
def test_tokenizer_files(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, tmp_path)

    def tokenize() -> None:
        alula.AutoTokenizer.from_pretrained(tmp_path)("def f(x):\n    return 1")

    for make in (with_other_bytes, with_other_values):
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            read_or_refused(tokenize, tmp_path / name, make)


@pytest.mark.filterwarnings("ignore")
def test_vocabularies(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    model = json.loads((TINY / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")

    def tokenize() -> None:
        alula.GPT2Tokenizer.from_pretrained(tmp_path)("def f(x):\n    return 1")

    read_or_refused(tokenize, tmp_path / "vocab.json", with_other_bytes)
    read_or_refused(tokenize, tmp_path / "vocab.json", with_other_values)
    read_or_refused(tokenize, tmp_path / "merges.txt", with_other_bytes)


@pytest.mark.filterwarnings("ignore")
def test_sentencepiece_files(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    file = tmp_path / "spiece.model"
    file.write_bytes(spiece(pieces()))
    read_or_refused(lambda: alula.BigBirdTokenizer.from_pretrained(tmp_path)("a b c"), file, with_other_bytes)


@pytest.mark.parametrize("key, value", [("n_layer", 10**9), ("n_layer", 10**6), ("n_positions", 2**31 - 1)])
def test_a_configuration_far_too_large(
    model: alula.GPTBigCodeForCausalLM, key: str, value: int, tmp_path: Path
) -> None:
    """Refused before a module or a table is made for it."""
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"(num_hidden_layers is|n_positions=){value}|num_hidden_layers is {value}"):
        alula.AutoModelForCausalLM.from_pretrained(tmp_path)
