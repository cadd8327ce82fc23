"""The activation functions of Hugging Face's configurations: names, meaning, and the code the kernels know them by.

A code is a place in :data:`FORMULAS`; csrc/core/activation.h has the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACCEPTED", "ACTIVATIONS", "FORMULAS", "activate", "activation_code"]

# Element by element, in the dtype of y.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu_pytorch_tanh": lambda y: F.gelu(y, approximate="tanh"),  # y/2 * (1 + tanh(sqrt(2/pi) * (y + 0.044715 y^3)))
    "gelu": F.gelu,  # y/2 * (1 + erf(y / sqrt(2)))
    "relu": F.relu,
    "silu": F.silu,  # y / (1 + exp(-y))
    "tanh": torch.tanh,
    "gelu_10": lambda y: F.gelu(y).clamp(max=10.0),
    "hardswish": lambda y: y * (F.relu6(y + 3) / 6),
    "laplace": lambda y: 0.5 * (1 + torch.erf((y - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": F.leaky_relu,  # y, 0.01 y where negative
    "mish": F.mish,  # y * tanh(log(1 + exp(y)))
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "relu2": lambda y: F.relu(y).square(),
    "relu6": F.relu6,  # y clamped to 0..6
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda y: F.softplus(y).sqrt(),  # sqrt(log(1 + exp(y)))
}

# Other names. Those of gelu_pytorch_tanh and of gelu are written otherwise in transformers, and round otherwise.
_ALIASES = {
    "linear": "none",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}

_CODES = {name: code for code, name in enumerate(FORMULAS)}
ACTIVATIONS: dict[str, int] = {**_CODES, **{name: _CODES[same] for name, same in _ALIASES.items()}}

_BY_CODE = tuple(FORMULAS.values())

# For errors: what a configuration may say. transformers' other two are modules with tensors of their own in each layer.
ACCEPTED = (
    ", ".join(sorted(name for name in ACTIVATIONS if name != "none"))
    + " (prelu and xielu have trained parameters of their own, which no kernel takes)"
)


def activation_code(activation: str) -> int:
    """The code of a name. ValueError, with what is accepted, for any other."""
    try:
        return ACTIVATIONS[activation]
    except KeyError:
        raise ValueError(f"unknown activation {activation!r}; accepted: {ACCEPTED}") from None


def activate(y: Tensor, activation: str) -> Tensor:
    """The function of that name, by PyTorch: where a few values need no kernel."""
    return _BY_CODE[activation_code(activation)](y)
