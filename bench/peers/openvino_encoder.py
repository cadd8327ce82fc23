"""OpenVINO on the graph traced from transformers' encoder, latency hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import Missing, Setup
from .encoders import Encoder

try:
    import openvino
    import transformers
except ImportError as error:
    raise Missing(
        f"{error}; --openvino-python names an environment that has openvino, transformers and torch"
    ) from error

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class _Hidden(torch.nn.Module):
    """A model that takes ids and gives its last hidden states, nothing else."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).last_hidden_state


class OpenVINOEncoder(Encoder):
    """The model traced at the shape of the first input and compiled for this CPU; other shapes are traced anew."""

    def load(self, setup: Setup) -> Any:
        """Nothing yet: tracing needs the shape."""
        self._shape: tuple[int, ...] | None = None
        return None

    @property
    def versions(self) -> dict[str, str]:
        """openvino, torch, and the transformers it was traced from."""
        return {
            "openvino": openvino.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }

    def encode(self, ids: torch.Tensor) -> Any:
        """The last hidden states [B, T, E], numpy."""
        if self._shape != tuple(ids.shape):
            self._compile(ids)
        return self._request.infer({0: ids.numpy()})[0]

    def hidden(self, prompts: list[list[int]]) -> np.ndarray:
        """The same in fp32."""
        return np.array(self.encode(torch.tensor(prompts)), dtype=np.float32)

    def _compile(self, ids: torch.Tensor) -> None:
        setup, core = self.setup, openvino.Core()
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": setup.threads,
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.weights],
        }
        path = Path(setup.work) / f"openvino-encoder-{'x'.join(map(str, ids.shape))}.xml"
        if not path.exists():
            model = transformers.AutoModel.from_pretrained(
                setup.folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            with torch.no_grad():
                graph = openvino.convert_model(_Hidden(model), example_input=ids, input=[(list(ids.shape), np.int64)])
            openvino.save_model(graph, path, compress_to_fp16=False)
            del graph, model
        self._request = core.compile_model(path, "CPU", options).create_infer_request()
        self._shape = tuple(ids.shape)
