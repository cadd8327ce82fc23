"""A small checkpoint that the tests of loading and saving take apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from alula.models import GPTBigCodeForCausalLM
from decoder_cases import hf_model
from torch import Tensor

SMALL = {"n_embd": 48, "n_head": 3, "n_layer": 2, "vocab_size": 61, "n_inner": 70}


def reference(**fixed: Any) -> Any:
    """The small model in transformers; not to be changed."""
    return hf_model(1, **{**SMALL, "tie_word_embeddings": True, **fixed})


def tensors(**fixed: Any) -> dict[str, Tensor]:
    """The small model's own tensors, tied alias left out."""
    model = reference(**fixed)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def save(state: dict[str, Tensor], folder: Path, name: str = "model.safetensors") -> None:
    safetensors.torch.save_file(state, folder / name, metadata={"format": "pt"})


def load(folder: Path, **kwargs: Any) -> GPTBigCodeForCausalLM:
    return GPTBigCodeForCausalLM.from_pretrained(folder, **kwargs)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return set(ours) == set(theirs) and all(
        torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours
    )
