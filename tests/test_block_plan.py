"""BlockPlan: the reference's patterns bit for bit, patterns of one's own, pictures, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from alula import BlockPlan

NUM_HEADS = 3


def counts_of(rows: list[list[list[int]]]) -> np.ndarray:
    """[heads, n, n] from lists of blocks, counting repetitions."""
    counts = np.zeros((len(rows), len(rows[0]), len(rows[0])), dtype=np.int32)
    for head, lists in enumerate(rows):
        for row, blocks in enumerate(lists):
            np.add.at(counts[head, row], blocks, 1)
    return counts


def reference_counts(random: np.ndarray) -> np.ndarray:
    """BigBird's pattern, as semantics go, with random blocks [heads, n - 2, r]."""
    heads, n = random.shape[0], random.shape[1] + 2
    rows = []
    for head in range(heads):
        lists = [list(range(n))]
        for i in range(1, n - 1):
            if i == 1:
                fixed = [0, 1, 2, n - 1]
            elif i == n - 2:
                fixed = [0, n - 3, n - 2, n - 1]
            else:
                fixed = [0, i - 1, i, i + 1, n - 1]
            lists.append(fixed + random[head, i - 1].tolist())
        rows.append([*lists, list(range(n))])
    return counts_of(rows)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("num_random", [0, 1, 3, 8])
@pytest.mark.parametrize("num_blocks", [4, 5, 6, 12, 64])
def test_evaluation_pattern(num_blocks: int, num_random: int, block_size: int) -> None:
    """Every random block is block 0; five unique blocks in a row between."""
    plan = BlockPlan.evaluation(num_blocks * block_size, block_size, num_random)
    expected = reference_counts(np.zeros((1, num_blocks - 2, num_random), dtype=np.int32))
    np.testing.assert_array_equal(plan.block_counts(), expected)
    assert plan.num_heads == 1
    if num_blocks > 6:
        assert (np.diff(plan.starts[0])[2:-2] == 5).all()


def transformers_counts(num_tokens: int, block_size: int, num_random: int, layer_idx: int, limit: int) -> np.ndarray:
    """What transformers' own functions draw, with the steps of its attention in training."""
    modeling = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    from transformers import BigBirdConfig

    config = BigBirdConfig(
        hidden_size=8 * NUM_HEADS,
        num_attention_heads=NUM_HEADS,
        block_size=block_size,
        num_random_blocks=num_random,
        max_position_embeddings=limit,
    )
    layer = modeling.BigBirdBlockSparseAttention(config, seed=layer_idx).train()
    np.random.seed(layer_idx)  # noqa: NPY002  (what the reference does)
    if num_tokens in (1024, 3072, 4096):
        heads = [
            layer._bigbird_block_rand_mask(limit, limit, block_size, block_size, num_random, last_idx=1024)
            for _ in range(NUM_HEADS)
        ]
        heads = [head[: num_tokens // block_size - 2] for head in heads]
    else:
        lengths, numbers = layer._get_rand_attn_plan(num_tokens, block_size, num_random)
        heads = layer._bigbird_block_rand_mask_with_head(
            num_tokens, num_tokens, block_size, block_size, NUM_HEADS, lengths, numbers
        )
    return reference_counts(np.stack(heads))


@pytest.mark.parametrize("layer_idx", [0, 1, 7])
@pytest.mark.parametrize(
    "num_tokens, block_size, num_random, limit",
    [
        (1024, 64, 3, 4096),
        (3072, 64, 3, 4096),
        (4096, 64, 3, 4096),
        (1024, 64, 3, 1024),
        (4096, 64, 3, 16384),
        (1024, 16, 4, 4096),
        (3072, 32, 2, 4096),
        (4096, 128, 1, 4096),
        (4096, 16, 3, 4096),
        (768, 64, 3, 4096),
        (2048, 64, 3, 4096),
        (4032, 64, 3, 4096),
        (8192, 64, 3, 16384),
        (192, 16, 3, 4096),
        (208, 16, 3, 4096),
        (128, 16, 1, 4096),
        (640, 32, 4, 4096),
        (2176, 128, 2, 4096),
    ],
)
def test_training_pattern(num_tokens: int, block_size: int, num_random: int, limit: int, layer_idx: int) -> None:
    options = {"num_heads": NUM_HEADS, "layer_idx": layer_idx, "max_position_embeddings": limit}
    expected = transformers_counts(num_tokens, block_size, num_random, layer_idx, limit)
    plan = BlockPlan.training(num_tokens, block_size, num_random, **options)
    assert plan.num_heads == NUM_HEADS
    np.testing.assert_array_equal(plan.block_counts(), expected)


@pytest.mark.parametrize("num_tokens, num_random", [(176, 3), (160, 3), (144, 3), (112, 1), (80, 2)])
def test_training_patterns_that_the_reference_cannot_draw(num_tokens: int, num_random: int) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        transformers_counts(num_tokens, 16, num_random, 0, 4096)
    with pytest.raises(ValueError, match="too short for num_random_blocks"):
        BlockPlan.training(num_tokens, 16, num_random, num_heads=NUM_HEADS, layer_idx=0)


def test_numpys_global_generator_is_left_alone() -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    for length in (1024, 1600):
        BlockPlan.training(length, 64, 3, num_heads=2, layer_idx=41)
    np.testing.assert_array_equal(np.random.rand(3), expected)  # noqa: NPY002


def test_one_plan_for_a_shape() -> None:
    """4090 and 4096 tokens are 64 blocks; arguments that decide nothing there share the plan, others do not."""
    assert BlockPlan.evaluation(4090, 64, 3) is BlockPlan.evaluation(4096, 64, 3)
    assert BlockPlan.evaluation(4096, 64, 3) is not BlockPlan.evaluation(4096, 64, 2)
    training = {"num_heads": 2, "layer_idx": 1}
    assert BlockPlan.training(640, 64, 2, **training) is BlockPlan.training(640, 64, 2, **training)
    assert BlockPlan.pattern(640, seed=1) is BlockPlan.pattern(640, seed=1)
    plan = BlockPlan.pattern(640)
    assert plan.tensors[0] is plan.tensors[0]
    for array in (plan.starts, plan.entries):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def own(num_blocks: int, **options) -> np.ndarray:
    return BlockPlan.pattern(num_blocks * 16, 16, **options).block_counts()


@pytest.mark.parametrize("window", [1, 3, 5, 9, 31])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 10])
def test_window(num_blocks: int, window: int) -> None:
    i = np.arange(num_blocks)
    expected = np.abs(i[:, None] - i) <= window // 2
    np.testing.assert_array_equal(own(num_blocks, window=window, global_blocks=())[0], expected)


def test_without_random_blocks_it_is_the_evaluation_pattern_counted_once() -> None:
    expected = np.minimum(BlockPlan.evaluation(640, 64, 3).block_counts(), 1)
    np.testing.assert_array_equal(BlockPlan.pattern(640, 64).block_counts(), expected)


def test_global_blocks() -> None:
    counts = own(8, window=1, global_blocks=(2, -2, 2))[0]
    expected = np.eye(8, dtype=np.int32)
    expected[[2, 6]] = expected[:, [2, 6]] = 1
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_global_tokens(is_causal: bool) -> None:
    """Exactly the chosen tokens see all and are seen by all, not their blocks."""
    plan = BlockPlan.pattern(100, 16, window=1, global_blocks=(0,), global_tokens=(3, 40, -1, 40), is_causal=is_causal)
    block = np.arange(100) // 16
    flags = np.isin(np.arange(100), (3, 40, 99))
    expected = (block[:, None] == block) | (block[:, None] == 0) | (block == 0) | flags[:, None] | flags
    if is_causal:
        expected = np.tril(expected)
    np.testing.assert_array_equal(plan.to_dense(100), expected[None])


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_random_blocks_of_a_seed(num_heads: int, is_causal: bool) -> None:
    """As many as asked for on top of the rest where there are so many, others for each head and seed."""
    base = own(30, is_causal=is_causal)
    counts = own(30, is_causal=is_causal, num_random_blocks=4, num_heads=num_heads, seed=3)
    assert counts.shape == (num_heads, 30, 30)
    assert counts.max() == 1
    assert (counts >= base).all()
    possible = np.tril(np.ones((30, 30), dtype=int)) if is_causal else np.ones((30, 30), dtype=int)
    room = (possible - base).sum(axis=-1)
    np.testing.assert_array_equal((counts - base).sum(axis=-1), np.minimum(room, 4).repeat(num_heads, axis=0))
    other = own(30, is_causal=is_causal, num_random_blocks=4, num_heads=num_heads, seed=4)
    assert (counts != other).any()
    assert num_heads == 1 or (counts[0] != counts[1]).any()


def test_random_blocks_are_the_same_everywhere() -> None:
    plan = BlockPlan.pattern(16 * 12, 16, window=1, global_blocks=(), num_random_blocks=2, seed=11)
    drawn = [plan.entries[a:b, 0].tolist() for a, b in itertools.pairwise(plan.starts[0])]
    assert drawn[:6] == [[0, 7, 10], [1, 2, 3], [2, 4, 11], [3, 7, 10], [4, 7, 8], [1, 4, 5]]
    assert drawn[6:] == [[2, 5, 6], [7, 8, 9], [5, 8, 11], [0, 1, 9], [4, 8, 10], [3, 10, 11]]


@pytest.mark.parametrize("window", [1, 3, 7])
def test_causal(window: int) -> None:
    counts = own(9, window=window, is_causal=True)
    np.testing.assert_array_equal(counts, np.tril(own(9, window=window)))
    assert BlockPlan.pattern(144, 16, is_causal=True).is_causal


def test_lists() -> None:
    plan = BlockPlan.from_lists([[1, 0, 1], [], [2, 2, 2, 0]], 32)
    np.testing.assert_array_equal(plan.block_counts(), [[[1, 2, 0], [0, 0, 0], [1, 0, 3]]])
    by_head = BlockPlan.from_lists([[[0], [1]], [[1, 1], []]], 16)
    np.testing.assert_array_equal(by_head.block_counts(), [[[1, 0], [0, 1]], [[0, 2], [0, 0]]])


def test_to_dense() -> None:
    plan = BlockPlan.from_lists([[1, 0, 1], [0, 1]], 16)
    dense = plan.to_dense(20)
    assert dense.shape == (1, 20, 20)
    assert dense.dtype == np.int32
    np.testing.assert_array_equal(dense[0, :16], np.repeat([[1, 2]], [16, 4], axis=1).repeat(16, axis=0))
    assert (dense[0, 16:] == 1).all()
    np.testing.assert_array_equal(plan.to_dense()[:, :20, :20], dense)
    causal = BlockPlan.from_lists([[1, 0, 1], [0, 1]], 16, is_causal=True)
    np.testing.assert_array_equal(causal.to_dense(20), np.tril(dense))


def test_tensors() -> None:
    plan = BlockPlan.pattern(100, 16, global_tokens=(50,), num_random_blocks=1, num_heads=2)
    starts, entries, flags = plan.tensors
    assert starts.shape == (1, 2, 8)
    assert starts.dtype == entries.dtype == torch.int32
    np.testing.assert_array_equal(starts[0].numpy(), plan.starts)
    np.testing.assert_array_equal(entries.numpy(), plan.entries)
    assert flags.nonzero().tolist() == [[0, 50]]
    assert BlockPlan.pattern(100, 16).tensors[2] is None


def test_drawing() -> None:
    plan = BlockPlan.evaluation(16 * 8, 16, 3)
    assert plan.draw().splitlines() == [
        "########",
        "4##....#",
        "4###...#",
        "4.###..#",
        "4..###.#",
        "4...####",
        "4....###",
        "########",
    ]
    tokens = BlockPlan.pattern(16 * 4, 16, window=1, global_blocks=(), global_tokens=(20,))
    assert tokens.draw().splitlines() == ["#o..", "o#oo", ".o#.", ".o.#"]
    wide = BlockPlan.evaluation(16 * 200, 16).draw(max_columns=43).splitlines()
    assert len(wide) == 41
    assert {len(line) for line in wide} == {3, 43}


def test_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for name, plan in (
        ("blocks", BlockPlan.evaluation(640)),
        ("tokens", BlockPlan.pattern(64, 16, global_tokens=(3,))),
    ):
        path = tmp_path / f"{name}.png"
        plan.save_picture(str(path))
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: BlockPlan.evaluation(4096, 48), "block_size is 48; accepted: 16, 32, 64, 128"),
        (lambda: BlockPlan.evaluation(4096, 8), "block_size is 8"),
        (lambda: BlockPlan.evaluation(4096, 256), "block_size is 256"),
        (lambda: BlockPlan.evaluation(192, 64), "4 blocks or more; 3 of 64"),
        (lambda: BlockPlan.evaluation(0, 64), "num_tokens is 0"),
        (lambda: BlockPlan.evaluation(4096.0, 64), "num_tokens is 4096.0"),
        (lambda: BlockPlan.evaluation(4096, 64, -1), "num_random_blocks is -1"),
        (lambda: BlockPlan.training(640, 64, 3, num_heads=0, layer_idx=0), "num_heads is 0"),
        (lambda: BlockPlan.training(640, 64, 3, num_heads=1, layer_idx=-1), "layer_idx is -1"),
        (lambda: BlockPlan.training(320, 64, 3, num_heads=1, layer_idx=0), "too short for num_random_blocks"),
        (
            lambda: BlockPlan.training(4096, 64, 3, num_heads=1, layer_idx=0, max_position_embeddings=1024),
            "max_position_embeddings is 1024.*4096",
        ),
        (lambda: BlockPlan.pattern(640, 64, window=2), "window is 2 blocks; accepted: odd"),
        (lambda: BlockPlan.pattern(640, 64, window=0), "window is 0"),
        (lambda: BlockPlan.pattern(640, 64, global_blocks=(10,)), "global_blocks holds 10; accepted: -10 to 9"),
        (lambda: BlockPlan.pattern(640, 64, global_tokens=(640,)), "global_tokens holds 640; accepted: -640 to 639"),
        (lambda: BlockPlan.pattern(640, 64, num_random_blocks=-2), "num_random_blocks is -2"),
        (lambda: BlockPlan.from_lists([[0, 3], [0], [1]], 64), "query block 0 holds key block 3; accepted: 0 to 2"),
        (lambda: BlockPlan.from_lists([[0, -1]], 64), "holds key block -1"),
        (lambda: BlockPlan.from_lists([[[0], [1]], [[0]]], 64), "same number"),
        (lambda: BlockPlan.from_lists([], 64), "no lists"),
        (
            lambda: BlockPlan.from_lists([[0.5], [1]], 64),
            r"lists is \[\[0.5\], \[1\]\]; accepted: for each query block",
        ),
        (lambda: BlockPlan.from_lists([0, 1], 64), r"lists is \[0, 1\]; accepted: for each query block a list"),
        (lambda: BlockPlan.from_lists(None, 64), "lists is None"),
        (
            lambda: BlockPlan.from_lists([[[0, 1.5]]], 64),
            "the list of query block 0 holds 1.5; accepted: whole numbers",
        ),
        (lambda: BlockPlan.pattern(640, 64, global_tokens=(1.5,)), "global_tokens holds 1.5; accepted: whole numbers"),
        (lambda: BlockPlan.pattern(640, 64, global_tokens=5), "global_tokens is 5; accepted: a list of whole numbers"),
        (lambda: BlockPlan.pattern(640, 64, global_blocks=("a",)), "global_blocks holds 'a'; accepted: whole numbers"),
        (lambda: BlockPlan.pattern(640, 64, seed=2**64), "seed is 18446744073709551616; accepted: .* 0 to 184"),
        (lambda: BlockPlan.pattern(640, 64, num_heads=10**9), "num_heads is 1000000000; accepted: .* 1 to 65536"),
        (lambda: BlockPlan.training(640, num_heads=1, layer_idx=2**32), "layer_idx is 4294967296; accepted"),
        (lambda: BlockPlan.evaluation(640).to_dense(700), "700 tokens do not fit a plan of 10 blocks of 64"),
        (lambda: BlockPlan.evaluation(640).draw(head=1), "head 1 of a plan for 1"),
    ],
)
def test_bad_input(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
