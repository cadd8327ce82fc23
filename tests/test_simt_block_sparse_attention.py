"""The CUDA kernel of block-sparse attention in the host executor: patterns, counts, padding, chunks, hostile data."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from alula import BlockPlan
from alula.block_plan import BatchPlan, batch_plans
from alula.block_schedule import LEAST_KEYS, schedule_lists
from alula.testing import hostile, reference
from alula.testing.compare import assert_close, assert_equal_bits
from simt_ops import integers, new_result
from simt_process import DTYPES, Executor
from test_block_sparse_attention import Case, evaluation, int32, make, poison
from torch import Tensor


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = Executor()
    yield executor
    executor.close()


def memory_of(t: Tensor) -> Tensor:
    """All that a view is a view of."""
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


def is_even(t: Tensor) -> bool:
    step = 16 // t.element_size()
    return t.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in t.stride()[:3])


class Sparse:
    """`ops.block_sparse_attention` in the executor. `change` replaces what the kernel is given; with fewer `least_keys`
    than a GPU gets, short lists are cut, too."""

    def __init__(self, executor: Executor, order: str = "forward", least_keys: int = LEAST_KEYS, **change: Any) -> None:
        self.executor, self.order, self.least_keys, self.change = executor, order, least_keys, change

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan | list[BlockPlan],
        *,
        first: Tensor | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        batch, tokens, num_heads, head_dim = q.shape
        lists: BlockPlan | BatchPlan = plan if isinstance(plan, BlockPlan) else batch_plans(plan, q, first, lengths)
        starts, entries, flags = lists.tensors
        schedule = schedule_lists(list(starts.numpy()), lists.block_size, self.least_keys)
        is_merged = k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        values: dict[str, Any] = {
            "q": q,
            "k": memory_of(k),
            "v": None if is_merged else memory_of(v),
            "k_offset": k.storage_offset() * k.element_size(),
            "v_offset": v.storage_offset() * v.element_size(),
            "is_merged": is_merged,
            "k_strides": integers(*k.stride()[:3]),
            "v_strides": integers(*v.stride()[:3]),
            "entries": entries,
            "num_entries": len(entries),
            "num_blocks": starts.shape[2] - 1,
            "plan_batches": starts.shape[0],
            "plan_heads": starts.shape[1],
            "schedule": torch.from_numpy(schedule.items),
            "num_items": len(schedule.items),
            "num_partials": schedule.num_partials,
            "global_tokens": flags,
            "global_stride": 0 if flags is None or len(flags) == 1 else flags.shape[1],
            "visible": mask,
            "first": first,
            "lengths": lengths,
            "head_mask": head_mask,
            "scale": float(head_dim**-0.5 if scale is None else scale),
            "causal": lists.is_causal,
            "batch": batch,
            "tokens": tokens,
            "num_heads": num_heads,
            "num_kv_heads": k.shape[1],
            "head_dim": head_dim,
            "block_size": lists.block_size,
            "is_query_even": q.data_ptr() % 16 == 0,
            "are_keys_even": is_even(k) and is_even(v),
            "dtype": DTYPES[q.dtype],
            "out": new_result((batch, tokens, num_heads * head_dim), q.dtype),
        }
        values.update(self.change)
        return self.executor.call("block_sparse_attention", results=("out",), order=self.order, **values)["out"]


@pytest.fixture
def op(executor: Executor) -> Sparse:
    return Sparse(executor)


def check(op: Sparse, case: Case, **options: Any) -> Tensor:
    actual = op(*case, **options)
    expected = reference.block_sparse_attention(*case, **options)
    budget = reference.same_dtype(reference.block_sparse_attention, *case, **options)
    assert_close(actual, expected, budget_from=budget, tolerance=1e-5)
    return actual


def dense(num_blocks: int, block_size: int, **options: Any) -> BlockPlan:
    return BlockPlan.from_lists([list(range(num_blocks))] * num_blocks, block_size, **options)


# --- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_blocks, block_size, short", [(4, 128, 1), (5, 64, 63), (6, 32, 15), (7, 16, 0)])
def test_evaluation_pattern(op: Sparse, num_blocks: int, block_size: int, short: int, dtype: torch.dtype) -> None:
    case = make(
        evaluation(num_blocks, block_size), num_blocks * block_size - short, dtype, batch=1, heads=1, kv_heads=1
    )
    check(op, case)


@pytest.mark.parametrize(
    "dim, block_size",
    [(8, 16), (40, 64), (64, 32), (64, 64), (72, 16), (72, 32), (128, 64), (248, 16), (248, 32), (256, 64)],
)
def test_head_sizes(op: Sparse, dim: int, block_size: int, dtype: torch.dtype) -> None:
    plan = BlockPlan.from_lists([[0, 1, 1], [0]], block_size)
    check(op, make(plan, 2 * block_size - 9, dtype, batch=1, heads=1, kv_heads=1, dim=dim))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (4, 2)])
def test_groups(op: Sparse, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(op, make(evaluation(5, 16), 75, dtype, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 33, 65])
@pytest.mark.parametrize("block_size", [16, 64])
def test_any_length(op: Sparse, tokens: int, block_size: int, dtype: torch.dtype) -> None:
    check(op, make(BlockPlan.pattern(tokens, block_size), tokens, dtype, heads=1, kv_heads=1))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1, "global_blocks": ()},
        {"window": 5, "global_blocks": (3,)},
        {"num_random_blocks": 2, "num_heads": 3},
        {"global_tokens": (0, 50, 93)},
        {"global_tokens": (20, 21), "num_random_blocks": 1, "window": 1, "num_heads": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_size", [16, 32])
def test_own_patterns(
    op: Sparse, options: dict[str, Any], is_causal: bool, block_size: int, dtype: torch.dtype
) -> None:
    if block_size == 32 and 3 in options.get("global_blocks", ()):
        options = {**options, "global_blocks": (2,)}
    check(op, make(BlockPlan.pattern(94, block_size, is_causal=is_causal, **options), 94, dtype, batch=1))


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("is_causal", [False, True])
def test_all_blocks_listed_is_dense_attention(op: Sparse, block_size: int, is_causal: bool, dtype: torch.dtype) -> None:
    plan = dense(-(-130 // block_size), block_size, is_causal=is_causal)
    case = make(plan, 130, dtype, batch=1, heads=1, kv_heads=1)
    positions = torch.arange(130, dtype=torch.int32)[None]
    arguments = (case.q, torch.cat([case.k, case.v], dim=-1), positions, int32(130))
    budget = reference.same_dtype(reference.attention, *arguments, causal=is_causal)
    expected = reference.attention(*arguments, causal=is_causal)
    assert_close(op(*case), expected, budget_from=budget, tolerance=1e-5)


@pytest.mark.parametrize("times", [2, 9])
def test_a_block_listed_k_times_is_k_copies_of_it(op: Sparse, times: int, dtype: torch.dtype) -> None:
    lists = [[1] * times + [0, 2], [1, 0], [2] * times]
    case = make(BlockPlan.from_lists(lists, 16), 48, dtype, batch=1)
    actual = check(op, case)
    for row, blocks in enumerate(lists):
        keys = torch.cat([torch.arange(16 * block, 16 * block + 16) for block in blocks])
        rows = slice(16 * row, 16 * row + 16)
        copies = torch.cat([case.k[:, :, keys], case.v[:, :, keys]], dim=-1)
        arguments = (case.q[:, rows], copies, torch.zeros(1, 16, dtype=torch.int32), int32(len(keys)))
        budget = reference.same_dtype(reference.attention, *arguments, causal=False)
        expected = reference.attention(*arguments, causal=False)
        assert_close(actual[:, rows], expected, budget_from=budget, tolerance=1e-5)


def test_a_query_block_with_an_empty_list_gives_zeros(op: Sparse, dtype: torch.dtype) -> None:
    case = make(BlockPlan.from_lists([[0, 2], [], [1]], 16), 40, dtype)
    assert (check(op, case)[:, 16:32] == 0).all()
    nothing = case._replace(plan=BlockPlan.from_lists([[], [], []], 16))
    assert (op(*nothing) == 0).all()


# --- long lists in chunks --------------------------------------------------------------------------------------------


def lonely(num_blocks: int, block_size: int) -> BlockPlan:
    """One row of blocks sees everything, the others themselves."""
    return BlockPlan.from_lists([list(range(num_blocks))] + [[b] for b in range(1, num_blocks)], block_size)


@pytest.mark.parametrize(
    "num_blocks, block_size, dim", [(20, 16, 16), (10, 32, 72), (5, 64, 16), (4, 128, 72), (5, 64, 136)]
)
def test_long_lists_are_cut_into_chunks(
    executor: Executor, num_blocks: int, block_size: int, dim: int, dtype: torch.dtype
) -> None:
    plan = lonely(num_blocks, block_size)
    assert schedule_lists([plan.starts], block_size, 2 * block_size).num_partials == -(-num_blocks // 2)
    case = make(plan, num_blocks * block_size - 5, dtype, batch=1, heads=1, kv_heads=1, dim=dim)
    check(Sparse(executor, least_keys=2 * block_size), case)


def test_chunks_as_a_gpu_gets_them(op: Sparse) -> None:
    plan = lonely(70, 16)
    assert schedule_lists([plan.starts], 16).num_partials == 3
    check(op, make(plan, 70 * 16, torch.bfloat16, batch=1, heads=1, kv_heads=1))


def test_chunks_under_a_head_mask_and_padding(executor: Executor, dtype: torch.dtype) -> None:
    case = make(lonely(12, 16), 12 * 16, dtype, batch=2)
    mask = torch.rand(2, 12 * 16) < 0.6
    mask[1, :16] = False
    poison(case, mask)
    options = {"head_mask": torch.tensor([1.0, 0.0, -2.0]), "lengths": int32(150, 20)}
    check(Sparse(executor, least_keys=64), case, mask=mask, **options)


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("num_blocks, block_size", [(12, 16), (4, 64)])
def test_any_order_has_the_same_bits(
    executor: Executor, order: str, num_blocks: int, block_size: int, dtype: torch.dtype
) -> None:
    """Of threads and of blocks: whoever comes last merges the chunks in the order of the list."""
    case = make(lonely(num_blocks, block_size), num_blocks * block_size, dtype, batch=1, heads=1, kv_heads=1)
    forward = Sparse(executor, least_keys=2 * block_size)(*case)
    assert_equal_bits(Sparse(executor, order, least_keys=2 * block_size)(*case), forward)


# --- padding ---------------------------------------------------------------------------------------------------------

PLANS = [evaluation(7, 16), BlockPlan.pattern(107, 16, global_tokens=(3,), is_causal=True)]


@pytest.mark.parametrize("plan", PLANS, ids=["evaluation", "causal"])
def test_lengths(op: Sparse, plan: BlockPlan, dtype: torch.dtype) -> None:
    case = make(plan, 107, dtype, batch=5, heads=1, kv_heads=1)
    lengths = int32(107, 50, 1, 0, 96)
    is_there = torch.arange(107) < lengths[:, None]
    poison(case, is_there)
    assert (check(op, case, lengths=lengths)[~is_there] == 0).all()


@pytest.mark.parametrize("plan", PLANS, ids=["evaluation", "causal"])
def test_first(op: Sparse, plan: BlockPlan, dtype: torch.dtype) -> None:
    case = make(plan, 107, dtype, batch=5, heads=1, kv_heads=1)
    first, lengths = int32(0, 30, 106, 107, 16), int32(107, 77, 1, 0, 60)
    column = torch.arange(107)
    is_there = (column >= first[:, None]) & (column < (first + lengths)[:, None])
    poison(case, is_there)
    assert (check(op, case, first=first, lengths=lengths)[~is_there] == 0).all()


@pytest.mark.parametrize("plan", PLANS, ids=["evaluation", "causal"])
def test_mask(op: Sparse, plan: BlockPlan, dtype: torch.dtype) -> None:
    case = make(plan, 107, dtype, batch=4, heads=1, kv_heads=1)
    mask = torch.rand(4, 107) < 0.7
    mask[1, 32:64] = False
    mask[2] = False
    mask[3] = True
    poison(case, mask)
    lengths = int32(60, 107, 5, 33)
    is_there = mask & (torch.arange(107) < lengths[:, None])
    assert (check(op, case, mask=mask)[~mask] == 0).all()
    assert (check(op, case, mask=mask, lengths=lengths)[~is_there] == 0).all()


@pytest.mark.parametrize("options", [{"is_causal": True}, {"global_tokens": (3,), "window": 1}], ids=str)
@pytest.mark.parametrize("dim, block_size", [(64, 128), (72, 16), (72, 32), (128, 64), (136, 16), (256, 32)])
def test_marks_and_masks_with_every_head_size(
    op: Sparse, dim: int, block_size: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    tokens = 2 * block_size - 3
    case = make(BlockPlan.pattern(tokens, block_size, **options), tokens, dtype, batch=1, heads=1, kv_heads=1, dim=dim)
    mask = torch.rand(1, tokens) < 0.7
    poison(case, mask)
    assert (check(op, case, mask=mask)[~mask] == 0).all()


def test_a_mask_of_a_prefix_is_a_length(op: Sparse, dtype: torch.dtype) -> None:
    case = make(evaluation(6, 32), 180, dtype, heads=1, kv_heads=1)
    lengths = int32(100, 180)
    mask = torch.arange(180) < lengths[:, None]
    assert_equal_bits(op(*case, mask=mask), op(*case, lengths=lengths))


def test_a_left_padded_row_with_a_plan_of_its_own_is_the_row_alone(op: Sparse, dtype: torch.dtype) -> None:
    counts = (97, 65, 32)
    plans = [BlockPlan.pattern(n, 16, num_random_blocks=1, num_heads=3, global_tokens=(n // 2,)) for n in counts]
    case = make(plans[0], 97, dtype, batch=3)._replace(plan=plans)
    first = int32(*(97 - n for n in counts))
    poison(case, torch.arange(97) >= first[:, None])
    together = check(op, case, first=first)
    for row, count in enumerate(counts):
        here = slice(97 - count, 97)
        parts = (part[row : row + 1, :, here].contiguous() for part in case[1:3])
        alone = Case(case.q[row : row + 1, here].contiguous(), *parts, plans[row])
        assert_equal_bits(together[row : row + 1, here], op(*alone), name=f"row {row}")


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_head_mask(op: Sparse, dtype: torch.dtype) -> None:
    case = make(evaluation(5, 16), 75, dtype, batch=1)
    out = check(op, case, head_mask=torch.tensor([1.0, 0.0, -2.0])).view(1, 75, 3, 16)
    assert (out[:, :, 1] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-40, -0.7, 1.0])
@pytest.mark.parametrize("block_size", [16, 64])
def test_scale(op: Sparse, scale: float, block_size: int) -> None:
    check(op, make(evaluation(6, block_size), 6 * block_size - 6, torch.float32, batch=1), scale=scale)


@pytest.mark.parametrize("step", [0.02, 0.3, 3.0, -0.1])
@pytest.mark.parametrize("block_size", [16, 64])
def test_scores_that_keep_rising(op: Sparse, step: float, block_size: int, dtype: torch.dtype) -> None:
    """The maximum is raised in steps: scores below and above the slack, from tile to tile and within one."""
    num_blocks = 256 // block_size
    plan = BlockPlan.from_lists([list(range(num_blocks))] + [[0]] * (num_blocks - 1), block_size)
    case = make(plan, 256, dtype, batch=1, heads=1, kv_heads=1)
    case.q[...], case.k[...] = 1.0, 0.0
    case.k[:, :, :256, 15] = (torch.arange(256) * step).to(dtype)
    check(op, case, scale=1.0)


@pytest.mark.parametrize("size", [1e3, 1e6])
@pytest.mark.parametrize("block_size, tokens", [(16, 140), (64, 570)])
def test_very_large_scores(op: Sparse, size: float, block_size: int, tokens: int) -> None:
    """exp must not overflow. Small integers and counts of 1, so that float32 forms every score exactly."""
    case = make(evaluation(9, block_size, 0), tokens, torch.float32, batch=1)
    k, v = ((case.k[:, :, :tokens] * 4).round(), case.v[:, :, :tokens].contiguous())
    check(op, Case((case.q * 4).round(), k, v, case.plan), scale=2.0 ** round(math.log2(size / 256)))


def test_a_bad_key_reaches_only_those_that_see_it(op: Sparse, dtype: torch.dtype) -> None:
    case = make(evaluation(9, 16), 144, dtype, heads=3)
    clean = op(*case)
    case.k[0, 1, 70] = torch.nan  # in block 4
    case.q[1, 20, 2] = torch.nan
    dirty = op(*case).view(2, 144, 3, 16)
    is_bad = torch.zeros(2, 144, 3, dtype=torch.bool)
    is_bad[0, :16, 1] = is_bad[0, 48:96, 1] = is_bad[0, 128:, 1] = True
    is_bad[1, 20, 2] = True
    assert (dirty.isnan().all(dim=-1) == is_bad).all()
    assert_equal_bits(
        dirty.masked_fill(is_bad[..., None], 0.0), clean.view(2, 144, 3, 16).masked_fill(is_bad[..., None], 0)
    )


def test_keys_and_values_anywhere(op: Sparse, dtype: torch.dtype) -> None:
    """Apart or merged, heads or tokens first, misaligned, expanded over the batch: the same bits."""
    case = make(evaluation(4, 16), 60, dtype, dim=24)
    expected = op(*case)
    k, v = (part[:, :, :60].contiguous() for part in case[1:3])
    tokens_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    for keys, values in ((k, v), (tokens_first, v), (k, case.v), (hostile.misaligned(k), hostile.gaps_between_rows(v))):
        assert_equal_bits(op(case.q, keys, values, case.plan), expected)
    assert_equal_bits(op(*case._replace(q=hostile.misaligned(case.q))), expected)
    shared = op(case.q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), case.plan)
    assert_equal_bits(shared[:1], expected[:1])


# --- what nobody could check on the device ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", [-1, 5, 2**30])
def test_a_key_block_that_does_not_exist_makes_nan_of_its_rows_alone(executor: Executor, block: int) -> None:
    case = make(evaluation(5, 16), 75, torch.float32, batch=1)
    entries = case.plan.tensors[1].clone()
    start = case.plan.starts[0]
    entries[start[2], 0] = block
    out = Sparse(executor, entries=entries)(*case)
    assert out[:, 32:48].isnan().all()
    clean = Sparse(executor)(*case)
    assert_equal_bits(out[:, :32], clean[:, :32])
    assert_equal_bits(out[:, 48:], clean[:, 48:])


@pytest.mark.parametrize("column, value", [(0, 3), (0, -1), (1, 5), (1, -1), (2, -1), (2, 10**6), (3, 10**6), (4, 1)])
def test_an_item_that_does_not_exist_touches_nothing(executor: Executor, column: int, value: int) -> None:
    case = make(evaluation(5, 16), 75, torch.float32, batch=1)._replace(
        plan=BlockPlan.pattern(75, 16, num_random_blocks=1, num_heads=3)
    )
    items = torch.from_numpy(schedule_lists([case.plan.starts], 16).items)
    items[4, column] = value
    out = Sparse(executor, schedule=items)(*case)
    assert out.isnan().view(75, 3, 16).all(dim=-1).sum() in (11, 16)  # the rows that nobody wrote


def test_a_chunk_before_the_first_touches_nothing(executor: Executor) -> None:
    case = make(evaluation(5, 16), 75, torch.float32, batch=1)
    items = torch.from_numpy(schedule_lists([case.plan.starts], 16).items)
    items[0, 4], items[0, 5] = 5, 9
    out = Sparse(executor, schedule=items, num_partials=5)(*case)
    assert out.isnan().view(75, 48).all(dim=-1).sum() in (11, 16)


@pytest.mark.parametrize(
    "first, lengths", [((-5, 90), (80, 3)), ((0, 10), (1000, -1)), ((2**31 - 1, 0), (2**31 - 1, 75))]
)
def test_lengths_beyond_the_columns_are_cut_off(
    op: Sparse, first: tuple[int, int], lengths: tuple[int, int], dtype: torch.dtype
) -> None:
    case = make(evaluation(5, 16), 75, dtype)
    begin = torch.tensor(first).clamp(0, 75)
    count = torch.minimum(torch.tensor(lengths).clamp(0, 75), 75 - begin)
    expected = op(*case, first=begin.int(), lengths=count.int())
    assert_equal_bits(op(*case, first=int32(*first), lengths=int32(*lengths)), expected)
