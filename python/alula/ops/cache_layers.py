"""Memory for a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alula import _library  # noqa: F401  (loads the op library)
from alula.memory import raises_torch_errors


@raises_torch_errors
def cache_layers(like: Tensor, count: int, sizes: Sequence[int]) -> list[Tensor]:
    """Uninitialized tensors, one a layer, on the CPU side by side in large pages.

    Each step of decoding reads the whole cache once; from pages of 4 KiB that is slower than memory is.

    Args:
        like: has the dtype (float32, bfloat16, float16) and the device. count: how many. sizes: of each.

    Returns: contiguous tensors that share no storage. Up to 128 MiB of the last ones that went wait for the
    next; of more, each one's memory goes back to the system when it does.
    RuntimeError for other dtypes and negative numbers.
    """
    return torch.ops.alula.cache_layers(like, count, sizes)


@torch.library.register_fake("alula::cache_layers")
def _(like, count, sizes):
    return [like.new_empty(sizes) for _ in range(count)]
