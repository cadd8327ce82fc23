"""OpenVINO through optimum-intel: the model exported to its graph, latency hint, logits of every token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .base import Missing, Setup
from .hf import TransformersLike

try:
    from optimum.intel import OVModelForCausalLM
except ImportError as error:
    raise Missing("optimum-intel is not installed here; --openvino-python names an environment that has it") from error

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16", "int4": "bf16"}
BITS = {"int8": 8, "int4": 4}


def _weight_options(bits: int | None) -> dict:
    """int8 as optimum-intel makes it by itself; int4 symmetric in groups of 64, the other matrices int8."""
    if bits is None:
        return {"load_in_8bit": False}
    if bits == 8:
        return {"load_in_8bit": True}
    from optimum.intel import OVWeightQuantizationConfig

    return {"quantization_config": OVWeightQuantizationConfig(bits=4, sym=True, group_size=64, ratio=1.0)}


class OpenVINO(TransformersLike):
    """OVModelForCausalLM. Its state is the cache, so a step passes only the new token and the whole mask."""

    def load(self, setup: Setup) -> OVModelForCausalLM:
        """Export if that is not done yet, and compile for this CPU."""
        if setup.dtype not in PRECISIONS:
            raise Missing(f"it has no {setup.dtype} weights on a CPU")
        bits = BITS.get(setup.dtype)
        path = Path(setup.work) / ("openvino" if bits is None else f"openvino-{setup.dtype}")
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(setup.threads),
            "INFERENCE_PRECISION_HINT": PRECISIONS[setup.dtype],
            "CACHE_DIR": "",
        }
        if not path.exists():
            exported = OVModelForCausalLM.from_pretrained(
                setup.folder, export=True, use_cache=True, compile=False, **_weight_options(bits)
            )
            exported.save_pretrained(unfinished := path.with_suffix(".unfinished"))
            unfinished.rename(path)
            del exported
        return OVModelForCausalLM.from_pretrained(path, ov_config=options)

    @property
    def versions(self) -> dict[str, str]:
        """openvino, optimum-intel and the transformers that it pins."""
        import importlib.metadata

        return {name: importlib.metadata.version(name) for name in ("openvino", "optimum-intel", "transformers")}

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """The whole prompt; the graph computes the logits of every token."""
        longest = max(map(len, prompts))
        self._mask = torch.ones(len(prompts), self.setup.max_tokens, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self._mask[row, : longest - len(prompt)] = 0
        self._columns, self._past = longest, None
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        positions = (self._mask[:, :longest].cumsum(-1) - 1).clamp_(min=0)
        self._next = positions[:, -1:] + 1
        return self._call(ids, positions)

    def step(self, tokens: list[int]) -> list[int]:
        """One token for each row."""
        self._columns += 1
        positions, self._next = self._next, self._next + 1
        return self._call(torch.tensor(tokens)[:, None], positions)

    def _call(self, ids: torch.Tensor, positions: torch.Tensor) -> list[int]:
        mask = self._mask[:, : self._columns]
        out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=self._past)
        self._past = out.past_key_values
        self._logits = out.logits[:, -1]
        return self._logits.argmax(-1).tolist()

    def logits(self) -> np.ndarray:
        """Logits of the last call."""
        return np.array(self._logits, dtype=np.float32)
