"""ALULA_LOG=1: a line on standard error for each distinct decision of the dispatch, printed once."""

import os
import subprocess
import sys

import pytest

CALLS = """
import torch
from alula import ops
x, weight = torch.randn(4, 64), ops.pack(torch.randn(96, 64))
for _ in range(3):
    ops.linear(x, weight)
    ops.layer_norm(x, torch.ones(64))
    ops.scaled_masked_softmax(x, dtype=torch.bfloat16)
ops.linear(x.half(), ops.pack(torch.randn(96, 64).half()))
ops.embedding(torch.tensor([[1, 2]]), weight)
"""


def lines(value: str | None) -> list[str]:
    env = {name: text for name, text in os.environ.items() if not name.startswith("ALULA_")}
    env |= {"ALULA_FORCE_ISA": "generic"} | ({} if value is None else {"ALULA_LOG": value})
    result = subprocess.run(
        [sys.executable, "-c", CALLS], env=env, capture_output=True, text=True, timeout=300, check=True
    )
    return [line for line in result.stderr.splitlines() if line.startswith("alula: ")]


def test_each_decision_is_printed_once() -> None:
    printed = lines("1")
    starts = [" ".join(line.split()[1:4]) for line in printed]
    assert starts == [
        "linear generic float32",
        "layer_norm generic float32",
        "scaled_masked_softmax generic float32",
        "linear generic float16",
        "embedding generic float32",
    ]
    assert all(": " in line.removeprefix("alula: ") or "embedding" in line for line in printed)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_off_unless_asked_for(value: str | None) -> None:
    assert lines(value) == []
