"""What the ops' functions share: checks that need Python's view of the arguments."""

from __future__ import annotations

from torch import Tensor

from alula.packed_weight import PackedWeight


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
