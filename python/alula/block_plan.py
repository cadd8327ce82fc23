"""Block plans: which key blocks each query block of a sequence attends to, and how often each counts.

A plan is made once for a shape and shared by calls and layers: the constructors hand out the same object for the same
arguments. `alula.ops.block_sparse_attention` takes it.

Alphabet: T tokens, N block size, n = ceil(T / N) blocks, H heads, r random blocks a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from alula import (
    _C,
    _library,  # noqa: F401  (loads the op library)
)
from alula.bigbird_draws import draw_training_blocks
from alula.block_schedule import Schedule, schedule_lists
from alula.plan_tensors import Lists, OnDevices

__all__ = ["BLOCK_SIZES", "BatchPlan", "BlockPlan", "batch_plans"]

BLOCK_SIZES = (16, 32, 64, 128)
_CACHED_PLANS = 256  # a model in training has one for each layer and length
_MOST_HEADS = 65536  # each head has lists of its own


class BlockPlan(OnDevices):
    """A list of (key block, count) for each query block, for all heads together or for each.

    A key of a block with count c enters the softmax c times (log(c) is added to its score). A count of 0 stands for
    "only the pairs with a global token in them". Plans are immutable; a plan for n blocks fits every sequence of more
    than (n - 1) * N and at most n * N tokens.

    Attributes:
        block_size: N. num_blocks: n. num_heads: 1 (all heads share the lists) or H.
        is_causal: a query sees no key after itself, inside its own block too.
        starts: int32 [num_heads, n + 1]; list i of head h is ``entries[starts[h, i] : starts[h, i + 1]]``.
        entries: int32 [total, 2]: key block, count; sorted by key block in each list.
        global_tokens: bool [n * N], or None.
    """

    def __init__(
        self,
        native: _C.BlockPlan,
        block_size: int,
        *,
        is_causal: bool = False,
        global_tokens: Iterable[int] = (),
        name: str = "own",
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.is_causal = is_causal
        self.num_blocks: int = native.num_blocks
        self.num_heads: int = native.num_heads
        self.starts: np.ndarray = _frozen(native.starts)
        self.entries: np.ndarray = _frozen(native.entries)
        self.global_tokens: np.ndarray | None = None
        self._native = native
        self._name = name
        tokens = np.fromiter(global_tokens, dtype=np.int64)
        if tokens.size:
            flags = np.zeros(self.num_blocks * block_size, dtype=np.bool_)
            flags[tokens] = True
            self.global_tokens = _frozen(flags)

    # --- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def evaluation(cls, num_tokens: int, block_size: int = 64, num_random_blocks: int = 3) -> BlockPlan:
        """The pattern of transformers' BigBird in evaluation, where every random block is block 0.

        Rows 0 and n - 1 see all; row i between sees {0, i - 1, i, i + 1, n - 1} with block 0 counted 1 + r times.
        Raises ValueError for fewer than four blocks.
        """
        return _evaluation(*_sizes(num_tokens, block_size), _whole(num_random_blocks, "num_random_blocks"))

    @classmethod
    def training(
        cls,
        num_tokens: int,
        block_size: int = 64,
        num_random_blocks: int = 3,
        *,
        num_heads: int,
        layer_idx: int,
        max_position_embeddings: int = 4096,
    ) -> BlockPlan:
        """The pattern of transformers' BigBird in training, bit for bit: random blocks for each head.

        They are a fixed function of the arguments (drawn from a generator seeded with ``layer_idx``; NumPy's global one
        is not touched). ``num_tokens`` counts the padding to a whole block, as the reference does: 1024, 3072 and 4096
        follow its older plan, which looks at ``max_position_embeddings``. Raises ValueError where the reference fails:
        a row that has fewer blocks to draw from than ``num_random_blocks``.
        """
        num_blocks, block_size = _sizes(num_tokens, block_size)
        return _training(
            num_blocks,
            block_size,
            _whole(num_random_blocks, "num_random_blocks"),
            _whole(num_heads, "num_heads", 1, _MOST_HEADS),
            _whole(layer_idx, "layer_idx", 0, 2**32 - 1),
            _whole(max_position_embeddings, "max_position_embeddings", 1),
        )

    @classmethod
    def pattern(
        cls,
        num_tokens: int,
        block_size: int = 64,
        *,
        window: int = 3,
        global_blocks: Sequence[int] = (0, -1),
        global_tokens: Sequence[int] = (),
        num_random_blocks: int = 0,
        num_heads: int = 1,
        seed: int = 0,
        is_causal: bool = False,
    ) -> BlockPlan:
        """A pattern of your own: what is listed counts once, however many reasons there are for it.

        Args:
            window: odd number of blocks around the query's own.
            global_blocks: block numbers (negative: from the end) that see all and are seen by all.
            global_tokens: token positions (negative: from the end) that see all and are seen by all (BigBird-ETC).
            num_random_blocks: drawn for each row among the blocks it does not see anyway, all where there are fewer;
                for each head if ``num_heads`` is H, the same for all heads if it is 1.
            seed: of the drawing; the same blocks on every machine.
            is_causal: a query sees no key after itself.
        """
        num_tokens = _whole(num_tokens, "num_tokens", 1)
        num_blocks, block_size = _sizes(num_tokens, block_size)
        tokens = tuple(_token(token, num_tokens) for token in _numbers(global_tokens, "global_tokens"))
        return _pattern(
            num_blocks,
            block_size,
            _whole(window, "window", 1),
            _numbers(global_blocks, "global_blocks"),
            tokens,
            _whole(num_random_blocks, "num_random_blocks"),
            _whole(num_heads, "num_heads", 1, _MOST_HEADS),
            _whole(seed, "seed", 0, 2**64 - 1),
            bool(is_causal),
        )

    @classmethod
    def from_lists(
        cls, lists: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]], block_size: int, *, is_causal=False
    ) -> BlockPlan:
        """The given lists: ``lists[i]`` (all heads alike) or ``lists[h][i]`` are the key blocks of query block i.

        A block that occurs k times in a list counts k times. Raises ValueError for a block out of range.
        """
        _check_block_size(block_size)
        try:
            heads = [list(head) for head in lists]
            if not heads:
                raise ValueError("no lists: a plan has one for each query block")
            if all(_is_number(block) for row in heads for block in row):
                heads = [heads]  # one list for each query block
            heads = [[list(row) for row in head] for head in heads]
        except TypeError:
            raise ValueError(
                f"lists is {_short(lists)}; accepted: for each query block a list of numbers of key blocks, or such "
                "lists for each head"
            ) from None
        num_blocks = len(heads[0])
        if any(len(head) != num_blocks for head in heads):
            raise ValueError(f"heads have {sorted({len(head) for head in heads})} lists; all must have the same number")
        flat = [list(_numbers(row, f"the list of query block {i}")) for head in heads for i, row in enumerate(head)]
        starts = np.cumsum([0, *map(len, flat)])
        native = _C.BlockPlan.listed(num_blocks, len(heads), starts.tolist(), [block for row in flat for block in row])
        return cls(native, block_size, is_causal=is_causal, name="listed")

    # --- what is in it -----------------------------------------------------------------------------------------------

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` has ``num_blocks`` blocks."""
        return (self.num_blocks - 1) * self.block_size < num_tokens <= self.num_blocks * self.block_size

    def block_counts(self) -> np.ndarray:
        """int32 [num_heads, n, n]: the count of each pair of blocks; 0 = not listed, -1 = global tokens only."""
        return self._native.counts()

    def to_dense(self, num_tokens: int | None = None) -> np.ndarray:
        """int32 [num_heads, T, T]: how often each key counts for each query; 0 = not seen. T: n * N when not given."""
        if num_tokens is None:
            num_tokens = self.num_blocks * self.block_size
        elif not self.fits(num_tokens):
            raise ValueError(f"{num_tokens} tokens do not fit a plan of {self.num_blocks} blocks of {self.block_size}")
        size = self.block_size
        dense = self.block_counts().repeat(size, axis=1).repeat(size, axis=2)[:, :num_tokens, :num_tokens]
        if self.global_tokens is not None:
            flags = self.global_tokens[:num_tokens]
            dense = np.where((dense == -1) & (flags[:, None] | flags[None, :]), 1, dense)
        dense = np.maximum(dense, 0)
        return np.tril(dense) if self.is_causal else dense

    def _lists(self) -> Lists:
        return Lists(self.starts[None], self.entries, None if self.global_tokens is None else self.global_tokens[None])

    def _schedule(self) -> Schedule:
        return schedule_lists([self.starts], self.block_size)

    def draw(self, head: int = 0, max_columns: int = 128) -> str:
        """A picture in text: a row for each query block. ``#`` counts once, a digit that often (``+``: 10 and more),
        ``o`` global tokens only, ``.`` not at all. Larger plans than ``max_columns`` are cut in the middle."""
        counts = self.block_counts()[self._head(head)]
        shown = np.arange(self.num_blocks)
        if self.num_blocks > max_columns:
            half = max(1, (max_columns - 3) // 2)
            shown = np.concatenate([shown[:half], [-1], shown[-half:]])
        lines = []
        for row in shown:
            if row < 0:
                lines.append("...")
                continue
            cells = ("..." if column < 0 else _symbol(counts[row, column]) for column in shown)
            lines.append("".join(cells))
        return "\n".join(lines)

    def save_picture(self, path: str, head: int = 0) -> None:
        """Write a picture with a square for each pair of tokens that see each other, darker the more often it counts.

        Needs matplotlib (``pip install matplotlib``).
        """
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        head = self._head(head)
        if self.global_tokens is None and not self.is_causal:
            picture, unit = self.block_counts()[head], "block"
        else:
            picture, unit = self.to_dense()[head], "token"
        figure, axis = pyplot.subplots(figsize=(8, 8), layout="constrained")
        image = axis.imshow(np.log2(1.0 + picture), cmap="magma_r", interpolation="nearest")
        axis.set_title(f"{self.describe()}, head {head}" if self.num_heads > 1 else self.describe())
        axis.set_xlabel(f"key {unit}")
        axis.set_ylabel(f"query {unit}")
        image.set_clim(0.0, None)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def describe(self) -> str:
        """One line: the kind of pattern, its size, and the share of all pairs of blocks that it lists."""
        pairs = self.num_heads * self.num_blocks**2
        heads = "all heads alike" if self.num_heads == 1 else f"{self.num_heads} heads"
        causal = ", causal" if self.is_causal else ""
        share = 100.0 * len(self.entries) / pairs
        return f"{self._name}: {self.num_blocks} blocks of {self.block_size}, {heads}{causal}, {share:.1f} % of pairs"

    def __repr__(self) -> str:
        return f"BlockPlan({self.describe()})"

    def _head(self, head: int) -> int:
        if not -self.num_heads <= head < self.num_heads:
            raise ValueError(f"head {head} of a plan for {self.num_heads}")
        return head % self.num_heads


class BatchPlan(OnDevices):
    """A plan for each row of a batch. n is that of the longest sequence; rows have empty lists for blocks that they do
    not reach."""

    def __init__(self, lists: Lists, block_size: int, is_causal: bool) -> None:
        super().__init__()
        self._arrays, self.block_size, self.is_causal = lists, block_size, is_causal

    def _lists(self) -> Lists:
        return self._arrays

    def _schedule(self) -> Schedule:
        return schedule_lists(list(self._arrays.starts), self.block_size)


def batch_plans(
    plans: Sequence[BlockPlan], q: Tensor, first: Tensor | None = None, lengths: Tensor | None = None
) -> BatchPlan:
    """Join the plans of the rows of q [B, T, H, D]; each must fit its row's length. `first` and `lengths` are those of
    `ops.block_sparse_attention`. Raises ValueError, naming the row."""
    plans = tuple(plans)
    batch, tokens = q.shape[:2]
    if len(plans) != batch:
        raise ValueError(f"{len(plans)} plans for {batch} rows: give one plan for all rows, or one for each")
    begins = [0] * batch if first is None else first.tolist()
    counts = [tokens - begin for begin in begins] if lengths is None else lengths.tolist()
    for row, (plan, count) in enumerate(zip(plans, counts, strict=True)):
        if count and not plan.fits(count):
            raise ValueError(
                f"row {row} has {count} tokens; its plan is for {plan.num_blocks} blocks of {plan.block_size}"
            )
    return _batch(plans, tokens)


# --- one plan for a shape --------------------------------------------------------------------------------------------


@functools.lru_cache(_CACHED_PLANS)
def _evaluation(num_blocks: int, block_size: int, num_random_blocks: int) -> BlockPlan:
    if num_blocks < 4:
        raise ValueError(f"BigBird's pattern needs 4 blocks or more; {num_blocks} of {block_size} tokens are given")
    random = np.zeros((1, num_blocks - 2, num_random_blocks), dtype=np.int32)
    return BlockPlan(_C.BlockPlan.reference(random), block_size, name="evaluation")


@functools.lru_cache(_CACHED_PLANS)
def _training(
    num_blocks: int, block_size: int, num_random_blocks: int, num_heads: int, layer_idx: int, max_positions: int
) -> BlockPlan:
    random = draw_training_blocks(num_blocks, block_size, num_random_blocks, num_heads, layer_idx, max_positions)
    return BlockPlan(_C.BlockPlan.reference(random), block_size, name=f"training, layer {layer_idx}")


@functools.lru_cache(_CACHED_PLANS)
def _pattern(
    num_blocks: int,
    block_size: int,
    window: int,
    global_blocks: tuple[int, ...],
    global_tokens: tuple[int, ...],
    num_random_blocks: int,
    num_heads: int,
    seed: int,
    is_causal: bool,
) -> BlockPlan:
    native = _C.BlockPlan.pattern(
        num_blocks=num_blocks,
        num_heads=num_heads,
        window=window,
        global_blocks=global_blocks,
        token_blocks=[token // block_size for token in global_tokens],
        num_random_blocks=num_random_blocks,
        seed=seed,
        is_causal=is_causal,
    )
    return BlockPlan(native, block_size, is_causal=is_causal, global_tokens=global_tokens)


@functools.lru_cache(_CACHED_PLANS)
def _batch(plans: tuple[BlockPlan, ...], num_tokens: int) -> BatchPlan:
    if not plans:
        empty = Lists(np.zeros((1, 1, 1), np.int32), np.zeros((0, 2), np.int32), None)
        return BatchPlan(empty, BLOCK_SIZES[0], False)
    size, is_causal = plans[0].block_size, plans[0].is_causal
    heads = {plan.num_heads for plan in plans}
    if any((plan.block_size, plan.is_causal) != (size, is_causal) for plan in plans) or len(heads - {1}) > 1:
        raise ValueError("the plans of a batch must have the same block size, number of heads and causality")
    num_blocks = -(-num_tokens // size)
    starts = np.zeros((len(plans), max(heads), num_blocks + 1), dtype=np.int32)
    flags = np.zeros((len(plans), num_blocks * size), dtype=np.bool_)
    offset = 0
    for row, plan in enumerate(plans):
        kept = min(plan.num_blocks, num_blocks)  # more only where a row has no tokens
        starts[row, :, : kept + 1] = plan.starts[:, : kept + 1] + offset
        starts[row, :, kept + 1 :] = starts[row, :, kept : kept + 1]
        if plan.global_tokens is not None:
            flags[row, : kept * size] = plan.global_tokens[: kept * size]
        offset += len(plan.entries)
    entries = np.concatenate([plan.entries for plan in plans])
    return BatchPlan(Lists(starts, entries, flags if flags.any() else None), size, is_causal)


# --- checks ----------------------------------------------------------------------------------------------------------


def _sizes(num_tokens: int, block_size: int) -> tuple[int, int]:
    _check_block_size(block_size)
    return -(-_whole(num_tokens, "num_tokens", 1) // int(block_size)), int(block_size)


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}; accepted: {', '.join(map(str, BLOCK_SIZES))}")


def _whole(value: int, name: str, least: int = 0, most: int | None = None) -> int:
    if not _is_number(value) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" to {most}"
        raise ValueError(f"{name} is {value!r}; accepted: whole numbers from {least}{upper}")
    return int(value)


def _numbers(values: Iterable[int], name: str) -> tuple[int, ...]:
    """Whole numbers, of Python or NumPy. ValueError for anything else, such as 1.5, which int() would round."""
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}; accepted: a list of whole numbers")
    found = tuple(values)
    for value in found:
        if not _is_number(value):
            raise ValueError(f"{name} holds {value!r}; accepted: whole numbers")
    return tuple(map(int, found))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_number(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _token(token: int, num_tokens: int) -> int:
    if not -num_tokens <= token < num_tokens:
        raise ValueError(f"global_tokens holds {token}; accepted: {-num_tokens} to {num_tokens - 1}")
    return int(token) % num_tokens


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _symbol(count: int) -> str:
    if count < 2:
        return {-1: "o", 0: ".", 1: "#"}[int(count)]
    return str(count) if count < 10 else "+"
