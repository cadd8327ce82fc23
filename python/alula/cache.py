"""The key/value cache: one merged tensor a layer, padding never stored.

A column is a token position of the batch as the caller sees it, [B, columns]; a slot is where a row's token lies in
its part of the cache. They differ only for rows with padding: a padding token takes a column and no slot, so a left-,
right- or hole-padded row holds exactly what it would hold alone, and the kernels need lengths instead of masks.

Alphabet: B batch, T new tokens, S slots, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alula import ops
from alula.config import PretrainedConfig

__all__ = ["CrossKeyValues", "KVCache"]

_FIRST_CAPACITY = 64


class CrossKeyValues:
    """Keys and values of an encoder's states for the cross-attention of all layers. They never change after.

    Attributes:
        layers: list of L tensors [B, H, S, 2*D], key in ``[..., :D]``, value in ``[..., D:]``. Padding of the encoder
            is left out: the tokens of a row come first.
        lengths: int32 [B], tokens of each row.
        real: bool [B, columns], which columns of the encoder's states were tokens; None: all of them.
    """

    def __init__(self, layers: list[Tensor], lengths: Tensor, real: Tensor | None) -> None:
        self.layers, self.lengths, self.real = layers, lengths, real

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.layers)

    @property
    def num_columns(self) -> int:
        """Columns of the encoder's states, padding included."""
        return self.layers[0].shape[2] if self.real is None else self.real.shape[1]

    def reorder(self, indices: Tensor) -> CrossKeyValues:
        """Row i is what row ``indices[i]`` is here."""
        return CrossKeyValues(
            [layer.index_select(0, indices) for layer in self.layers],
            self.lengths.index_select(0, indices),
            None if self.real is None else self.real.index_select(0, indices),
        )


class KVCache:
    """Keys and values of all layers, pre-allocated.

    Args:
        config: a model configuration, or anything with ``num_hidden_layers``, ``num_key_value_heads`` and ``head_dim``.
        batch_size: B.
        max_length: slots a row. None: it starts small and doubles when full.
        dtype: of the model that fills it (default: the configuration's, else float32).
        device: where it lies.

    Attributes:
        layers: list of L tensors [B, G, capacity, 2*D], key in ``[..., :D]``, value in ``[..., D:]``. Slots at or
            beyond a row's length are undefined.
        lengths: int32 [B], tokens stored in each row.
        cross: keys and values of an encoder's states, kept from the first pass that was given some; else None.
    """

    def __init__(
        self,
        config: PretrainedConfig | Any,
        batch_size: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        _shared_layer: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; accepted: 1 or more")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}; accepted: 1 or more, or None for a cache that grows")
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.dtype: torch.dtype = dtype or getattr(config, "dtype", None) or torch.float32
        self.device = torch.empty(0, device=device).device  # with its index
        self.max_length = max_length
        self.layers: list[Tensor] = []
        self.cross: CrossKeyValues | None = None
        self._shared_layer = _shared_layer  # one tensor serves every layer: a forward pass that keeps nothing
        self._capacity = 0
        self._columns = 0
        self._longest = 0  # an upper bound of lengths.max(), exact where padding was counted
        self._real: Tensor | None = None  # bool [B, >= columns]; None while every column is real in every row
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        if max_length is not None:
            self._reallocate(max_length)

    # --- what it holds --------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Slots that each row has now."""
        return self._capacity

    @property
    def longest(self) -> int:
        """An upper bound of the tokens stored in a row, known without asking the device."""
        return self._longest

    @property
    def nbytes(self) -> int:
        """Bytes of the key/value tensors."""
        own = sum(t.nbytes for t in (self.layers[:1] if self._shared_layer else self.layers))
        return own + (0 if self.cross is None else self.cross.nbytes)

    @property
    def has_padding(self) -> bool:
        """Whether some column was padding in some row."""
        return self._real is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included (Hugging Face's meaning)."""
        return self._columns

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return (
            f"KVCache(layers={self.num_layers}, batch={self.batch_size}, columns={self._columns}, "
            f"capacity={self._capacity}, dtype={self.dtype})"
        )

    def key(self, layer: int) -> Tensor:
        """The keys of a layer, [B, G, S, D], S the longest row: a view, no copy. Row b is defined up to lengths[b]."""
        return self._filled(layer)[..., : self.head_dim]

    def value(self, layer: int) -> Tensor:
        """The values of a layer, [B, G, S, D]: as :meth:`key`."""
        return self._filled(layer)[..., self.head_dim :]

    def _filled(self, layer: int) -> Tensor:
        if not self.layers:
            shape = (self.batch_size, self.num_kv_heads, 0, 2 * self.head_dim)
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return self.layers[layer][:, :, : int(self.lengths.max())]

    def real_columns(self) -> Tensor | None:
        """bool [B, columns]: which columns were tokens. None: all of them."""
        return None if self._real is None else self._real[:, : self._columns]

    # --- one forward pass -----------------------------------------------------------------------------------

    def prepare(self, num_tokens: int, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Makes room for T new tokens a row and says where they go.

        Args:
            num_tokens: T.
            attention_mask: [B, T] over the new tokens, or [B, columns + T] over all, in which case its past part must
                say of every past column what was stored. Nonzero = token, 0 = padding. None: all new ones are tokens.

        Returns: (positions int32 [B, T], the slot of each token, -1 for padding; lengths int32 [B], with the new
        tokens). Raises ValueError, with nothing changed, for a mask that does not fit or a cache that is full.
        """
        new = None if attention_mask is None else self._new_columns(num_tokens, attention_mask)
        if new is None:
            longest = self._longest + num_tokens
            self._reserve(longest)
            positions = self.lengths.unsqueeze(1)
            if num_tokens > 1:
                positions = positions + torch.arange(num_tokens, dtype=torch.int32, device=self.device)
            lengths = self.lengths + num_tokens
        else:
            counts = new.cumsum(1, dtype=torch.int32)
            lengths = self.lengths + counts[:, -1]
            longest = int(lengths.max())
            self._reserve(longest)
            positions = (self.lengths.unsqueeze(1) + counts - 1).masked_fill_(~new, -1)
        if new is not None or self._real is not None:
            self._note_columns(num_tokens, new)
        self._columns += num_tokens
        self._longest = longest
        self.lengths = lengths
        return positions, lengths

    def reserve(self, slots: int) -> None:
        """Makes room for ``slots`` tokens a row in all; ValueError where ``max_length`` forbids it."""
        self._reserve(slots)

    def first_rows(self, count: int) -> KVCache:
        """The first rows alone, empty, in the same memory; of a cache with ``max_length``."""
        if self.max_length is None or not 1 <= count <= self.batch_size:
            raise ValueError(f"first_rows({count}) of {self.batch_size} rows with max_length={self.max_length}")
        shape = SimpleNamespace(
            num_hidden_layers=self.num_layers, num_key_value_heads=self.num_kv_heads, head_dim=self.head_dim
        )
        rows = KVCache(shape, count, dtype=self.dtype, device=self.device)
        rows.layers = [layer[:count] for layer in self.layers]
        rows.max_length, rows._capacity = self.max_length, self._capacity
        return rows

    def advance(self, running: Sequence[bool], num_columns: int = 1) -> None:
        """Notes columns that were written without :meth:`prepare`: tokens in the rows that run, padding in the others.

        It does not wait for the device. The memory must have room for them.
        """
        new = None
        lengths = num_columns
        if not all(running):
            new = torch.tensor(running).unsqueeze(1).expand(-1, num_columns).to(self.device)
            lengths = num_columns * new[:, 0]
        with torch.inference_mode(False):
            self.lengths = self.lengths + lengths
        if new is not None or self._real is not None:
            self._note_columns(num_columns, new)
        self._columns += num_columns
        self._longest = min(self._longest + num_columns, self._capacity)

    def _new_columns(self, num_tokens: int, attention_mask: Tensor) -> Tensor | None:
        """The mask of the new columns, bool [B, T], or None if all are tokens; checks shape and past."""
        past, batch = self._columns, self.batch_size
        shape = list(attention_mask.shape)
        if shape not in ([batch, num_tokens], [batch, past + num_tokens]):
            accepted = f"[{batch}, {num_tokens}]" + (f" or [{batch}, {past + num_tokens}]" if past else "")
            raise ValueError(f"attention_mask has shape {shape}; accepted: {accepted} (batch, tokens)")
        mask = attention_mask.to(device=self.device, dtype=torch.bool)
        if past and shape[1] > num_tokens:
            stored = self.real_columns()
            seen = mask[:, :past]
            if not (bool(seen.all()) if stored is None else torch.equal(seen, stored)):
                wrong = (~seen if stored is None else seen != stored).nonzero()[0].tolist()
                raise ValueError(
                    f"attention_mask says {bool(seen[tuple(wrong)])} of row {wrong[0]}, column {wrong[1]}, which was "
                    f"stored as {not bool(seen[tuple(wrong)])}; its past part must repeat the masks of earlier calls"
                )
        new = mask[:, -num_tokens:]
        return None if bool(new.all()) else new

    def _note_columns(self, num_tokens: int, new: Tensor | None) -> None:
        """Remembers which new columns are real. The memory is filled with True ahead, so real ones cost nothing."""
        end = self._columns + num_tokens
        with torch.inference_mode(False):
            if self._real is None or self._real.shape[1] < end:
                grown = torch.ones(self.batch_size, max(end, 2 * self._capacity), dtype=torch.bool, device=self.device)
                if self._real is not None:
                    grown[:, : self._columns] = self._real[:, : self._columns]
                self._real = grown
            if new is not None:
                self._real[:, self._columns : end] = new

    def _reserve(self, slots: int) -> None:
        if slots <= self._capacity:
            return
        if self.max_length is not None:
            raise ValueError(f"the cache holds max_length={self.max_length} tokens a row, {slots} are needed")
        if self._shared_layer:
            self._reallocate(slots)
            return
        capacity = max(self._capacity, _FIRST_CAPACITY)
        while capacity < slots:
            capacity *= 2
        self._reallocate(capacity)

    def _reallocate(self, capacity: int) -> None:
        shape = (self.batch_size, self.num_kv_heads, capacity, 2 * self.head_dim)
        with torch.inference_mode(False):
            if self._shared_layer:
                self.layers = [torch.empty(shape, dtype=self.dtype, device=self.device)] * self.num_layers
            else:
                like = torch.empty(0, dtype=self.dtype, device=self.device)
                for i, grown in enumerate(ops.cache_layers(like, self.num_layers, shape)):
                    if i < len(self.layers):
                        grown[:, :, : self._longest] = self.layers[i][:, :, : self._longest]
                        self.layers[i] = grown
                    else:
                        self.layers.append(grown)
        self._capacity = capacity

    # --- changes between passes -----------------------------------------------------------------------------

    def crop(self, max_length: int) -> None:
        """Forgets all columns but the first ``max_length``; a negative number drops that many from the end."""
        columns = self._columns + max_length if max_length < 0 else min(max_length, self._columns)
        if columns < 0:
            raise ValueError(f"crop({max_length}) of a cache of {self._columns} columns")
        with torch.inference_mode(False):
            if self._real is None:
                self.lengths = torch.full_like(self.lengths, columns)
            else:
                self.lengths = self._real[:, :columns].sum(1, dtype=torch.int32)
                self._real[:, columns:] = True
                if bool(self._real[:, :columns].all()):
                    self._real = None
        self._columns = columns
        self._longest = min(self._longest, columns)

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        self.crop(0)
        self.cross = None

    def reorder(self, indices: Tensor) -> None:
        """Row i becomes what row ``indices[i]`` was; ``indices`` int64 [B'], B' may differ from B (beam search)."""
        if indices.dim() != 1 or not len(indices):
            raise ValueError(f"indices has shape {list(indices.shape)}; accepted: one dimension, not empty")
        indices = indices.to(device=self.device, dtype=torch.int64)
        if int(indices.min()) < 0 or int(indices.max()) >= self.batch_size:
            raise ValueError(f"indices {indices.tolist()} reach outside the batch of {self.batch_size}")
        with torch.inference_mode(False):
            self.layers = [layer.index_select(0, indices) for layer in self.layers]
            self.lengths = self.lengths.index_select(0, indices)
            if self._real is not None:
                self._real = self._real.index_select(0, indices)
            if self.cross is not None:
                self.cross = self.cross.reorder(indices)

    reorder_cache = reorder
    batch_select_indices = reorder

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times in place."""
        self.reorder(torch.arange(self.batch_size).repeat_interleave(repeats))
