"""What the ops' functions share: names of activations, and checks that need Python's view of the arguments."""

from __future__ import annotations

from torch import Tensor

from alula.packed_weight import PackedWeight

# Hugging Face's activation names and the code the kernels know them by (csrc/cpu/activation.h).
# gelu_new, gelu_fast, gelu_accurate and those with tanh in their names are the same function up to rounding.
ACTIVATIONS: dict[str, int] = {
    "none": 0,
    "linear": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu_fast": 1,
    "gelu_tanh": 1,
    "gelu_python_tanh": 1,
    "gelu_accurate": 1,
    "gelu": 2,
    "gelu_python": 2,
    "relu": 3,
    "silu": 4,
    "swish": 4,
    "tanh": 5,
}


def activation_code(activation: str) -> int:
    try:
        return ACTIVATIONS[activation]
    except KeyError:
        raise ValueError(f"unknown activation {activation!r}; accepted: {', '.join(ACTIVATIONS)}") from None


def refuse_width(x: Tensor, weight: PackedWeight) -> None:
    """The kernels see a packed weight rounded up to whole pairs and panels; here its sizes are known exactly."""
    if x.dim() and x.size(-1) != weight.in_features:
        raise ValueError(f"x has {x.size(-1)} features (shape {list(x.shape)}); the weight takes {weight.in_features}")


def same_device(**tensors: Tensor | None) -> None:
    """A real tensor beside one on the meta device comes here, too, and must not get an uninitialized result."""
    given = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    for name, device in given[1:]:
        if device != given[0][1]:
            raise RuntimeError(
                f"{name} is on device {device} and {given[0][0]} on device {given[0][1]}; "
                "all tensors of one call must be on the same device"
            )
