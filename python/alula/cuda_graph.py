"""One step of decoding that asks the device for nothing, and its capture as a CUDA graph: a single launch in place of
some five a layer.

Everything that changes from step to step lies on the device (tokens, positions, lengths, random numbers, which rows
run), and the kernels read the lengths there, so one graph serves every length up to the capacity of the cache it was
captured with.  A step has as many rows as its bucket (1, 2, 4, 8, 16, ...); rows that are nobody's are like rows that
have ended: nothing of them is stored, and nobody reads what they give.  Steps are kept for the next call.

On a CPU the same step runs, and is tested, without a graph.

B rows of a call, R of the bucket, V vocabulary.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alula.cache import KVCache
from alula.device_sampling import DeviceChooser

if TYPE_CHECKING:
    from alula.models.decoder import DecoderWithHead

Step = Callable[["DecoderWithHead"], Tensor]  # queues work, returns logits

__all__ = ["DecodeStep", "bucket_of", "can_step", "pooled_step"]

FEWEST_GRAPH_STEPS = 8  # what a capture into a CUDA graph is worth for; a guess, not measured
_LEAST_SLOTS = 256
_KEPT_STEPS = 4  # of a model
_KEPT_GRAPHS = 6  # of a step: one for each set of options


def bucket_of(rows: int) -> int:
    """Rows of the step that serves `rows`: the next power of two."""
    return 1 << (rows - 1).bit_length()


def can_step(model: Any) -> bool:
    """Whether this model has a step that needs no help from Python."""
    return hasattr(model, "decode_step")


class DecodeStep:
    """A step of a causal language model over one cache: reads the newest token of each row and chooses the next.

    Args:
        model: one that :func:`can_step`; it is not kept alive.
        cache: of R rows; the step writes its tensors and never asks it how long the rows are.
        max_new: N, the most tokens that one call may make.

    Attributes: `chooser`, the rows' state.
    """

    def __init__(self, model: DecoderWithHead, cache: KVCache, max_new: int) -> None:
        self.cache = cache
        self.capacity = cache.capacity
        self.owner: Callable[[], object | None] = lambda: None  # a weak reference to whoever uses it now
        self._layers = list(cache.layers)
        self._stamp, self._device = model.weights_stamp, model.device
        # Under ALULA_SYNC each launch waits for its kernel, which a capture does not allow.
        self._can_capture = model.device.type == "cuda" and os.environ.get("ALULA_SYNC", "0") in ("", "0")
        self._warm: set[Any] = set()
        self._graphs: dict[Any, tuple[Any, Tensor]] = {}
        self._pool: Any = None
        self._stream: Any = None  # captures run on: torch's own belongs to the GPU that captured first
        rows = cache.batch_size
        self.chooser = DeviceChooser(rows, model.get_output_embeddings().out_features, max_new, model.device)

    @property
    def rows(self) -> int:
        return self.cache.batch_size

    def fits(self, model: DecoderWithHead) -> bool:
        """Whether what was captured is still what there is: the weights and the cache's memory."""
        same = self._stamp == model.weights_stamp and self._device == model.device and self.cache.dtype == model.dtype
        return same and all(a is b for a, b in zip(self._layers, self.cache.layers, strict=True))

    # --- a step: nothing below waits for the device ---------------------------------------------------------

    def logits(self, model: DecoderWithHead) -> Tensor:
        """The logits [R, V] after the newest tokens. The state stays, so that it can be done again."""
        rows = self.chooser.state
        return model.decode_step(rows.tokens, rows.positions, rows.slots, rows.seen, self.cache)[:, -1]

    def _whole(self, model: DecoderWithHead) -> Tensor:
        logits = self.logits(model)
        self.chooser.choose(self.chooser.process(logits), advances=True)
        return logits

    # --- as a graph -----------------------------------------------------------------------------------------

    def run(self, model: DecoderWithHead, num_left: int) -> Tensor:
        """A whole step; its logits [R, V], overwritten by the next. `num_left`: this one and those to come."""
        return self._run(("whole", self.chooser.kind), self._whole, model, num_left)

    def run_logits(self, model: DecoderWithHead, num_left: int) -> Tensor:
        """Only :meth:`logits`, for those who change them before `chooser.choose`."""
        return self._run("logits", self.logits, model, num_left)

    def _run(self, key: Any, call: Step, model: DecoderWithHead, num_left: int) -> Tensor:
        if self._stamp != model.weights_stamp:  # weights have changed, and may lie elsewhere
            self._graphs.clear()
            self._warm.clear()  # what is made of new weights at first use may not be made in a capture
            self._pool = None  # torch takes no pool again that has lost all of its graphs
            self._stamp = model.weights_stamp
        known = self._graphs.get(key)
        if known is None and (not self._can_capture or key not in self._warm or num_left < FEWEST_GRAPH_STEPS):
            self._warm.add(key)  # this step also sets up what is made at first use (cuBLAS, counters)
            return call(model)
        if known is None:
            known = self._capture(call, model)
            if len(self._graphs) == _KEPT_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = known
        graph, logits = known
        graph.replay()
        return logits

    def _capture(self, call: Step, model: DecoderWithHead) -> tuple[Any, Tensor]:
        """The graph of a call, not run yet, and the tensor that it fills."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                logits = call(model)
        return graph, logits


# --- steps that are kept for the next call ----------------------------------------------------------------------------

_pools: weakref.WeakKeyDictionary[Any, dict[int, DecodeStep]] = weakref.WeakKeyDictionary()


def pooled_step(model: DecoderWithHead, rows: int, slots: int, owner: object) -> DecodeStep:
    """A step over a cache of its own for `rows` rows of up to `slots` tokens, `owner`'s until that is gone.

    The one of the last call with as many rows (rounded up), if it is free, large enough, and the weights are the same.
    """
    pool = _pools.setdefault(model, {})
    bucket = bucket_of(rows)
    step = pool.pop(bucket, None)
    if step is not None and step.owner() is not None:
        pool[bucket] = step
        return _new_step(model, rows, slots, owner)  # two at a time: the second has its own, and keeps nothing
    if step is None or not step.fits(model) or step.capacity < slots:
        step = None  # its memory first
        limit = getattr(model.config, "max_position_embeddings", slots)
        wanted = max(slots, min(max(_LEAST_SLOTS, 1 << (slots - 1).bit_length()), limit))
        try:
            step = _new_step(model, bucket, wanted, owner)
        except torch.OutOfMemoryError:
            pool.clear()
            step = _new_step(model, rows, slots, owner)
            return step
    while len(pool) >= _KEPT_STEPS:
        del pool[next(iter(pool))]
    pool[bucket] = step
    step.owner = weakref.ref(owner)
    return step


def _new_step(model: DecoderWithHead, rows: int, slots: int, owner: object) -> DecodeStep:
    step = DecodeStep(model, model.new_cache(rows, max_length=slots), slots)
    step.owner = weakref.ref(owner)
    return step
