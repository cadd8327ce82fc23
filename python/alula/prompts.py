"""Prompts as people have them (a list of ids, lists of unequal length, a padded tensor) as one padded int64 tensor."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alula.generation_config import GenerationConfig

__all__ = ["pad_id_of", "read_prompts"]


def pad_id_of(config: GenerationConfig) -> int:
    """The id that fills rows: `pad_token_id`, else the first of `eos_token_id`, else 0."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_ids[0] if config.eos_ids else 0


def read_prompts(
    input_ids: Any, attention_mask: Tensor | None, config: GenerationConfig, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Return (ids int64 [B, T] on the CPU, mask int64 [B, T] of 0 and 1, or None where nothing is padding).

    A tensor or NumPy array is taken as it is; where it comes without a mask, `pad_token_id` counts as padding if it is
    no eos id, as in transformers.  Lists are left padded.  Raises ValueError for what is empty, of a wrong type or
    shape, for a row that is all padding, and for an id outside the vocabulary.
    """
    if isinstance(input_ids, np.ndarray):
        input_ids = torch.from_numpy(input_ids)
    if isinstance(input_ids, Tensor):
        ids, mask = _from_tensor(input_ids, attention_mask, config)
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask goes with input_ids as a tensor [B, T]; lists of ids need none")
        ids, mask = _from_lists(input_ids, pad_id_of(config))
    real = ids if mask is None else ids[mask != 0]
    if len(real.flatten()) and not 0 <= int(real.min()) <= int(real.max()) < vocab_size:
        wrong = int(real.min()) if int(real.min()) < 0 else int(real.max())
        raise ValueError(f"input_ids holds the id {wrong}; accepted: 0 to {vocab_size - 1} (vocab_size={vocab_size})")
    if mask is not None:
        empty = (mask.sum(1) == 0).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"prompt {empty[0]} is empty; each prompt must have at least one token")
        if bool(mask.all()):
            mask = None
    return ids, mask


def _from_tensor(ids: Tensor, mask: Tensor | None, config: GenerationConfig) -> tuple[Tensor, Tensor | None]:
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] == 0:
        raise ValueError(f"input_ids must have the shape [B, T] with B >= 1, but has {list(ids.shape)}")
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty; each prompt must have at least one token")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers, but are {ids.dtype}")
    ids = ids.to("cpu", torch.int64)
    if mask is None:
        pad = config.pad_token_id
        if pad is None or pad in config.eos_ids or not bool((ids == pad).any()):
            return ids, None
        return ids, (ids != pad).long()
    if not isinstance(mask, Tensor | np.ndarray | Sequence) or isinstance(mask, str):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; accepted: a tensor {list(ids.shape)}")
    mask = torch.as_tensor(mask)
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}; accepted: {list(ids.shape)}, that of input_ids"
        )
    return ids, (mask.cpu() != 0).long()


def _from_lists(prompts: Any, pad_id: int) -> tuple[Tensor, Tensor | None]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(
            f"input_ids must be a tensor [B, T], a list of ids or a list of lists of ids, but is a "
            f"{type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("the batch is empty; give at least one prompt with at least one token")
    if all(isinstance(token, Integral) for token in prompts):
        prompts = [prompts]
    rows = [_row(prompt, i) for i, prompt in enumerate(prompts)]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def _row(prompt: Any, index: int) -> Tensor:
    try:
        row = prompt if isinstance(prompt, Tensor) else torch.tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"prompt {index} must be ids (integers), but is {prompt!r:.60}") from None
    if row.dim() == 0:
        raise ValueError(f"prompt {index} must be a list of ids, but is {prompt!r:.60}")
    if row.dim() != 1:
        raise ValueError(f"prompt {index} must have one dimension, but has the shape {list(row.shape)}")
    if len(row) == 0:
        raise ValueError(f"prompt {index} is empty; each prompt must have at least one token")
    if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
        raise ValueError(f"prompt {index} must be integers, but holds {row.dtype}")
    return row.to("cpu", torch.int64)
