"""One step of decoding as a CUDA graph: a single launch in place of some five a layer.

Everything that changes from step to step lies on the device (tokens, positions, lengths), and the kernels read the
lengths there, so one graph serves every length up to the capacity of the cache it was captured with.

B batch, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.models.blocks import embedding_op
from alula.models.heads import normed_linear
from alula.models.layers import VERSION

if TYPE_CHECKING:
    from alula.models.decoder import DecoderWithHead

__all__ = ["DecodeGraph"]


class DecodeGraph:
    """A captured step of a causal language model over one cache.

    Args:
        model: on a CUDA device, with ``lm_head``.
        cache: of fixed capacity (``max_length``), on the same device, without padding and encoder states.
    """

    def __init__(self, model: DecoderWithHead, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._stamp = VERSION.count
        self._layers = list(cache.layers)
        batch, device = cache.batch_size, model.device
        with torch.inference_mode(False), torch.no_grad():
            self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._position_ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self._lengths = torch.zeros(batch, dtype=torch.int32, device=device)  # before the step
            # Writes into slots that nothing uses yet; also sets up what is made at first use (cuBLAS, counters).
            self._lengths.copy_(cache.lengths)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream(device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._step()

    def _step(self) -> Tensor:
        base, bound = self._model.base_model, self._model.base_model._bind()
        has_positions = bound.position_table is not None
        x = embedding_op(
            self._ids,
            bound.table.data,
            bound.vocab_size,
            base._shape.width,
            self._position_ids if has_positions else None,
            bound.position_table,
            None,
        )
        slots = self._lengths.unsqueeze(1)
        x = base._run_blocks(
            x, self._cache, slots, self._lengths + 1, None, None, None, True, None, None, self._position_ids
        )
        return normed_linear(x, base.final_norm(), self._model.lm_head)

    def fits(self, model: DecoderWithHead, cache: KVCache) -> bool:
        """Whether what was captured is still what there is: the weights and the cache's memory."""
        same = model is self._model and cache is self._cache and self._stamp == VERSION.count
        return same and all(a is b for a, b in zip(self._layers, cache.layers, strict=True))

    def run(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        """The logits [B, 1, V] of one new token a row, int64 [B, 1], at the positions int64 [B, 1]. The cache grows by
        it. The result is overwritten by the next call. ValueError for a cache that is full."""
        cache = self._cache
        with torch.inference_mode(False), torch.no_grad():
            self._ids.copy_(ids, non_blocking=True)
            self._position_ids.copy_(position_ids)
            self._lengths.copy_(cache.lengths)
            cache.prepare(1)
            self._graph.replay()
        return self._logits


def can_capture(model: object, cache: KVCache) -> bool:
    """Whether a step of this model over this cache can be a graph."""
    return (
        model.device.type == "cuda"
        and hasattr(model, "lm_head")
        and hasattr(model.base_model, "final_norm")
        and cache.max_length is not None
        and bool(cache.layers)
        and not cache.has_padding
        and cache.cross is None
    )
