"""Hugging Face transformers, and whatever else speaks its interface: eager and sdpa attention, dynamic cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .base import Missing, Peer, Setup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TransformersLike(Peer):
    """Prefill and steps through `model(input_ids, attention_mask=, position_ids=, past_key_values=, ...)`."""

    def __init__(self, setup: Setup) -> None:
        """Load the model with `load`."""
        self.setup = setup
        torch.set_num_threads(setup.threads)
        self.model = self.load(setup)

    def load(self, setup: Setup) -> Any:
        """The model, ready to be called."""
        raise NotImplementedError

    @property
    def weights(self) -> str:
        """The dtype asked for."""
        return self.setup.dtype

    def new_cache(self) -> Any:
        """What the first call gets as past_key_values."""
        return None

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """One call with the padded prompts; logits of the last token only."""
        longest = max(map(len, prompts))
        self._padded = any(len(prompt) != longest for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        extra = {}
        if self._padded:
            self._mask = torch.ones(len(prompts), self.setup.max_tokens, dtype=torch.int64)
            for row, prompt in enumerate(prompts):
                self._mask[row, : longest - len(prompt)] = 0
            mask = self._mask[:, :longest]
            positions = (mask.cumsum(-1) - 1).clamp_(min=0)
            self._next = positions[:, -1:] + 1
            extra = {"attention_mask": mask, "position_ids": positions}
        self._columns = longest
        return self._run(self.model, ids, self.new_cache(), extra)

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> list[int]:
        """One call with one token for each row and the cache of the calls before."""
        self._columns += 1
        extra = {}
        if self._padded:
            extra = {"attention_mask": self._mask[:, : self._columns], "position_ids": self._next}
            self._next = self._next + 1
        return self._run(self.stepper, torch.tensor(tokens)[:, None], self._past, extra)

    @property
    def stepper(self) -> Any:
        """What a step calls: the model, or a compiled form of it."""
        return self.model

    def _run(self, model: Any, ids: torch.Tensor, past: Any, extra: dict[str, torch.Tensor]) -> list[int]:
        out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1, **extra)
        self._past = out.past_key_values
        self._logits = out.logits[:, -1]
        return self._logits.argmax(-1).tolist()

    def logits(self) -> np.ndarray:
        """Logits of the last call."""
        return self._logits.float().numpy().copy()

    @torch.inference_mode()
    def score(self, sequence: list[int], last: int) -> np.ndarray:
        """Logits [last, V] fp32 of the last `last` positions of one sequence, in one call without a cache."""
        out = self.model(torch.tensor([sequence]), use_cache=False, logits_to_keep=last)
        return out.logits[0].float().numpy()


class HFSdpa(TransformersLike):
    """transformers with attn_implementation="sdpa", its default."""

    attention = "sdpa"

    def load(self, setup: Setup) -> Any:
        """AutoModelForCausalLM from the folder."""
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise Missing(str(error)) from error
        if setup.dtype not in DTYPES:
            raise Missing(f"{setup.dtype} weights are not measured with transformers")
        model = AutoModelForCausalLM.from_pretrained(
            setup.folder, dtype=DTYPES[setup.dtype], attn_implementation=self.attention
        )
        return model.eval()

    @property
    def versions(self) -> dict[str, str]:
        """transformers and torch."""
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}


class HFEager(HFSdpa):
    """transformers with attn_implementation="eager": the reference in fp32."""

    attention = "eager"
