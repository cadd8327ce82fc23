"""One safetensors file: what the package writes is read and back; a header that cannot be true is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from alula.safetensors_file import SafetensorsFile, write_safetensors
from checkpoint_cases import load, reference, same


def raw_file(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": (b"", "it has 0 bytes"),
    "short": (b"\x08\0\0\0", "it has 4 bytes"),
    "huge header length": (raw_file({"a": entry()}, length=2**63 + 5), "its header claims 9223372036854775813 bytes"),
    "header beyond the file": (raw_file({"a": entry()}, length=200), "its header claims 200 bytes"),
    "not json": (raw_file(b"{'a': 1}"), "its header is not JSON"),
    "not utf-8": (raw_file(b'{"\xff": 1}'), "its header is not JSON"),
    "deep": (raw_file(b'{"a":' * 60_000), "its header is not JSON"),
    "a list": (raw_file([1]), "not a JSON object"),
    "metadata": (raw_file({"__metadata__": [1], "a": entry()}), "__metadata__"),
    "twice": (raw_file(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":1}'), "the key 'a' twice"),
    "no dtype": (raw_file({"a": {"shape": [4], "data_offsets": [0, 16]}}), "tensor 'a' lacks dtype"),
    "entry of another kind": (raw_file({"a": 3}), "tensor 'a' lacks dtype"),
    "unknown dtype": (raw_file({"a": entry("F128")}), "tensor 'a' has dtype 'F128'"),
    "dtype of another kind": (raw_file({"a": entry(["F32"])}), "tensor 'a' has dtype"),
    "negative shape": (raw_file({"a": entry(shape=[-4])}), r"tensor 'a' has shape \[-4\]"),
    "fractional shape": (raw_file({"a": entry(shape=[4.0])}), "tensor 'a' has shape"),
    "bool shape": (raw_file({"a": entry(shape=[True, 4])}), "tensor 'a' has shape"),
    "shape contradicts offsets": (raw_file({"a": entry(shape=[5])}), "tensor 'a' of shape .* needs 20 bytes"),
    "overflowing shape": (raw_file({"a": entry(shape=[2**62, 2**62, 0, 4])}), "needs 0 bytes"),
    "overflowing shape wraps": (raw_file({"a": entry(shape=[2**62, 4, 4])}), "needs 295147905179352825856 bytes"),
    "negative offset": (raw_file({"a": entry(offsets=[-16, 0])}), "tensor 'a' has data_offsets"),
    "reversed offsets": (raw_file({"a": entry(offsets=[16, 0])}), "tensor 'a' has data_offsets"),
    "three offsets": (raw_file({"a": entry(offsets=[0, 8, 16])}), "tensor 'a' has data_offsets"),
    "past the end": (raw_file({"a": entry(shape=[8], offsets=[0, 32])}), "tensor 'a' ends at byte .* the file has"),
    "truncated data": (raw_file({"a": entry()}, b"\0" * 15), "tensor 'a' ends at byte .*truncated"),
    "surplus data": (raw_file({"a": entry()}, b"\0" * 17), "1 bytes after the last tensor"),
    "overlap": (raw_file({"a": entry(), "b": entry(shape=[2], offsets=[8, 16])}), "'b' at bytes 8..16 overlaps 'a'"),
    "same bytes": (raw_file({"a": entry(), "b": entry()}), "overlaps"),
    "hole": (raw_file({"a": entry(shape=[2], offsets=[8, 16])}), "'a' at bytes 8..16 leaves a hole after the header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    reference().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors is not a valid safetensors file: .*{message}"):
        load(tmp_path)


def test_what_the_safetensors_package_refuses_is_refused(tmp_path: Path) -> None:
    """Random damage to headers: never a crash, never anything read that the package would not read."""
    draw = random.Random(5)
    values = {"b.weight": torch.randn(3, 5), "a": torch.arange(7), "c": torch.zeros(0, 4), "d": torch.tensor(2.0)}
    safetensors.torch.save_file(values, tmp_path / "whole")
    good = (tmp_path / "whole").read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    file = tmp_path / "damaged"
    refused = unnamed = 0
    for _ in range(600):
        content = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 4])):
            place = draw.randrange(header_end)
            content[place] = draw.choice([*b'0123456789,:{}[]"-.', content[place] ^ 1, draw.randrange(256)])
        if draw.random() < 0.15:
            del content[draw.randrange(len(content)) :]
        file.write_bytes(content)
        try:
            theirs = safetensors.torch.load_file(file)
        except Exception:
            theirs = None
        try:
            opened = SafetensorsFile(file)
            ours = {name: opened.read(name) for name in opened.names()}
        except ValueError as error:
            unnamed += str(file) not in str(error)
            refused += 1
            continue
        assert theirs is not None, bytes(content[:header_end])
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype
            assert value.contiguous().view(-1).view(torch.uint8).tolist() == (
                theirs[name].contiguous().view(-1).view(torch.uint8).tolist()
            )
    assert 100 < refused < 600
    assert not unnamed


def test_files_by_the_package_are_read_and_ours_are_read_by_it(tmp_path: Path) -> None:
    values = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 2).half(),
        "ids": torch.tensor([[1, -2]]),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(2, 2, 2, dtype=torch.float64),
    }
    safetensors.torch.save_file(values, tmp_path / "theirs")
    opened = SafetensorsFile(tmp_path / "theirs")
    assert same({n: opened.read(n) for n in opened.names()}, values)
    for name in opened.names():
        opened.release(name)
    assert same({n: opened.read(n) for n in opened.names()}, values), "released pages are read again"
    entries = [(n, v.dtype, tuple(v.shape)) for n, v in values.items()]
    write_safetensors(tmp_path / "ours", entries, lambda name: values[name])
    assert same(safetensors.torch.load_file(tmp_path / "ours"), values)
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    # Data that begins at an odd byte is legal; the tensor is then a copy.
    text = json.dumps({"a": entry(shape=[4])}).encode()
    text += b" " * (1 - len(text) % 2)
    data = torch.randn(4)
    (tmp_path / "odd").write_bytes(raw_file(text, data.numpy().tobytes()))
    assert torch.equal(SafetensorsFile(tmp_path / "odd").read("a"), data)
