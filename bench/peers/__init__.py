"""The engines that `alula bench model` times, alula among them: one module for each, one class for each variant.

Every engine runs in a process of its own (`worker.py`), so that none disturbs another's threads or memory and each can
live in an environment of its own. Nothing here imports alula, torch or a peer before it is asked for.
"""

from __future__ import annotations

import importlib

from .base import Missing, Peer

# name on the command line -> (module, class)
PEERS: dict[str, tuple[str, str]] = {
    "alula": ("alula_engine", "Alula"),
    "hf-eager": ("hf", "HFEager"),
    "hf-sdpa": ("hf", "HFSdpa"),
    "hf-alula": ("hf_alula", "HFAlula"),
    "hf-compiled": ("hf_compiled", "HFCompiled"),
    "llama.cpp": ("llama_cpp", "LlamaCpp"),
    "llama.cpp-fa": ("llama_cpp", "LlamaCppFlashAttention"),
    "ctranslate2": ("ctranslate2", "CTranslate2"),
    "openvino": ("openvino", "OpenVINO"),
}

# The same for encoders; the worker is asked for them as "encoder:NAME".
ENCODER_PEERS: dict[str, tuple[str, str]] = {
    "alula": ("encoders", "AlulaEncoder"),
    "hf-eager": ("encoders", "HFEncoder"),
    "hf-alula": ("hf_alula", "HFAlulaEncoder"),
    "openvino": ("openvino_encoder", "OpenVINOEncoder"),
}


def peer_class(name: str) -> type[Peer]:
    """The class of a name of PEERS, or of ENCODER_PEERS behind "encoder:". Raises Missing where what it needs is not
    installed."""
    start, _, rest = name.partition(":")
    module, cls = ENCODER_PEERS[rest] if start == "encoder" else PEERS[name]
    try:
        return getattr(importlib.import_module(f".{module}", __name__), cls)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
