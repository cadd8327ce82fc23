"""Block-sparse attention on a GPU: against the reference, and BigBird's models against transformers and the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alula import BlockPlan, ops
from alula.testing import reference
from alula.testing.compare import assert_close, assert_equal_bits
from big_bird_cases import CLASSES, TOLERANCE, alula_model, fresh, hf_model, padding_mask, random_ids, switch, worst
from test_block_sparse_attention import Case, evaluation, int32, make, poison
from torch import Tensor


def on_gpu(case: Case) -> Case:
    """Keys and values side by side, as a cache has them."""
    k, v = torch.cat(case[1:3], dim=-1).cuda().split(case.k.shape[-1], dim=-1)
    return Case(case.q.cuda(), k, v, case.plan)


def check(case: Case, **options: Tensor) -> Tensor:
    given = {name: value.cuda() for name, value in options.items()}
    actual = on_gpu(case).run(**given).cpu()
    budget = reference.same_dtype(reference.block_sparse_attention, *case, **options)
    assert_close(actual, reference.block_sparse_attention(*case, **options), budget_from=budget, tolerance=1e-5)
    return actual


# --- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1024, 3009, 4096])
@pytest.mark.parametrize("num_random", [None, 8])
def test_bigbird_base(tokens: int, num_random: int | None, dtype: torch.dtype) -> None:
    """The pattern of evaluation, and real random blocks for each head."""
    if num_random is None:
        plan = BlockPlan.evaluation(tokens)
    else:
        plan = BlockPlan.pattern(tokens, num_random_blocks=num_random, num_heads=2)
    check(make(plan, tokens, dtype, batch=1, heads=2, kv_heads=2, dim=64))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("dim", [8, 40, 64, 72, 128, 248, 256])
def test_block_and_head_sizes(block_size: int, dim: int, dtype: torch.dtype) -> None:
    check(make(evaluation(12, block_size), 12 * block_size - 7, dtype, batch=2, dim=dim))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 5, "global_blocks": (3,)},
        {"num_random_blocks": 2, "num_heads": 3},
        {"global_tokens": (20, 21), "num_random_blocks": 1, "window": 1, "num_heads": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_own_patterns(options: dict[str, Any], is_causal: bool, dtype: torch.dtype) -> None:
    case = make(BlockPlan.pattern(1500, 32, is_causal=is_causal, **options), 1500, dtype, batch=3)
    mask = torch.rand(3, 1500) < 0.8
    mask[1, :64] = False
    poison(case, mask)
    assert (check(case, mask=mask, lengths=int32(1500, 700, 3), head_mask=torch.rand(3))[~mask] == 0).all()


def test_left_padding(dtype: torch.dtype) -> None:
    case = make(evaluation(24, 64), 1536, dtype, batch=4)
    first, lengths = int32(0, 700, 1536, 64), int32(1536, 836, 0, 400)
    column = torch.arange(1536)
    is_there = (column >= first[:, None]) & (column < (first + lengths)[:, None])
    poison(case, is_there)
    assert (check(case, first=first, lengths=lengths)[~is_there] == 0).all()


def test_repetition_and_company_do_not_change_bits(dtype: torch.dtype) -> None:
    """Which chunk of a long list comes last differs from run to run."""
    case = on_gpu(make(BlockPlan.evaluation(4096), 4096, dtype, batch=3, heads=4, kv_heads=4, dim=64))
    first = case.run()
    for _ in range(30):
        assert_equal_bits(case.run().cpu(), first.cpu())
    alone = Case(*(part[1:2] for part in case[:3]), case.plan).run()
    assert_equal_bits(alone.cpu(), first[1:2].cpu())


def test_a_graph_follows_lengths() -> None:
    case = on_gpu(make(BlockPlan.evaluation(2048), 2048, torch.bfloat16, batch=2, dim=64))
    lengths = int32(2048, 1000).cuda()
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        case.run(lengths=lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(lengths=lengths)
    for values in ((2048, 1000), (5, 2048), (0, 1024)):
        lengths.copy_(int32(*values))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal_bits(out.cpu(), case.run(lengths=lengths).cpu())


def test_bad_input() -> None:
    case = on_gpu(make(evaluation(6, 16), 96, torch.float32))
    case.run()
    with pytest.raises(RuntimeError, match="mask is on another device"):
        case.run(mask=torch.ones(2, 96, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="k is on another device"):
        case._replace(k=case.k.cpu()).run()
    with pytest.raises(RuntimeError, match="head_dim is 12; accepted: multiples of 8 up to 256"):
        Case(*(part[..., :12].contiguous() for part in case[:3]), case.plan).run()
    lists = case.plan.on(case.q.device)
    arguments = (*case[:3], *lists[:3], 16, None, None, None, None, 0.25, False)
    with pytest.raises(RuntimeError, match="schedule is missing"):
        torch.ops.alula.block_sparse_attention(*arguments)
    with pytest.raises(RuntimeError, match="num_partials is 99"):
        torch.ops.alula.block_sparse_attention(*arguments, lists.schedule, 99)
    with pytest.raises(RuntimeError, match="block_size is 24; accepted: 16, 32, 64, 128"):
        torch.ops.alula.block_sparse_attention(*arguments[:6], 24, *arguments[7:], *lists[3:])
    torch.library.opcheck(torch.ops.alula.block_sparse_attention, (*arguments, *lists[3:]))


def test_probabilities_on_the_gpu() -> None:
    case = make(BlockPlan.pattern(107, 16, global_tokens=(9,), num_random_blocks=1, num_heads=3), 107, torch.float32)
    options = {"mask": torch.rand(2, 107) < 0.8, "first": int32(20, 3), "lengths": int32(80, 60)}
    expected = ops.block_sparse_probabilities(case.q, case.k, case.plan, **options)
    given = {name: value.cuda() for name, value in options.items()}
    actual = ops.block_sparse_probabilities(case.q.cuda(), case.k.cuda(), case.plan, **given)
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-5, rtol=0)


# --- models ----------------------------------------------------------------------------------------------------------


def first_output(output: Any) -> Tensor:
    """Hidden states, logits, or where the spans begin."""
    return next(value for value in output.to_tuple() if isinstance(value, Tensor))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("training", [False, True])
def test_like_transformers(seed: int, training: bool) -> None:
    theirs, ours = hf_model(seed), alula_model(hf_model(seed)).to("cuda").train(training)
    theirs.cuda().train(training)
    try:
        for tokens in (19, switch(theirs.config), switch(theirs.config) + 5, 640):
            for padding in ("none", "right", "holes"):
                ids = random_ids(ours, 2, tokens).cuda()
                mask = padding_mask(padding, 2, tokens)
                mask = None if mask is None else mask.cuda()
                expected = fresh(theirs)(ids, attention_mask=mask).last_hidden_state[:, :tokens]
                actual = ours(ids, attention_mask=mask).last_hidden_state
                assert actual.device == ids.device
                assert worst(actual.cpu(), expected.cpu()) <= 5 * TOLERANCE
    finally:
        theirs.cpu().eval()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tokens", [20, 400])
def test_every_class_as_on_the_cpu(cls: str, tokens: int) -> None:
    """Full and block-sparse, with a padded batch, probabilities and hidden states."""
    ours = alula_model(hf_model(5, cls))
    ids, mask = random_ids(ours, 2, tokens), padding_mask("right", 2, tokens)
    if cls == "BigBirdForMultipleChoice":
        ids, mask = ids[None], mask[None]
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = ours(ids, attention_mask=mask, **options)
    actual = ours.to("cuda")(ids.cuda(), attention_mask=mask.cuda(), **options)
    assert worst(first_output(actual).cpu(), first_output(expected)) <= 5 * TOLERANCE
    for name in ("hidden_states", "attentions"):
        for mine, want in zip(getattr(actual, name), getattr(expected, name), strict=True):
            assert worst(mine.cpu(), want) <= 5 * TOLERANCE


def test_a_left_padded_row_is_the_row_alone() -> None:
    ours = alula_model(hf_model(1)).to("cuda")
    ids = random_ids(ours, 2, 400).cuda()
    mask = torch.ones(2, 400, dtype=torch.int64).cuda()
    mask[1, :60] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = ours(ids, attention_mask=mask, position_ids=positions)
    alone = ours(ids[1:, 60:])
    assert worst(together.last_hidden_state[1:, 60:].cpu(), alone.last_hidden_state.cpu()) <= TOLERANCE
    assert worst(together.pooler_output[1:].cpu(), alone.pooler_output.cpu()) <= TOLERANCE


@pytest.mark.parametrize("fed", [False, True])
def test_a_decoder_generates_as_on_the_cpu(fed: bool) -> None:
    """By steps that are captured; with the states of an encoder, too."""
    ours = alula_model(hf_model(2, "BigBirdForCausalLM", is_decoder=True, add_cross_attention=fed))
    ids = random_ids(ours, 2, 9)
    given = {"encoder_hidden_states": torch.randn(2, 7, ours.config.hidden_size)} if fed else {}
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [], "pad_token_id": 3}
    expected = ours.generate(ids, **options, **given)
    there = {name: value.cuda() for name, value in given.items()}
    assert torch.equal(ours.to("cuda").generate(ids.cuda(), **options, **there).cpu(), expected)
