"""The order of the work of block-sparse attention on a GPU: every entry once, long lists first and in chunks."""

import numpy as np
import pytest
import torch
from alula import BlockPlan, block_plan
from alula.block_schedule import LEAST_KEYS, MOST_CHUNKS, Schedule, schedule_lists
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def check(schedule: Schedule, starts: np.ndarray) -> None:
    """`starts`: [lists of all plans, n + 1]. Every list is there, whole or in chunks that follow each other."""
    items, partials = schedule.items, schedule.num_partials
    assert items.dtype == np.int32
    assert (items[:partials, 5] > 1).all()
    assert (items[partials:, 5] == 1).all()
    seen = set()
    number = 0
    while number < len(items):
        list_of, block, _, _, _, chunks = items[number]
        part = items[number : number + chunks]
        assert (part[:, 0] == list_of).all()
        assert (part[:, 1] == block).all()
        assert part[:, 4].tolist() == list(range(chunks))
        ends = part[:, 2] + part[:, 3]
        assert part[0, 2] == starts[list_of, block]
        assert ends[-1] == starts[list_of, block + 1]
        assert (part[1:, 2] == ends[:-1]).all()
        assert (list_of, block) not in seen
        seen.add((list_of, block))
        number += chunks
    assert len(seen) == starts.shape[0] * (starts.shape[1] - 1)


def test_of_bigbird() -> None:
    plan = BlockPlan.evaluation(4096)
    schedule = schedule_lists([plan.starts], 64)
    check(schedule, plan.starts)
    assert schedule.num_partials == 16  # 2 rows of 64 blocks, 8 blocks a chunk
    assert (schedule.items[:16, 3] == 8).all()
    assert schedule.items[:16, 1].tolist() == [0] * 8 + [63] * 8


@pytest.mark.parametrize("tokens, block_size", [(16384, 64), (4096, 16), (4096, 128), (1, 16), (65536, 16)])
def test_chunks_are_long_and_few(tokens: int, block_size: int) -> None:
    plan = BlockPlan.pattern(tokens, block_size)
    schedule = schedule_lists([plan.starts], block_size)
    check(schedule, plan.starts)
    chunks = schedule.items[: schedule.num_partials]
    assert (chunks[:, 5] <= MOST_CHUNKS).all()
    assert (2 * chunks[:, 3] * block_size >= LEAST_KEYS).all()


def test_equal_lists_are_not_cut() -> None:
    plan = BlockPlan.from_lists([list(range(50))] * 50, 64)
    assert schedule_lists([plan.starts], 64).num_partials == 0


def test_lists_of_each_head() -> None:
    plan = BlockPlan.training(2048, 16, 3, num_heads=3, layer_idx=1)
    check(schedule_lists([plan.starts], 16), plan.starts)


def test_a_plan_of_a_batch_is_cut_as_it_is_alone() -> None:
    plans = [BlockPlan.evaluation(n, 16) for n in (1600, 300, 1024)]
    q = torch.zeros(3, 1600, 1, 8)
    lengths = torch.tensor([1600, 300, 1024])
    starts = block_plan.batch_plans(plans, q, None, lengths).tensors[0].numpy()
    together = schedule_lists(list(starts), 16)
    check(together, starts[:, 0])
    for row, plan in enumerate(plans):
        alone = schedule_lists([plan.starts], 16).items
        own = together.items[together.items[:, 0] == row]
        own = own[own[:, 1] < plan.num_blocks]
        own[:, 2] -= starts[row, 0, 0]
        assert sorted(map(tuple, own[:, 1:].tolist())) == sorted(map(tuple, alone[:, 1:].tolist()))


def test_no_lists() -> None:
    schedule = schedule_lists([np.zeros((1, 1), dtype=np.int32)], 16)
    assert schedule.items.shape == (0, 6)
    assert schedule.num_partials == 0


def test_a_plan_keeps_its_tensors() -> None:
    plan, cpu = BlockPlan.evaluation(1024), torch.device("cpu")
    on_cpu = plan.on(cpu)
    assert on_cpu is plan.on(cpu)
    assert on_cpu[:3] == plan.tensors
    assert on_cpu[3:] == (None, 0)


@pytest.mark.parametrize("is_batch", [False, True])
def test_a_plan_keeps_no_fake_tensors(is_batch: bool) -> None:
    """Those of a traced call have no values; the next call is another one's."""
    plan = BlockPlan.pattern(400, 16, window=5, global_tokens=(3,))
    q = torch.zeros(1, 400, 1, 16)
    lists = block_plan.batch_plans([plan], q) if is_batch else plan
    with FakeTensorMode():
        assert all(isinstance(tensor, FakeTensor) for tensor in (*lists.tensors, *lists.on(q.device)[:3]))
    real = (*lists.tensors, *lists.on(q.device)[:3])
    assert not any(isinstance(tensor, FakeTensor) for tensor in real)
    assert real[0].shape == (1, 1, 26)
    assert all(one is other for one, other in zip(real, (*lists.tensors, *lists.on(q.device)[:3]), strict=True))
