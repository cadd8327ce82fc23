"""block_sparse_attention: patterns of every kind, padding, hostile data, against fp64 and against dense attention."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from alula import BlockPlan, ops
from alula.testing import hostile, reference
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor


class Case(NamedTuple):
    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, G, S, D], a view of a merged cache; NaN in slots that hold nothing
    v: Tensor
    plan: BlockPlan | list[BlockPlan]

    def run(self, **options: Any) -> Tensor:
        return ops.block_sparse_attention(*self, **options)


def make(
    plan: BlockPlan,
    tokens: int,
    dtype: torch.dtype,
    *,
    batch: int = 2,
    heads: int = 3,
    kv_heads: int = 3,
    dim: int = 16,
) -> Case:
    kv_cache = torch.randn(batch, kv_heads, tokens + 5, 2 * dim).to(dtype)
    kv_cache[:, :, tokens:] = torch.nan
    return Case(torch.randn(batch, tokens, heads, dim).to(dtype), *kv_cache.split(dim, dim=-1), plan)


def check(case: Case, **options: Any) -> Tensor:
    actual = case.run(**options)
    expected = reference.block_sparse_attention(*case, **options)
    assert actual.dtype == case.q.dtype
    assert actual.is_contiguous()
    assert_close(actual, expected, budget_from=reference.same_dtype(reference.block_sparse_attention, *case, **options))
    return actual


def evaluation(num_blocks: int, block_size: int, num_random: int = 3) -> BlockPlan:
    return BlockPlan.evaluation(num_blocks * block_size, block_size, num_random)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_blocks, block_size, short", [(4, 128, 1), (7, 64, 0), (7, 64, 63), (9, 32, 15), (11, 16, 7)]
)
def test_evaluation_pattern(num_blocks: int, block_size: int, short: int, dtype: torch.dtype, isa: str) -> None:
    """`short`: tokens that are missing for whole blocks."""
    check(make(evaluation(num_blocks, block_size), num_blocks * block_size - short, dtype))


@pytest.mark.parametrize("tokens", [4096, 3009])
def test_long_sequences(tokens: int, dtype: torch.dtype) -> None:
    """Rows that see everything take several chunks, the others one."""
    check(make(BlockPlan.evaluation(tokens), tokens, dtype, batch=1, heads=1, kv_heads=1, dim=64))


@pytest.mark.parametrize("dim", [8, 24, 40, 64, 72, 128, 248, 256])
def test_head_sizes(dim: int, dtype: torch.dtype, isa: str) -> None:
    check(make(evaluation(6, 32), 170, dtype, batch=1, dim=dim))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (4, 2), (7, 7)])
def test_groups(heads: int, kv_heads: int, dtype: torch.dtype, isa: str) -> None:
    check(make(evaluation(5, 16), 75, dtype, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 33, 48, 129])
def test_any_length(tokens: int, dtype: torch.dtype, isa: str) -> None:
    """From one token on; the last block may be a part of one."""
    check(make(BlockPlan.pattern(tokens, 16), tokens, dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1, "global_blocks": ()},
        {"window": 5, "global_blocks": (3,)},
        {"num_random_blocks": 2, "seed": 4},
        {"num_random_blocks": 2, "num_heads": 3},
        {"global_tokens": (0, 50, 149)},
        {"global_tokens": (20, 21), "num_random_blocks": 1, "window": 1, "num_heads": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_own_patterns(options: dict[str, Any], is_causal: bool, dtype: torch.dtype, isa: str) -> None:
    check(make(BlockPlan.pattern(150, 16, is_causal=is_causal, **options), 150, dtype))


@pytest.mark.parametrize("num_tokens, block_size", [(1024, 64), (1600, 64), (416, 32)])
def test_training_pattern(num_tokens: int, block_size: int, dtype: torch.dtype) -> None:
    plan = BlockPlan.training(num_tokens, block_size, 3, num_heads=3, layer_idx=2)
    check(make(plan, num_tokens, dtype, batch=1))


def test_a_causal_plan_shows_no_later_key(isa: str, dtype: torch.dtype) -> None:
    plan = BlockPlan.pattern(100, 16, num_random_blocks=1, global_tokens=(70,), is_causal=True)
    case = make(plan, 100, dtype)
    before = case.run()
    case.k[:, :, 60:] = 7.0
    case.v[:, :, 60:] = -3.0
    after = case.run()
    assert_equal_bits(after[:, :60], before[:, :60])
    assert not torch.equal(after[:, 60:], before[:, 60:])


# --- what counts mean ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("is_causal", [False, True])
def test_all_blocks_listed_is_dense_attention(block_size: int, is_causal: bool, dtype: torch.dtype, isa: str) -> None:
    tokens = 203
    num_blocks = -(-tokens // block_size)
    plan = BlockPlan.from_lists([list(range(num_blocks))] * num_blocks, block_size, is_causal=is_causal)
    case = make(plan, tokens, dtype)
    kv_cache = torch.cat([case.k, case.v], dim=-1)
    positions = torch.arange(tokens, dtype=torch.int32).expand(2, -1)
    dense = (case.q, kv_cache, positions, int32(tokens, tokens))
    budget = reference.same_dtype(reference.attention, *dense, causal=is_causal)
    assert_close(case.run(), reference.attention(*dense, causal=is_causal), budget_from=budget)
    assert_close(case.run(), ops.attention(*dense, causal=is_causal).double(), budget_from=budget)


@pytest.mark.parametrize("times", [2, 3, 9])
def test_a_block_listed_k_times_is_k_copies_of_it(times: int, dtype: torch.dtype, isa: str) -> None:
    case = make(BlockPlan.from_lists([[1] * times + [0, 2], [1, 0], [2] * times], 16), 48, dtype, batch=1)
    lists = [[1] * times + [0, 2], [1, 0], [2] * times]
    actual = case.run()
    for row, blocks in enumerate(lists):
        keys = torch.cat([torch.arange(16 * block, 16 * block + 16) for block in blocks])
        rows = slice(16 * row, 16 * row + 16)
        copies = torch.cat([case.k[:, :, keys], case.v[:, :, keys]], dim=-1)
        dense = (case.q[:, rows], copies, torch.zeros(1, 16, dtype=torch.int32), int32(len(keys)))
        budget = reference.same_dtype(reference.attention, *dense, causal=False)
        assert_close(actual[:, rows], reference.attention(*dense, causal=False), budget_from=budget)


def test_entries_that_repeat_a_block_count_as_one_with_the_sum(dtype: torch.dtype, isa: str) -> None:
    """Plans made by hand may list a block twice."""
    case = make(BlockPlan.from_lists([[0, 0, 0, 1], [1]], 16), 32, dtype)
    starts, entries = torch.tensor([[[0, 3, 4]]]).int(), torch.tensor([[0, 1], [1, 1], [0, 2], [1, 1]]).int()
    rest = (None, 16, None, None, None, None, 0.25, False)
    twice = torch.ops.alula.block_sparse_attention(*case[:3], starts, entries, *rest)
    expected = reference.block_sparse_attention(*case)
    assert_close(twice, expected, budget_from=reference.same_dtype(reference.block_sparse_attention, *case))


def test_a_query_block_with_an_empty_list_gives_zeros(dtype: torch.dtype, isa: str) -> None:
    case = make(BlockPlan.from_lists([[0, 2], [], [1]], 16), 40, dtype)
    out = check(case)
    assert (out[:, 16:32] == 0).all()
    nothing = case._replace(plan=BlockPlan.from_lists([[], [], []], 16))
    assert (nothing.run() == 0).all()


# --- padding ---------------------------------------------------------------------------------------------------------


def poison(case: Case, is_token: Tensor) -> None:
    """NaN in everything that stands for padding; is_token [B, T]."""
    case.q[~is_token] = torch.nan
    for part in (case.k, case.v):
        part[:, :, : is_token.shape[1]].transpose(1, 2)[~is_token] = torch.nan


@pytest.mark.parametrize("plan", [evaluation(7, 16), BlockPlan.pattern(107, 16, global_tokens=(3,), is_causal=True)])
def test_lengths(plan: BlockPlan, dtype: torch.dtype, isa: str) -> None:
    """Right padding: the blocks stay where they are. Whole blocks of padding, a row of it, none."""
    case = make(plan, 107, dtype, batch=5)
    lengths = int32(107, 50, 1, 0, 96)
    is_token = torch.arange(107) < lengths[:, None]
    poison(case, is_token)
    assert (check(case, lengths=lengths)[~is_token] == 0).all()


@pytest.mark.parametrize("plan", [evaluation(7, 16), BlockPlan.pattern(107, 16, global_tokens=(3,), is_causal=True)])
def test_first(plan: BlockPlan, dtype: torch.dtype, isa: str) -> None:
    """Left padding: the blocks begin with the row."""
    case = make(plan, 107, dtype, batch=5)
    first, lengths = int32(0, 30, 106, 107, 16), int32(107, 77, 1, 0, 60)
    column = torch.arange(107)
    is_token = (column >= first[:, None]) & (column < (first + lengths)[:, None])
    poison(case, is_token)
    assert (check(case, first=first, lengths=lengths)[~is_token] == 0).all()
    assert_equal_bits(case.run(first=first)[:4], case.run(first=first, lengths=lengths)[:4])


@pytest.mark.parametrize("plan", [evaluation(7, 16), BlockPlan.pattern(107, 16, global_tokens=(3,), is_causal=True)])
def test_mask(plan: BlockPlan, dtype: torch.dtype, isa: str) -> None:
    """Holes anywhere, whole blocks, whole rows; together with lengths."""
    case = make(plan, 107, dtype, batch=4)
    mask = torch.rand(4, 107) < 0.7
    mask[1, 32:64] = False
    mask[2] = False
    mask[3] = True
    poison(case, mask)
    assert (check(case, mask=mask)[~mask] == 0).all()
    lengths = int32(60, 107, 5, 33)
    is_token = mask & (torch.arange(107) < lengths[:, None])
    assert (check(case, mask=mask, lengths=lengths)[~is_token] == 0).all()


def test_a_mask_of_a_prefix_is_a_length(dtype: torch.dtype, isa: str) -> None:
    case = make(evaluation(6, 32), 180, dtype)
    lengths = int32(100, 180)
    mask = torch.arange(180) < lengths[:, None]
    assert_equal_bits(case.run(mask=mask), case.run(lengths=lengths))


def test_a_left_padded_row_with_a_plan_of_its_own_is_the_row_alone(dtype: torch.dtype, isa: str) -> None:
    counts = (150, 97, 64, 150)
    plans = [BlockPlan.pattern(n, 16, num_random_blocks=1, num_heads=3, global_tokens=(n // 2,)) for n in counts]
    case = make(plans[0], 150, dtype, batch=4)._replace(plan=plans)
    first = int32(*(150 - n for n in counts))
    poison(case, torch.arange(150) >= first[:, None])
    together = check(case, first=first)
    for row, count in enumerate(counts):
        here = slice(150 - count, 150)
        alone = Case(case.q[row : row + 1, here], *(t[row : row + 1, :, here] for t in case[1:3]), plans[row])
        assert_equal_bits(together[row : row + 1, here], alone.run(), name=f"row {row}")


def test_plans_of_right_padded_rows(dtype: torch.dtype) -> None:
    plans = [BlockPlan.evaluation(n, 16) for n in (120, 64, 75)]
    case = make(plans[0], 120, dtype, batch=3)._replace(plan=plans)
    check(case, lengths=int32(120, 64, 75))


# --- head mask, scale ------------------------------------------------------------------------------------------------


def test_head_mask(dtype: torch.dtype, isa: str) -> None:
    case = make(evaluation(6, 16), 90, dtype)
    out = check(case, head_mask=torch.tensor([1.0, 0.0, -2.0])).view(2, 90, 3, 16)
    assert (out[:, :, 1] == 0).all()
    assert_equal_bits(out[:, :, 0], case.run().view(2, 90, 3, 16)[:, :, 0])


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0])
def test_scale(scale: float, isa: str) -> None:
    check(make(evaluation(6, 16), 90, torch.float32), scale=scale)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_very_large_scores(size: float, isa: str) -> None:
    """exp must not overflow. Small integers and counts of 1, so that float32 forms every score exactly."""
    case = make(evaluation(9, 16, 0), 140, torch.float32)
    whole = Case((case.q * 4).round(), (case.k[:, :, :140] * 4).round(), case.v[:, :, :140], case.plan)
    check(whole, scale=2.0 ** round(math.log2(size / 256)))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_of_the_query_does_not_matter(layout: str, dtype: torch.dtype, isa: str) -> None:
    case = make(evaluation(5, 16), 75, dtype, dim=24)
    assert_equal_bits(case._replace(q=hostile.LAYOUTS[layout](case.q)).run(), case.run())


def test_keys_and_values_anywhere(dtype: torch.dtype, isa: str) -> None:
    """Apart or merged, heads or tokens first, misaligned, expanded over the batch: the same bits."""
    case = make(evaluation(5, 16), 75, dtype, dim=24)
    expected = case.run()
    k, v = (part[:, :, :75].contiguous() for part in case[1:3])
    tokens_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    for keys, values in ((k, v), (tokens_first, v), (k, case.v), (hostile.misaligned(k), hostile.gaps_between_rows(v))):
        assert_equal_bits(Case(case.q, keys, values, case.plan).run(), expected)
    shared = Case(case.q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), case.plan)
    assert_equal_bits(shared.run()[:1], expected[:1])


def test_the_arguments_are_not_changed(dtype: torch.dtype) -> None:
    case = make(evaluation(5, 16), 75, dtype)
    before = [part.clone() for part in case[:3]]
    case.run()
    for part, old in zip(case[:3], before, strict=True):
        assert_equal_bits(part, old)


@pytest.mark.parametrize(
    "plan, heads",
    [
        (BlockPlan.evaluation(1000, 16), 1),  # long rows are cut into chunks
        (BlockPlan.evaluation(1000, 64), 3),
        (BlockPlan.pattern(1000, 64, num_random_blocks=8, num_heads=3), 3),
    ],
    ids=["one head", "evaluation", "random"],
)
def test_threads_and_repetition_do_not_change_bits(
    plan: BlockPlan, heads: int, dtype: torch.dtype, isa: str, threads: None
) -> None:
    case = make(plan, 1000, dtype, batch=1, heads=heads, kv_heads=heads, dim=64)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(case.run())
    for result in results[1:]:
        assert_equal_bits(result, results[0])


def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, isa: str) -> None:
    case = make(evaluation(6, 32), 180, dtype, batch=3)
    whole = case.run(lengths=int32(180, 90, 33))
    for row, length in enumerate((180, 90, 33)):
        alone = Case(*(part[row : row + 1] for part in case[:3]), case.plan)
        assert_equal_bits(alone.run(lengths=int32(length)), whole[row : row + 1], name=f"row {row}")


def test_a_bad_key_reaches_only_those_that_see_it(dtype: torch.dtype, isa: str) -> None:
    case = make(evaluation(9, 16), 144, dtype)
    clean = case.run()
    case.k[0, 1, 70] = torch.nan  # in block 4
    case.q[1, 20, 2] = torch.nan
    dirty = case.run().view(2, 144, 3, 16)
    is_bad = torch.zeros(2, 144, 3, dtype=torch.bool)
    is_bad[0, :16, 1] = is_bad[0, 48:96, 1] = is_bad[0, 128:, 1] = True
    is_bad[1, 20, 2] = True
    assert (dirty.isnan().all(dim=-1) == is_bad).all()
    assert_equal_bits(
        dirty.masked_fill(is_bad[..., None], 0.0), clean.view(2, 144, 3, 16).masked_fill(is_bad[..., None], 0)
    )


@pytest.mark.parametrize("batch, tokens", [(0, 20), (2, 0), (0, 0)])
def test_no_queries(batch: int, tokens: int, dtype: torch.dtype) -> None:
    q, k = torch.zeros(batch, tokens, 3, 16, dtype=dtype), torch.zeros(batch, 3, tokens, 16, dtype=dtype)
    for plan in (BlockPlan.pattern(20, 16), [BlockPlan.pattern(20, 16)] * batch):
        out = ops.block_sparse_attention(q, k, k, plan)
        assert out.shape == (batch, tokens, 48)
        assert out.dtype == dtype


# --- against transformers' own code ----------------------------------------------------------------------------------


def transformers_layer(block_size: int, num_random: int, layer_idx: int, training: bool) -> Any:
    modeling = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    from transformers import BigBirdConfig

    config = BigBirdConfig(
        hidden_size=48, num_attention_heads=3, block_size=block_size, num_random_blocks=num_random, use_bias=True
    )
    layer = modeling.BigBirdBlockSparseAttention(config, seed=layer_idx)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.train(training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens, block_size, num_random", [(1024, 64, 3), (4096, 64, 3), (1600, 64, 3), (400, 16, 4)])
def test_against_transformers(tokens: int, block_size: int, num_random: int, training: bool) -> None:
    """Context and probabilities of the reference's layer, padding included, in evaluation and in training."""
    from transformers import BigBirdModel

    layer = transformers_layer(block_size, num_random, 3, training)
    batch = 1 if tokens > 2000 else 2
    x = torch.randn(batch, tokens, 48)
    mask = torch.ones(batch, tokens)
    mask[-1, tokens - block_size - 5 :] = 0
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(mask, block_size)
    state = np.random.get_state()  # noqa: NPY002
    context, probabilities = layer(x, band, from_mask, to_mask, blocked, blocked)
    np.random.set_state(state)  # noqa: NPY002
    q, k, v = (part(x).view(batch, tokens, 3, 16) for part in (layer.query, layer.key, layer.value))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if training:
        plan = BlockPlan.training(tokens, block_size, num_random, num_heads=3, layer_idx=3)
    else:
        plan = BlockPlan.evaluation(tokens, block_size, num_random)
    lengths = mask.sum(dim=1).int()
    for padding in ({"lengths": lengths}, {"mask": mask.bool()}):
        out = ops.block_sparse_attention(q, k, v, plan, **padding)
        torch.testing.assert_close(out, context, atol=2e-5, rtol=0)
    if batch > 1:
        ours = ops.block_sparse_probabilities(q, k, plan, lengths=lengths)
        torch.testing.assert_close(ours, probabilities * mask[:, None, :, None], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"first": int32(20, 3), "lengths": int32(80, 60)}], ids=str)
def test_probabilities_times_counts_make_the_result(options: dict[str, Tensor]) -> None:
    plan = BlockPlan.pattern(107, 16, global_tokens=(9,), num_random_blocks=1, num_heads=3)
    case = make(plan, 107, torch.float32)
    mask = torch.rand(2, 107) < 0.8
    p = ops.block_sparse_probabilities(case.q, case.k, plan, mask=mask, **options)
    out = (p @ case.v[:, :, :107].nan_to_num()).transpose(1, 2).flatten(2)
    assert_close(out, case.run(mask=mask, **options).double())


# --- the op itself ---------------------------------------------------------------------------------------------------


def test_opcheck(dtype: torch.dtype) -> None:
    case = make(BlockPlan.pattern(70, 16, global_tokens=(20,)), 70, dtype)
    mask = torch.rand(2, 70) < 0.8
    for options in ((None, None, None, None), (int32(0, 3), int32(70, 60), mask, torch.rand(3))):
        arguments = (*case[:3], *case.plan.tensors, 16, *options, 0.25, False)
        torch.library.opcheck(torch.ops.alula.block_sparse_attention, arguments)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_gradients_are_refused(which: str) -> None:
    case = make(evaluation(5, 16), 80, torch.float32)
    case = case._replace(**{which: getattr(case, which).detach().clone().requires_grad_()})
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        case.run()
    assert not case.run().requires_grad


def raw(**change: Any) -> Tensor:
    """The op with good arguments, but for `change`."""
    arguments = {
        "q": torch.zeros(2, 40, 3, 16),
        "k": torch.zeros(2, 3, 40, 16),
        "v": torch.zeros(2, 3, 40, 16),
        "starts": torch.tensor([[[0, 1, 2, 3]]]).int(),
        "entries": torch.tensor([[0, 1], [1, 2], [2, 1]]).int(),
        "global_tokens": None,
        "block_size": 16,
        "first": None,
        "lengths": None,
        "mask": None,
        "head_mask": None,
        "scale": 1.0,
        "causal": False,
    }
    return torch.ops.alula.block_sparse_attention(*{**arguments, **change}.values())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"entries": torch.tensor([[0, 1], [3, 1], [2, 1]]).int()}, "key block 3; accepted: 0 to 2"),
        ({"entries": torch.tensor([[0, 1], [-1, 1], [2, 1]]).int()}, "key block -1; accepted: 0 to 2"),
        ({"entries": torch.tensor([[0, 1], [1, -4], [2, 1]]).int()}, "count -4"),
        ({"entries": torch.tensor([[0, 1], [1, 0], [2, 1]]).int()}, "count 0.*global_tokens is missing"),
        ({"entries": torch.zeros(3, 2)}, "entries has dtype Float"),
        ({"entries": torch.zeros(3, 3).int()}, r"entries has shape \[3, 3\]"),
        ({"starts": torch.tensor([[[0, 2, 1, 3]]]).int()}, "starts hold 1 at 2; they must ascend"),
        ({"starts": torch.tensor([[[0, 1, 2, 4]]]).int()}, "starts hold 4 at 3.*from 0 to 3"),
        ({"starts": torch.tensor([[[-1, 1, 2, 3]]]).int()}, "starts hold -1"),
        ({"starts": torch.tensor([[[0, 1, 2]]]).int()}, "the plan is for 2 blocks of 16; 40 tokens are 3 blocks"),
        ({"starts": torch.tensor([[[0, 1, 2, 3, 3]]]).int()}, "the plan is for 4 blocks"),
        (
            {"starts": torch.tensor([0, 1, 2, 3]).int()},
            r"starts has shape \[4\]; expected \[1 or B, 1 or H, blocks \+ 1\]",
        ),
        ({"starts": torch.zeros(1, 2, 4).int()}, "2 heads; accepted: 1 or 2 and 1 or 3"),
        ({"starts": torch.zeros(3, 1, 4).int()}, "3 batch rows"),
        ({"block_size": 24}, "block_size is 24; accepted: 16, 32, 64, 128"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 256}, "block_size is 256"),
        ({"lengths": int32(41, 3)}, "lengths holds 41; row 0 begins at 0 of 40 columns, so 0 to 40"),
        ({"lengths": int32(4, -3)}, "lengths holds -3"),
        ({"lengths": int32(4)}, r"lengths has shape \[1\]; expected \[B\] = \[2\]"),
        ({"lengths": torch.tensor([4, 4])}, "lengths has dtype Long"),
        ({"first": int32(0, 41)}, "first holds 41; accepted: 0 to 40"),
        ({"first": int32(-1, 4)}, "first holds -1"),
        ({"first": int32(10, 4), "lengths": int32(31, 4)}, "lengths holds 31; row 0 begins at 10"),
        ({"mask": torch.ones(2, 39, dtype=torch.bool)}, r"mask has shape \[2, 39\]; expected \[B, T\] = \[2, 40\]"),
        ({"mask": torch.ones(2, 40)}, "mask has dtype Float"),
        ({"head_mask": torch.ones(2)}, "head_mask has shape"),
        ({"head_mask": torch.ones(3).double()}, "head_mask has dtype Double"),
        ({"global_tokens": torch.ones(1, 40, dtype=torch.bool)}, r"global_tokens has shape \[1, 40\].*\[1, 48\]"),
        ({"q": torch.zeros(2, 40, 48)}, r"q has shape \[2, 40, 48\]; expected \[B, T, H, D\]"),
        ({"q": torch.zeros(2, 40, 3, 12)}, "head_dim is 12"),
        ({"q": torch.zeros(2, 40, 3, 16).double()}, "q has dtype Double"),
        ({"q": torch.zeros(2, 40, 4, 16)}, "num_heads 4 and num_kv_heads 3"),
        ({"k": torch.zeros(2, 3, 39, 16)}, "k has 39 slots for the keys of 40 tokens"),
        ({"k": torch.zeros(2, 3, 40, 24)}, r"k has shape \[2, 3, 40, 24\]"),
        ({"v": torch.zeros(2, 1, 40, 16)}, r"v has shape \[2, 1, 40, 16\]"),
        ({"v": torch.zeros(2, 3, 40, 16).half()}, "v has dtype Half"),
        ({"v": torch.zeros(2, 3, 16, 40).mT}, "v has stride 40 in its last dimension"),
        ({"k": torch.zeros(2, 3, 40, 16, device="meta")}, "device"),
    ],
)
def test_bad_input(change: dict[str, Any], words: str) -> None:
    raw()
    with pytest.raises(RuntimeError, match=words):
        raw(**change)


def test_plans_that_do_not_fit_the_batch() -> None:
    case = make(BlockPlan.pattern(100, 16), 100, torch.float32)
    fitting = BlockPlan.pattern(100, 16)
    for plans, lengths, words in (
        ([fitting], None, "1 plans for 2 rows"),
        ([fitting, BlockPlan.pattern(60, 16)], None, "row 1 has 100 tokens; its plan is for 4 blocks of 16"),
        ([fitting, fitting], int32(100, 50), "row 1 has 50 tokens; its plan is for 7 blocks"),
        ([fitting, BlockPlan.pattern(100, 32)], None, "same block size"),
        ([fitting, BlockPlan.pattern(100, 16, is_causal=True)], None, "causality"),
    ):
        with pytest.raises(ValueError, match=words):
            case._replace(plan=plans).run(lengths=lengths)
