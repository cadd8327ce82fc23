"""What a call of `generate` asks for, checked and worked out before the model is touched: limits, seeds, caches.

B rows, T columns of the padded prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from alula.generation_config import GenerationConfig

__all__ = [
    "check_past",
    "list_of_callables",
    "min_new_tokens_of",
    "num_new_tokens_of",
    "pack_right",
    "row_seeds",
    "warn_unused",
]

DEFAULT_NEW_TOKENS = 20
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")


def row_seeds(seed: int | Sequence[int] | None, generator: torch.Generator | None, num_rows: int) -> list[int]:
    """The seed of each row, as `generate` says of its options."""
    if seed is None:
        seed = int(torch.randint(2**62, (1,), generator=generator))
    elif generator is not None:
        raise ValueError("give `seed` or `generator`, not both")
    seed = seed.tolist() if hasattr(seed, "tolist") else seed
    seeds = list(seed) if isinstance(seed, Sequence) else []
    if isinstance(seed, Integral):
        seeds = [int(seed) + b for b in range(num_rows)]
    if len(seeds) != num_rows or not all(isinstance(s, Integral) and s >= 0 for s in seeds):
        raise ValueError(f"seed must be an integer >= 0, or a list of {num_rows} (one per row), but is {seed!r}")
    return seeds


def num_new_tokens_of(
    config: GenerationConfig, num_columns: int, longest: int, model_config: Any, is_asked: bool
) -> int:
    """The number of tokens to make; a default that does not fit is cut down, a number that was asked for is refused."""
    limit = getattr(model_config, "max_position_embeddings", None)
    num_new = config.max_new_tokens
    if num_new is None:
        num_new = DEFAULT_NEW_TOKENS if config.max_length is None else config.max_length - num_columns
        if num_new < 1:
            raise ValueError(
                f"max_length={config.max_length} leaves no room after a prompt of {num_columns} tokens; "
                "give max_new_tokens, which does not count the prompt"
            )
    if limit is None or longest + num_new <= limit:
        return num_new
    if longest >= limit:
        raise ValueError(
            f"the prompt has {longest} tokens, but the model has n_positions={limit} for prompt and text together; "
            f"shorten the prompt to at most {limit - 1} tokens"
        )
    if is_asked:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={num_new} are {longest + num_new} tokens, but the model "
            f"has n_positions={limit}; ask for at most {limit - longest} new tokens or shorten the prompt"
        )
    return limit - longest


def min_new_tokens_of(config: GenerationConfig, num_columns: int) -> int:
    """How many new tokens must come before an eos."""
    if config.min_new_tokens is not None:
        return config.min_new_tokens
    return max(0, (config.min_length or 0) - num_columns)


def check_past(cache: Any, ids: Tensor) -> int:
    """Return how many columns of the prompts the cache holds already."""
    if cache is None:
        return 0
    num_past = cache.get_seq_length()
    if cache.batch_size != len(ids) or num_past >= ids.shape[1]:
        raise ValueError(
            f"past_key_values holds {cache.batch_size} rows of {num_past} tokens; input_ids {list(ids.shape)} must "
            "have as many rows, and hold these tokens and at least one more"
        )
    return num_past


def list_of_callables(name: str, given: Any) -> list[Any]:
    """The processors or criteria of a call. TypeError for one that is not in a list, or cannot be called."""
    found = given if isinstance(given, Sequence) else [] if given is None else [None]
    if not all(map(callable, found)):
        raise TypeError(f"{name} must be a list of callables (ids, logits), but is {given!r:.100}")
    return list(found)


def pack_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of each row to its left; padding ids become 0, which every vocabulary has."""
    order = mask.argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    return ids.gather(1, order) * mask, mask


def warn_unused(config: GenerationConfig, options: dict[str, Any]) -> None:
    """Warns of sampling options that were given without do_sample."""
    default = GenerationConfig()
    unused = [n for n in _SAMPLING_OPTIONS if options.get(n) not in (None, getattr(default, n), 0)]
    if unused and not config.do_sample:
        warnings.warn(f"{', '.join(unused)} matter only with do_sample=True, which is off", stacklevel=4)
