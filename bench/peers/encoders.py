"""Encoders: alula and Hugging Face transformers, in eager attention."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from .base import Missing, Setup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Encoder:
    """An engine with one encoder loaded; `prompts` are rows of ids of one length."""

    def __init__(self, setup: Setup) -> None:
        """Load the model with `load`."""
        self.setup = setup
        torch.set_num_threads(setup.threads)
        self.model = self.load(setup)

    def load(self, setup: Setup) -> Any:
        """The model, ready to be called with ids."""
        raise NotImplementedError

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that do the work."""
        raise NotImplementedError

    @property
    def weights(self) -> str:
        """The dtype asked for; bf16 where it is one that only alula quantizes encoders to."""
        return self.setup.dtype if self.setup.dtype in DTYPES else "bf16"

    @torch.inference_mode()
    def encode(self, ids: torch.Tensor) -> Any:
        """The last hidden states [B, T, E]."""
        return self.model(ids).last_hidden_state

    def hidden(self, prompts: list[list[int]]) -> np.ndarray:
        """The same in fp32."""
        return self.encode(torch.tensor(prompts)).float().numpy()

    def time_encode(self, prompts: list[list[int]]) -> float:
        """Seconds of one forward."""
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        self.encode(ids)
        return time.perf_counter() - start


class AlulaEncoder(Encoder):
    """alula.AutoModel from the folder."""

    def load(self, setup: Setup) -> Any:
        """The model; its weights are packed as they are read."""
        from alula.models import AutoModel

        if setup.dtype in DTYPES:
            return AutoModel.from_pretrained(setup.folder, dtype=DTYPES[setup.dtype])
        return AutoModel.from_pretrained(setup.folder, quantize=setup.dtype)

    @property
    def weights(self) -> str:
        """The dtype asked for."""
        return self.setup.dtype

    @property
    def versions(self) -> dict[str, str]:
        """alula and torch."""
        import alula

        return {"alula": alula.__version__, "torch": torch.__version__}


class HFEncoder(Encoder):
    """transformers' AutoModel; in fp32 the reference."""

    def load(self, setup: Setup) -> Any:
        """AutoModel from the folder."""
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise Missing(str(error)) from error
        return AutoModel.from_pretrained(setup.folder, dtype=DTYPES[self.weights], attn_implementation="eager").eval()

    @property
    def versions(self) -> dict[str, str]:
        """transformers and torch."""
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}
