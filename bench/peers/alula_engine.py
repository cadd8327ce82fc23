"""alula itself, through the interface that its users call."""

from __future__ import annotations

from typing import Any

import alula
import torch
from alula.models import AutoModelForCausalLM

from .base import Setup
from .hf import DTYPES, TransformersLike


class Alula(TransformersLike):
    """alula.AutoModelForCausalLM from the folder."""

    def load(self, setup: Setup) -> Any:
        """The model; its weights are packed as they are read."""
        if setup.dtype in DTYPES:
            return AutoModelForCausalLM.from_pretrained(setup.folder, dtype=DTYPES[setup.dtype])
        return AutoModelForCausalLM.from_pretrained(setup.folder, quantize=setup.dtype)

    @property
    def versions(self) -> dict[str, str]:
        """alula and torch."""
        return {"alula": alula.__version__, "torch": torch.__version__}
