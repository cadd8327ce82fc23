"""Hugging Face transformers with torch.compile and a static cache: a step compiles once and serves every position."""

from __future__ import annotations

from typing import Any

import torch

from .base import Missing, Setup
from .hf import HFSdpa


class HFCompiled(HFSdpa):
    """Steps run the compiled forward; the prompt is read by the model as it is."""

    def load(self, setup: Setup) -> Any:
        """The model, and a compiled form of its forward."""
        from transformers import StaticCache

        model = super().load(setup)
        if not getattr(model, "_can_compile_fullgraph", False):
            raise Missing(f"{type(model).__name__} of this transformers does not compile as one graph")
        self._compiled = torch.compile(model.forward, dynamic=False, fullgraph=True)
        self._cache = StaticCache(config=model.config, max_cache_len=setup.max_tokens)
        return model

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Prompts of equal length: a mask that grows would compile anew at every step."""
        if len(set(map(len, prompts))) > 1:
            raise Missing("measured without padding only")
        return super().prefill(prompts)

    def new_cache(self) -> Any:
        """The one static cache, emptied."""
        self._cache.reset()
        return self._cache

    @property
    def stepper(self) -> Any:
        """The compiled forward."""
        return self._compiled
