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

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVINO(TransformersLike):
    """OVModelForCausalLM. Its state is the cache, so a step passes only the new token and the whole mask."""

    def load(self, setup: Setup) -> OVModelForCausalLM:
        """Export if that is not done yet, and compile for this CPU."""
        path = Path(setup.work) / "openvino"
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": str(setup.threads),
            "INFERENCE_PRECISION_HINT": PRECISIONS[setup.dtype],
            "CACHE_DIR": "",
        }
        if not path.exists():
            exported = OVModelForCausalLM.from_pretrained(
                setup.folder, export=True, load_in_8bit=False, use_cache=True, compile=False
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
