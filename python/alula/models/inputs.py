"""The checks of what a decoder is called with: everything that can be wrong is said before anything is changed.

Alphabet: B batch, T new tokens, S columns (past and new), H query heads, E model width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.models.blocks import BlockShape

__all__ = ["InputChecks", "out_of_range", "require_tensors", "whole_or_nothing"]


def require_tensors(**given: Tensor | None) -> None:
    """TypeError naming the first argument that is neither None nor a tensor, such as a list of ids."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; accepted: a torch.Tensor")


def out_of_range(ids: Tensor, count: int) -> bool:
    """Whether some id is not in [0, count)."""
    return int(ids.min()) < 0 or int(ids.max()) >= count


def whole_or_nothing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with a head, which leaves ``past_key_values`` as it was where it raises: labels and logits_to_keep are
    judged when the model below has already stored its keys and values."""
    place = list(inspect.signature(forward).parameters).index("past_key_values") - 1

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = args[place] if len(args) > place else kwargs.get("past_key_values")
        if not isinstance(cache, KVCache):
            return forward(self, *args, **kwargs)
        length, cross = cache.get_seq_length(), cache.cross
        try:
            return forward(self, *args, **kwargs)
        except BaseException:
            cache.crop(length)
            cache.cross = cross
            raise

    return wrapped


class InputChecks:
    """The checks of a decoder model, which has ``_shape``, ``_bound``, ``dtype`` and ``device``."""

    _shape: BlockShape

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, the model on {self.device}")

    def _check_ids(self, name: str, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"{name} has shape {list(ids.shape)}; accepted: [batch, tokens], at least one of each")
        self._check_device(name, ids)
        if ids.dtype is torch.int64:
            return ids
        if ids.dtype is torch.int32:
            return ids.long()
        raise ValueError(f"{name} has dtype {ids.dtype}; accepted: int64, int32")

    def _check_embeds(self, name: str, embeds: Tensor) -> tuple[int, int]:
        if embeds.dim() != 3 or not embeds.numel() or embeds.shape[2] != self._shape.width:
            raise ValueError(f"{name} has shape {list(embeds.shape)}; accepted: [batch, tokens, {self._shape.width}]")
        if embeds.dtype != self.dtype:
            raise ValueError(f"{name} has dtype {embeds.dtype}; accepted: the model's, {self.dtype}")
        self._check_device(name, embeds)
        return embeds.shape[0], embeds.shape[1]

    def _check_cache(self, cache: KVCache, batch: int) -> int:
        if not isinstance(cache, KVCache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}; accepted: alula.cache.KVCache or None")
        shape = self._shape
        have = (cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.dtype)
        need = (len(self._bound.blocks), shape.num_kv_heads, shape.head_dim, self.dtype)
        if have != need:
            raise ValueError(
                f"past_key_values is of another model: (layers, key/value heads, head size, dtype) = {have}; "
                f"accepted: {need}"
            )
        if cache.device != self.device:
            raise ValueError(f"past_key_values is on {cache.device}, the model on {self.device}")
        if cache.batch_size != batch:
            raise ValueError(f"past_key_values has a batch of {cache.batch_size}, the input one of {batch}")
        return cache.get_seq_length()

    def _check_broadcast(self, name: str, ids: Tensor, batch: int, tokens: int) -> Tensor:
        if ids.dim() == 1:
            ids = ids.unsqueeze(0)
        if ids.dim() != 2 or ids.shape[1] != tokens or ids.shape[0] not in (1, batch):
            raise ValueError(f"{name} has shape {list(ids.shape)}; accepted: [{batch}, {tokens}] or [1, {tokens}]")
        return self._check_ids(name, ids)

    def _full_mask(self, mask: Tensor, batch: int, tokens: int, columns: int, cache: KVCache) -> Tensor:
        """A mask [B, T|1, S] or [B|1, H|1, T|1, S] as the attention takes it. It stands alone: no causal limit is
        added to it, so that trees and prefixes can be expressed."""
        also = "" if tokens == columns else f"[{batch}, {tokens}] or "
        full = self._shaped_mask("attention_mask", mask, batch, tokens, columns, also)
        if cache.has_padding:
            raise ValueError("a 3-D or 4-D attention_mask cannot follow padding that past_key_values left out")
        return full

    def _shaped_mask(self, name: str, mask: Tensor, batch: int, tokens: int, columns: int, also: str = "") -> Tensor:
        full = mask.unsqueeze(1) if mask.dim() == 3 else mask
        heads = self._shape.num_heads
        fits = full.dim() == 4 and full.shape[0] in (1, batch) and full.shape[1] in (1, heads)
        if not fits or full.shape[2] not in (1, tokens) or full.shape[3] != columns:
            rows = f"{tokens}|1" if tokens > 1 else "1"
            raise ValueError(
                f"{name} has shape {list(mask.shape)}; accepted: {also}[{batch}, {columns}] (1 = token, 0 = padding), "
                f"[{batch}, {rows}, {columns}], [{batch}|1, {heads}|1, {rows}, {columns}]"
            )
        if full.dtype != torch.bool and not full.dtype.is_floating_point:
            raise ValueError(
                f"{name} of {mask.dim()} dimensions has dtype {mask.dtype}; accepted: bool (True = visible) or "
                "floating point (added to the scores)"
            )
        full = full.expand(-1, -1, tokens, -1)  # one row for all queries, as code for encoders makes it
        return full.float() if full.dtype == torch.float64 else full

    def _head_masks(self, head_mask: Tensor) -> Sequence[Tensor]:
        layers, heads = len(self._bound.blocks), self._shape.num_heads
        if list(head_mask.shape) not in ([heads], [layers, heads]):
            raise ValueError(f"head_mask has shape {list(head_mask.shape)}; accepted: [{heads}] or [{layers}, {heads}]")
        self._check_device("head_mask", head_mask)
        head_mask = head_mask.to(torch.float32).contiguous()
        return [head_mask] * layers if head_mask.dim() == 1 else list(head_mask)

    def _check_encoder(
        self, cache: KVCache, batch: int, tokens: int, states: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The encoder's tokens, bool [B, S] (None: all), and its mask of four dimensions (None: none)."""
        if self._bound.cross is None:
            raise ValueError(
                "encoder_hidden_states and encoder_attention_mask need a model with cross-attention; the configuration "
                "has add_cross_attention=False"
            )
        kept = cache.cross
        if states is not None:
            given_batch, columns = self._check_embeds("encoder_hidden_states", states)
            if given_batch != batch:
                raise ValueError(f"encoder_hidden_states has a batch of {given_batch}, the input one of {batch}")
        elif kept is None:
            raise ValueError("encoder_attention_mask is given without encoder_hidden_states")
        else:
            columns = kept.num_columns
        if kept is not None and columns != kept.num_columns:
            raise ValueError(
                f"encoder_hidden_states has {columns} columns; past_key_values keeps the keys and values of "
                f"{kept.num_columns}"
            )
        if mask is None:
            return None, None
        self._check_device("encoder_attention_mask", mask)
        if list(mask.shape) != [batch, columns]:
            mask = self._shaped_mask("encoder_attention_mask", mask, batch, tokens, columns)
            if kept is not None and kept.real is not None:
                raise ValueError("a 3-D or 4-D encoder_attention_mask cannot follow padding that was left out")
            return None, mask
        real = mask.bool()
        if kept is not None and not (bool(real.all()) if kept.real is None else torch.equal(real, kept.real)):
            raise ValueError("encoder_attention_mask differs from the one that past_key_values was filled with")
        return real, None
