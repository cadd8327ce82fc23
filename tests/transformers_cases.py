"""Models for the tests of alula.integrations.transformers: made alike twice, one plain, one accelerated."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import alula.integrations.transformers as at
import torch
import transformers
from decoder_cases import hf_model
from torch import Tensor, nn

LANGUAGE_MODELS = ("GPTBigCodeForCausalLM", "GPT2LMHeadModel", "CodeGenForCausalLM")
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
# What torch.compile and generate keep on a model.
_COMPILED = {"_is_torch_compile", "_compiled_call_impl", "_compiled_call", "_last_compile_config"}
TOLERANCE = 1e-4  # on outputs of order one in float32


class Pair(NamedTuple):
    """A plain model, and one with the same weights that alula runs."""

    plain: Any
    fast: Any
    report: at.Report

    def prove(self, passes: int | None = None) -> None:
        """Every pass since the report ran on alula (that many, if told), and the classes are transformers' own."""
        assert self.report.fast_calls if passes is None else self.report.fast_calls == passes
        assert not self.report.plain_calls, self.report.plain_calls
        for module in self.plain.modules():
            assert "forward" not in module.__dict__
            assert not hasattr(module, "_alula")
            assert type(module).forward.__module__.partition(".")[0] in ("torch", "transformers")


@functools.lru_cache(maxsize=16)
def _made(seed: int, cls: str, fixed: tuple[tuple[str, Any], ...]) -> tuple[Any, Any]:
    plain = hf_model(seed, cls, **dict(fixed))
    if getattr(plain, "generation_config", None) is not None:
        plain.generation_config.eos_token_id = None
    return plain, copy.deepcopy(plain)


def pair(seed: int = 2, cls: str = "GPTBigCodeForCausalLM", **fixed: Any) -> Pair:
    """The same two models for the same arguments; the counts begin at zero."""
    plain, fast = _made(seed, cls, tuple(sorted(fixed.items())))
    at.restore(fast)
    for module in (*plain.modules(), *fast.modules()):
        left = sorted(_COMPILED & module.__dict__.keys())
        assert not left, f"an earlier test compiled one of the shared {cls} and left {left}: it needs own_pair"
    return Pair(plain, fast, at.accelerate(fast))


def own_pair(seed: int = 2, cls: str = "GPTBigCodeForCausalLM", **fixed: Any) -> Pair:
    """A pair whose accelerated model no other test sees, to be compiled: what generate compiles it keeps on the model,
    plain or accelerated, where no pickle holds it and every copy of the model runs the first one by it."""
    plain, fast, _ = pair(seed, cls, **fixed)
    fast = copy.deepcopy(fast)
    return Pair(plain, fast, at.accelerate(fast))


def left_padded(ids: Tensor) -> Tensor:
    """A mask [B, T]: row b has 2 b columns of padding on the left."""
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        mask[row, : 2 * row] = 0
    return mask


def close(ours: Tensor, theirs: Tensor, real: Tensor | None = None) -> None:
    """Both within the tolerance, where the mask [B, T] says that there is a token."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    difference = (ours - theirs).abs()
    if real is not None:
        difference = difference[real.bool()]
    assert difference.max().item() <= TOLERANCE


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a restore must give back: attributes of every module, bits of every tensor."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, (dict, set)):
                found[f"{name}:{key}"] = sorted(map(str, value))
            elif not isinstance(value, Tensor):
                found[f"{name}:{key}"] = repr(value) if isinstance(value, (int, float, str)) else type(value)
        found[f"{name}:class"] = type(module)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        bits = tensor.detach().clone().reshape(-1).view(torch.uint8) if tensor.dtype != torch.bool else tensor.clone()
        found[f"tensor {name}"] = (tensor.data_ptr(), tensor.requires_grad, tensor.dtype, bits)
    return found


def same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both states are equal."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key.startswith("tensor "):
            assert value[:3] == other[key][:3], key
            assert torch.equal(value[3], other[key][3]), key
        else:
            assert value == other[key], key
