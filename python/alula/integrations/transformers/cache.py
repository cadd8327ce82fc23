"""Cache layers for transformers' ``Cache``: key and value merged in one pre-allocated tensor, as the kernels read it.

A layer holds ``merged`` [B, G, capacity, 2*D], key in ``[..., :D]``, value in ``[..., D:]``; ``keys`` and ``values``
are views of what is filled. Columns mean what they mean in transformers: padding is stored and masked. Nothing is
concatenated: :class:`GrowingLayer` doubles its memory when it is full, :class:`FixedLayer` has it from the start.

Alphabet: B batch, T new tokens, S columns, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, StaticCache, StaticLayer

from alula import ops
from alula.integrations.transformers.versions import parameters

__all__ = ["FixedLayer", "GrowingLayer", "adopt", "decoder_cache", "has_our_layers", "make_cache", "merged_view"]

FIRST_CAPACITY = 64
# What a positive number means to crop: the length to keep (4.57), or nothing any more (5.x).
_CROP_KEEPS = "max_length" in parameters(DynamicLayer.crop)


class _MergedLayer:
    """What both kinds of layers share. ``filled`` counts the columns that ``keys`` and ``values`` show."""

    merged: Tensor | None = None
    head_dim: int = 0
    is_initialized: bool

    @property
    def filled(self) -> int:
        raise AttributeError("a layer says how much of it is filled")

    @property
    def keys(self) -> Tensor | None:
        return None if self.merged is None else self.merged[:, :, : self.filled, : self.head_dim]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign("keys", value)

    @property
    def values(self) -> Tensor | None:
        return None if self.merged is None else self.merged[:, :, : self.filled, self.head_dim :]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign("values", value)

    def _assign(self, name: str, value: Tensor | None) -> None:
        if value is None:
            if self.merged is None:
                return
            raise AttributeError(f"{name} of a {type(self).__name__} cannot be removed; call reset()")
        view = getattr(self, name)
        if view is None or view.shape != value.shape or view.dtype != value.dtype:
            have = None if view is None else list(view.shape)
            raise AttributeError(
                f"{name} of a {type(self).__name__} are a view of its merged tensor {have}; tensors of that shape and "
                f"dtype can be written into it, not {list(value.shape)} of {value.dtype}"
            )
        if value is not view:
            view.copy_(value)

    def offload(self) -> None:
        """Moves the tensor to the CPU."""
        if self.merged is not None:
            self.merged = self.merged.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Moves it back to where it was made."""
        if self.merged is not None and self.merged.device != self.device:
            self.merged = self.merged.to(self.device, non_blocking=True)

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """(columns a query of this length or of these positions may see, offset of the first)."""
        length = query.shape[0] if isinstance(query, Tensor) else query
        return self._mask_length(length), 0


class GrowingLayer(_MergedLayer, DynamicLayer):
    """A layer of a dynamic cache."""

    def __init__(self, **kwargs: Any) -> None:
        DynamicLayer.__init__(self)
        self.length = 0

    @property
    def filled(self) -> int:
        return self.length

    def _mask_length(self, query: int) -> int:
        return self.length + query

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.start(key_states.shape[0], key_states.shape[1], key_states.shape[3], key_states.dtype, key_states.device)

    def start(self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Says what will be stored; memory comes with the first tokens."""
        self.dtype, self.device, self.head_dim = dtype, device, head_dim
        with torch.inference_mode(False):
            self.merged = torch.empty((batch, kv_heads, 0, 2 * head_dim), dtype=dtype, device=device)
        self.length = 0
        self.is_initialized = True

    def reserve(self, tokens: int) -> Tensor:
        """The merged tensor with room for T more columns; ``length`` stays."""
        merged, needed = self.merged, self.length + tokens
        if merged.shape[2] < needed:
            capacity = max(merged.shape[2], FIRST_CAPACITY)
            while capacity < needed:
                capacity *= 2
            self.merged = self._copy(capacity, merged, self.length)
        return self.merged

    @staticmethod
    def _copy(capacity: int, merged: Tensor, length: int, rows: Tensor | None = None) -> Tensor:
        batch = merged.shape[0] if rows is None else rows.shape[0]
        with torch.inference_mode(False), torch.no_grad():
            copy = ops.cache_layers(merged, 1, (batch, merged.shape[1], capacity, merged.shape[3]))[0]
            if length:
                source = merged[:, :, :length]
                copy[:, :, :length] = source if rows is None else source.index_select(0, rows)
        return copy

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, G, T, D] each; returns views of all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, tokens = self.length, key_states.shape[2]
        merged = self.reserve(tokens)
        merged[:, :, start : start + tokens, : self.head_dim] = key_states
        merged[:, :, start : start + tokens, self.head_dim :] = value_states
        self.length = start + tokens
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        """Forgets everything; the next tokens may be of another batch."""
        self.merged, self.length, self.is_initialized = None, 0, False

    def crop(self, count: int) -> None:
        """Negative: drops that many columns from the end. Else as the installed transformers: 4.57 keeps the first
        ``count``, 5.x accepts 0, which drops nothing, and refuses more."""
        if count > 0 and not _CROP_KEEPS:
            raise ValueError(f"crop({count}); accepted: a negative number, the columns to remove from the end, or 0")
        if count < 0 or _CROP_KEEPS:
            self.length = max(0, self.length + count) if count < 0 else min(self.length, count)

    def _select(self, rows: Tensor) -> None:
        if self.length:
            self.merged = self._copy(self.merged.shape[2], self.merged, self.length, rows.to(self.merged.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices`` (int64, or bool [B])."""
        self._select(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times in place."""
        if self.length:
            self._select(torch.arange(self.merged.shape[0]).repeat_interleave(repeats))


class FixedLayer(_MergedLayer, StaticLayer):
    """A layer of a static cache: all memory from the start, addresses that never change, lengths in a tensor, so that a
    compiled step serves every position."""

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        StaticLayer.__init__(self, max_cache_len)
        self.cumulative_length = torch.zeros((), dtype=torch.int64)

    @property
    def filled(self) -> int:
        return self.max_cache_len

    def _mask_length(self, query: int) -> int:
        return self.max_cache_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.start(key_states.shape[0], key_states.shape[1], key_states.shape[3], key_states.dtype, key_states.device)

    def start(self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates [B, G, max_cache_len, 2*D] zeros."""
        self.dtype, self.device, self.head_dim = dtype, device, head_dim
        self.batch_size = self.max_batch_size = batch
        self.num_heads, self.k_head_dim, self.v_head_dim = kv_heads, head_dim, head_dim
        shape = (batch, kv_heads, self.max_cache_len, 2 * head_dim)
        with torch.inference_mode(False):
            self.merged = torch.zeros(shape, dtype=dtype, device=device)
            self.cumulative_length = self.cumulative_length.to(device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.merged)
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, G, T, D] each behind what is stored, or at 4.57's ``cache_kwargs["cache_position"]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns = None if cache_kwargs is None else cache_kwargs.get("cache_position")
        tokens = key_states.shape[2]
        if columns is None:
            columns = torch.arange(tokens, device=self.device) + self.cumulative_length
        self.keys.index_copy_(2, columns, key_states)
        self.values.index_copy_(2, columns, value_states)
        self.cumulative_length.copy_(columns[-1] + 1)
        return self.keys, self.values

    def get_seq_length(self) -> Tensor | int:
        return self.cumulative_length if self.is_initialized else 0

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        if self.merged is not None:
            self.merged.zero_()
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, at the same address."""
        if self.merged is not None:
            self.merged.copy_(self.merged.index_select(0, beam_idx.to(self.merged.device)))


_PLAIN = {DynamicLayer: GrowingLayer, StaticLayer: FixedLayer}


def merged_view(keys: Tensor, values: Tensor) -> Tensor | None:
    """The merged [B, G, S, 2*D] that these keys and values [B, G, S, D] are views of; None if they are not."""
    size = keys.shape[3]
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.stride(3) != 1:
        return None
    if keys.stride(2) != 2 * size or values.data_ptr() != keys.data_ptr() + size * keys.element_size():
        return None
    return keys.as_strided((*keys.shape[:3], 2 * size), keys.stride())


def decoder_cache(cache: Cache) -> Cache:
    """The self-attention part of a cache."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def adopt(cache: Cache, num_layers: int) -> str | None:
    """Puts alula's layers in place of a cache's own, with what they hold. Returns why that cannot be, else None.

    The cache stays the object it was, of the class it was: only its layers are others.
    """
    if not isinstance(cache, Cache):
        return f"past_key_values is a {type(cache).__name__}"
    if type(cache).update is not Cache.update:
        return f"the cache is a {type(cache).__name__}, which updates in its own way"
    if getattr(cache, "offloading", False):
        return "the cache offloads its layers"
    layers = cache.layers
    if not layers:
        if getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
            return f"the cache is a {type(cache).__name__} without layers"
        cache.layers = [GrowingLayer() for _ in range(num_layers)]
        cache.layer_class_to_replicate = None
        return None
    if len(layers) != num_layers:
        if len(layers) > num_layers or getattr(cache, "layer_class_to_replicate", None) is None:
            return f"the cache has {len(layers)} layers, the model {num_layers}"
        layers = [*layers, *(cache.layer_class_to_replicate() for _ in range(num_layers - len(layers)))]
    others = {type(layer).__name__ for layer in layers if type(layer) not in (*_PLAIN, GrowingLayer, FixedLayer)}
    if others:
        return f"the cache has layers of {', '.join(sorted(others))}"
    if any(_holds(layer) and layer.keys.shape != layer.values.shape for layer in layers):
        return "the cache has keys and values of different shapes"
    cache.layers = [_convert(layer) for layer in layers]
    cache.layer_class_to_replicate = None
    return None


def _holds(layer: DynamicLayer | StaticLayer) -> bool:
    return layer.is_initialized and layer.keys is not None and layer.keys.numel() > 0


def _convert(layer: DynamicLayer | StaticLayer) -> GrowingLayer | FixedLayer:
    if isinstance(layer, _MergedLayer):
        return layer
    if isinstance(layer, StaticLayer):
        fixed = FixedLayer(layer.max_cache_len)
        if layer.is_initialized:
            fixed.lazy_initialization(layer.keys)
            fixed.keys.copy_(layer.keys)
            fixed.values.copy_(layer.values)
            fixed.cumulative_length.fill_(int(layer.get_seq_length()))
        return fixed
    growing = GrowingLayer()
    if _holds(layer):
        growing.update(layer.keys, layer.values)
    return growing


def has_our_layers(cache: Cache) -> bool:
    """Whether a cache's layers are alula's."""
    return any(isinstance(layer, _MergedLayer) for layer in decoder_cache(cache).layers)


def make_cache(config: Any, max_length: int | None = None) -> Cache:
    """A cache of alula's layers for a model of this configuration: growing, or with room for ``max_length`` columns."""
    cache = DynamicCache(config=config) if max_length is None else StaticCache(config=config, max_cache_len=max_length)
    reason = adopt(cache, config.get_text_config(decoder=True).num_hidden_layers)
    if reason:
        raise ValueError(f"no cache of alula's for a {type(config).__name__}: {reason}")
    return cache
