"""attention: prefill, chunks and decode over a merged cache; multi-head, grouped and multi-query; masks and padding."""

from typing import Any, NamedTuple

import pytest
import torch
from alula import ops
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor

GROUPS = [(1, 1), (3, 1), (3, 3), (12, 1), (16, 2), (5, 5), (20, 4)]  # (H, G)


class Case(NamedTuple):
    q: Tensor  # [B, T, H, D]
    kv_cache: Tensor  # [B, G, S, 2D], NaN in slots that hold nothing
    positions: Tensor  # [B, T]
    lengths: Tensor  # [B]

    def run(self, **options: Any) -> Tensor:
        return ops.attention(*self, **options)

    def rows(self, rows: slice) -> "Case":
        return Case(*(tensor[rows] for tensor in self))


def make(shape: shapes.Attention, dtype: torch.dtype, spare: int = 5) -> Case:
    """`tokens` new tokens after `past` cached ones; `spare` more slots, unused."""
    batch, tokens, past, num_heads, num_kv_heads, head_dim = shape
    keys = past + tokens
    kv_cache = torch.randn(batch, num_kv_heads, keys + spare, 2 * head_dim).to(dtype)
    kv_cache[:, :, keys:] = torch.nan
    return Case(
        torch.randn(batch, tokens, num_heads, head_dim).to(dtype),
        kv_cache,
        torch.arange(past, keys, dtype=torch.int32).repeat(batch, 1),
        torch.full((batch,), keys, dtype=torch.int32),
    )


def ragged(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, pads: list[tuple[int, int]], columns: int = 9
) -> Case:
    """A prefill of rows of `columns`, `pads` of them padding on the left and right of each: NaN in padding."""
    case = make(shapes.Attention(len(pads), columns, 0, heads, kv_heads, head_dim), dtype)
    for b, (left, right) in enumerate(pads):
        n = columns - left - right
        case.positions[b] = -1
        case.positions[b, left : left + n] = torch.arange(n, dtype=torch.int32)
        case.lengths[b] = n
        case.kv_cache[b, :, n:] = torch.nan
        case.q[b][case.positions[b] < 0] = torch.nan
    return case


def check(case: Case, *, loosen: float = 1.0, **options: Any) -> Tensor:
    """`loosen`: how much the rounding of a score is amplified, for scores far larger than 1."""
    actual = case.run(**options)
    clean = case._replace(q=case.q.masked_fill((case.positions < 0)[..., None, None], 0.0))
    expected = reference.attention(*clean, **options)
    assert actual.dtype == case.q.dtype
    assert actual.is_contiguous()
    assert_close(
        actual,
        expected,
        budget_from=reference.same_dtype(reference.attention, *clean, **options),
        tolerance=1e-5 * loosen,
    )
    return actual


@pytest.mark.parametrize("shape", shapes.ATTENTION, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_against_the_reference(shape: shapes.Attention, causal: bool, dtype: torch.dtype, isa: str) -> None:
    check(make(shape, dtype), causal=causal)


@pytest.mark.parametrize("shape", shapes.ATTENTION_REAL, ids=str)
def test_shapes_of_real_models(shape: shapes.Attention, dtype: torch.dtype) -> None:
    check(make(shape, dtype))


@pytest.mark.parametrize("head_dim", [*shapes.HEAD_DIMS, 40, 96, 248])
@pytest.mark.parametrize("tokens, past", [(1, 20), (5, 2)])
def test_head_sizes(head_dim: int, tokens: int, past: int, dtype: torch.dtype, isa: str) -> None:
    check(make(shapes.Attention(2, tokens, past, 3, 1, head_dim), dtype))


@pytest.mark.parametrize("heads, kv_heads", GROUPS)
@pytest.mark.parametrize("tokens", [1, 11])
def test_groups(heads: int, kv_heads: int, tokens: int, dtype: torch.dtype, isa: str) -> None:
    check(make(shapes.Attention(2, tokens, 6, heads, kv_heads, 24), dtype))


@pytest.mark.parametrize("keys", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513])
def test_decode_over_any_number_of_keys(keys: int, dtype: torch.dtype, isa: str) -> None:
    check(make(shapes.Attention(1, 1, keys - 1, 4, 1, 16), dtype))


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.0, 3.0])
def test_scale(scale: float, dtype: torch.dtype, isa: str) -> None:
    check(make(shapes.Attention(1, 4, 20, 3, 1, 16), dtype), scale=scale, loosen=10)


@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_padding(heads: int, kv_heads: int, causal: bool, dtype: torch.dtype, isa: str) -> None:
    """Left, right, both, nothing but padding: padding rows are zeros, the others as if alone, NaN stays where it is."""
    case = ragged(heads, kv_heads, 16, dtype, [(0, 0), (4, 0), (0, 3), (2, 5), (9, 0), (8, 0)])
    out = check(case, causal=causal)
    assert (out[case.positions < 0] == 0).all()
    alone = Case(case.q[1:2, 4:], case.kv_cache[1:2, :, :5], case.positions[1:2, 4:], case.lengths[1:2])
    assert_close(out[1:2, 4:], alone.run(causal=causal).double())


def test_padding_in_the_middle(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(1, 6, 0, 2, 1, 8), dtype)
    case.positions[0] = torch.tensor([-1, 0, -5, 1, 2, -1])
    case.lengths[0] = 3
    case.kv_cache[:, :, 3:] = torch.nan
    assert (check(case)[0, [0, 2, 5]] == 0).all()


def test_decode_of_rows_of_different_lengths(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(5, 1, 299, 6, 2, 24), dtype)
    for b, length in enumerate((300, 1, 64, 0, 129)):
        case.lengths[b], case.positions[b] = length, length - 1
        case.kv_cache[b, :, length:] = torch.nan
    assert (check(case)[3] == 0).all()


def test_a_query_sees_no_key_after_it(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(1, 40, 0, 3, 1, 16), dtype)
    before = case.run()
    case.kv_cache[:, :, 25:40] = 7.0
    after = case.run()
    assert_equal_bits(after[:, :25], before[:, :25])
    assert not torch.equal(after[:, 25:], before[:, 25:])


def test_positions_decide_not_the_order_of_the_tokens(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(1, 12, 30, 4, 2, 16), dtype)
    order = torch.randperm(12)
    shuffled = case._replace(q=case.q[:, order], positions=case.positions[:, order])
    check(shuffled)
    assert_close(shuffled.run(), case.run()[:, order].double())


@pytest.mark.parametrize("batch, heads", [(2, 3), (1, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize("tokens, past", [(7, 0), (1, 40), (5, 66)])
@pytest.mark.parametrize("kind", ["bool", "float", "same dtype"])
def test_masks(batch: int, heads: int, tokens: int, past: int, kind: str, dtype: torch.dtype, isa: str) -> None:
    """Every broadcast form, longer than the keys: what lies beyond them (NaN) is not read. Row 0 sees nothing."""
    case = make(shapes.Attention(2, tokens, past, 3, 1, 16), dtype)
    keys = past + tokens
    visible = torch.rand(batch, heads, tokens, keys + 4) < 0.6
    visible[:, :, 0] = False
    mask = visible
    if kind != "bool":
        mask = torch.randn(visible.shape).masked_fill(~visible, -torch.inf)
        mask[..., keys:] = torch.nan
        mask = mask.to(dtype if kind == "same dtype" else torch.float32)
    assert (check(case, mask=mask)[:, 0] == 0).all()
    check(case, mask=mask, causal=False)


def test_mask_with_any_strides(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(2, 9, 13, 4, 2, 16), dtype)
    visible = torch.rand(2, 4, 9, 22) < 0.7
    additive = torch.randn(2, 4, 9, 22)
    for mask in (visible, additive):
        expected = case.run(mask=mask)
        spread = torch.zeros(2, 4, 20, 70, dtype=mask.dtype)[:, :, 1:19:2, 2:68:3].copy_(mask)
        for same in (mask.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), spread):
            assert_equal_bits(case.run(mask=same), expected)
    one_row = torch.rand(1, 1, 1, 22) < 0.5
    one_row[..., 0] = True
    assert_equal_bits(case.run(mask=one_row.expand(2, 4, 9, 22)), case.run(mask=one_row.repeat(2, 4, 9, 1)))


def test_a_mask_that_says_causal_is_causal(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(1, 20, 0, 3, 1, 16), dtype)
    tril = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    expected = case.run().double()
    assert_close(case.run(mask=tril, causal=False), expected)
    assert_close(case.run(mask=torch.zeros(tril.shape).masked_fill(~tril, -torch.inf), causal=False), expected)


def test_mask_of_a_very_negative_number(isa: str) -> None:
    """The finite minimum that many callers use in place of -inf."""
    case = make(shapes.Attention(1, 3, 40, 3, 1, 16), torch.float32)
    visible = torch.rand(1, 1, 3, 43) < 0.5
    visible[..., 0] = True
    lowest = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    assert_close(case.run(mask=lowest), case.run(mask=visible).double())


def test_head_mask(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(2, 5, 12, 4, 2, 16), dtype)
    head_mask = torch.tensor([1.0, 0.0, 0.5, -2.0])
    out = check(case, head_mask=head_mask).view(2, 5, 4, 16)
    assert (out[:, :, 1] == 0).all()
    assert_close(out[:, :, 0], case.run().view(2, 5, 4, 16)[:, :, 0].double())


@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
@pytest.mark.parametrize("tokens, past", [(1, 300), (40, 0)])
def test_very_large_scores(size: float, tokens: int, past: int, isa: str) -> None:
    """Scores up to `size`: exp must not overflow. Small integers, so that float32 forms every score exactly."""
    case = make(shapes.Attention(1, tokens, past, 3, 1, 16), torch.float32)
    q, kv_cache = (case.q * 4).round(), case.kv_cache.clone()
    kv_cache[..., :16] = (kv_cache[..., :16] * 4).round()
    scale = 2.0 ** round(torch.log2(torch.tensor(size / 256)).item())
    check(case._replace(q=q, kv_cache=kv_cache), scale=scale)


def test_scores_near_the_end_of_float32(isa: str) -> None:
    case = make(shapes.Attention(1, 2, 70, 2, 1, 8), torch.float32)
    q, kv_cache = case.q.sign(), case.kv_cache.sign()
    check(case._replace(q=q, kv_cache=kv_cache), scale=1e37)


def test_equal_scores_give_the_mean(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(1, 1, 599, 3, 1, 8), dtype)
    case.kv_cache[..., :8] = 1.0
    check(case)


def test_one_dominating_key(dtype: torch.dtype, isa: str) -> None:
    """Wherever among the tiles it lies, the largest score takes everything."""
    case = make(shapes.Attention(1, 1, 399, 2, 1, 8), dtype)
    for winner in (0, 31, 32, 64, 255, 256, 399):
        kv_cache = case.kv_cache.clone()
        kv_cache[..., :400, :8] = -8.0
        kv_cache[..., winner, :8] = 8.0
        out = case._replace(q=torch.full_like(case.q, 8.0), kv_cache=kv_cache).run().view(2, 8)
        assert_equal_bits(out, kv_cache[0, 0, winner, 8:].expand(2, 8).contiguous(), name=f"key {winner}")


def test_multi_query_is_multi_head_with_repeated_heads(dtype: torch.dtype, isa: str) -> None:
    for tokens, past in ((1, 100), (19, 3)):
        case = make(shapes.Attention(2, tokens, past, 6, 2, 16), dtype)
        repeated = case._replace(kv_cache=case.kv_cache.repeat_interleave(3, dim=1))
        expected = reference.attention(*case)
        budget = reference.same_dtype(reference.attention, *case)
        assert_close(repeated.run(), expected, budget_from=budget)
        assert_close(case.run(), expected, budget_from=budget)


@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (4, 4), (4, 2)])
def test_decode_steps_equal_one_prefill(heads: int, kv_heads: int, dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(2, 70, 0, heads, kv_heads, 16), dtype)
    """Each step against the float64 result of the whole prefill, within the budget of the whole prefill."""
    check(case)
    expected = reference.attention(*case)
    budget = reference.same_dtype(reference.attention, *case)
    for t in (*range(5), 31, 32, 33, 63, 64, 69):
        kv_cache = case.kv_cache.clone()
        kv_cache[:, :, t + 1 :] = torch.nan
        step = Case(case.q[:, t : t + 1], kv_cache, case.positions[:, t : t + 1], torch.full((2,), t + 1).int())
        now = slice(t, t + 1)
        assert_close(step.run(), expected[:, now], budget_from=budget[:, now], name=f"step {t}")


@pytest.mark.parametrize("tokens, past", [(1, 299), (1, 20), (23, 50), (70, 0)])
def test_a_row_has_the_same_bits_in_any_batch(tokens: int, past: int, dtype: torch.dtype, isa: str) -> None:
    """Alone, with other rows, with longer rows, and in a larger cache."""
    case = make(shapes.Attention(4, tokens, past, 6, 2, 24), dtype)
    for b in (1, 2):  # shorter than the rest
        case.lengths[b] -= past // 2
        case.positions[b] -= past // 2
    whole = case.run()
    for b in range(4):
        alone = case.rows(slice(b, b + 1))
        assert_equal_bits(alone.run(), whole[b : b + 1], name=f"row {b} alone")
        tight = alone._replace(kv_cache=alone.kv_cache[:, :, : int(alone.lengths[0])].clone())
        assert_equal_bits(tight.run(), whole[b : b + 1], name=f"row {b} in a full cache")
    roomy = torch.full((4, 2, 4 * (past + tokens), 48), torch.nan, dtype=dtype)
    roomy[:, :, : case.kv_cache.shape[2]] = case.kv_cache
    assert_equal_bits(case._replace(kv_cache=roomy).run(), whole, name="in a larger cache")


@pytest.mark.parametrize(
    "shape",
    [
        shapes.Attention(1, 1, 1499, 12, 1, 64),
        shapes.Attention(1, 1, 700, 3, 3, 64),
        shapes.Attention(1, 1, 128, 16, 1, 128),
        shapes.Attention(1, 3, 140, 11, 1, 128),
        shapes.Attention(8, 1, 200, 12, 1, 64),
        shapes.Attention(1, 200, 30, 4, 1, 64),
        shapes.Attention(3, 50, 0, 5, 5, 40),
    ],
    ids=str,
)
def test_threads_and_repetition_do_not_change_bits(
    shape: shapes.Attention, dtype: torch.dtype, isa: str, threads: None
) -> None:
    case = make(shape, dtype)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(case.run())
    for result in results[1:]:
        assert_equal_bits(result, results[0])


@pytest.mark.parametrize("tokens, past", [(1, 40), (14, 3)])
@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_of_the_query_does_not_matter(layout: str, tokens: int, past: int, dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(2, tokens, past, 6, 2, 24), dtype)
    expected = case.run()
    assert_equal_bits(case._replace(q=hostile.LAYOUTS[layout](case.q)).run(), expected)
    heads_first = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal_bits(case._replace(q=heads_first).run(), expected)


@pytest.mark.parametrize("tokens, past", [(1, 40), (14, 3)])
def test_a_view_of_a_larger_cache(tokens: int, past: int, dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(2, tokens, past, 4, 2, 16), dtype)
    expected = case.run()
    base = torch.full((5, 2, 90, 32), torch.nan, dtype=dtype)
    view = base[1:5:2, :, 7 : 7 + case.kv_cache.shape[2]].copy_(case.kv_cache)
    positions = torch.full((2, 2 * tokens), 99, dtype=torch.int32)[:, ::2].copy_(case.positions)
    lengths = torch.full((4,), 99, dtype=torch.int32)[::2].copy_(case.lengths)
    assert_equal_bits(Case(case.q, view, positions, lengths).run(), expected)
    misaligned = hostile.misaligned(case.kv_cache)
    assert_equal_bits(case._replace(kv_cache=misaligned).run(), expected)


@pytest.mark.parametrize("tokens, past", [(1, 90), (20, 5)])
def test_a_bad_row_does_not_reach_the_others(tokens: int, past: int, dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(3, tokens, past, 6, 2, 24), dtype)
    clean = case.run()
    case.kv_cache[1, :, 2] = torch.nan
    case.q[2, tokens - 1, 4] = torch.nan
    dirty = case.run()
    assert dirty[1].isnan().all()
    assert dirty[2].view(tokens, 6, 24)[tokens - 1, 4].isnan().all()
    dirty[1] = clean[1]
    dirty[2].view(tokens, 6, 24)[tokens - 1, 4] = clean[2].view(tokens, 6, 24)[tokens - 1, 4]
    assert_equal_bits(dirty, clean)


def test_the_cache_is_not_changed(dtype: torch.dtype, isa: str) -> None:
    case = make(shapes.Attention(2, 3, 20, 4, 2, 16), dtype)
    before = case.kv_cache.clone()
    case.run()
    assert_equal_bits(case.kv_cache, before)


@pytest.mark.parametrize("tokens, past", [(1, 300), (9, 0), (40, 3)])
def test_a_result_within_a_wider_tensor(tokens: int, past: int, dtype: torch.dtype, isa: str) -> None:
    """The same bits as in a tensor of its own; zeros for padding, and nothing written beside it."""
    case = make(shapes.Attention(2, tokens, past, 4, 2, 24), dtype)
    case.positions[1, tokens // 2] = -1
    wide = torch.full((2, tokens, 5 + 4 * 24 + 3), torch.nan, dtype=dtype)
    out = wide[..., 5:-3]
    assert case.run(out=out) is out
    assert_equal_bits(out, case.run())
    assert wide[..., :5].isnan().all()
    assert wide[..., -3:].isnan().all()


@pytest.mark.parametrize("batch, tokens, past", [(0, 3, 2), (2, 0, 4), (0, 0, 0)])
def test_no_queries(batch: int, tokens: int, past: int, dtype: torch.dtype) -> None:
    out = make(shapes.Attention(batch, tokens, past, 3, 1, 16), dtype).run()
    assert out.shape == (batch, tokens, 48)
    assert out.dtype == dtype


def test_an_empty_cache_gives_zeros(dtype: torch.dtype) -> None:
    case = make(shapes.Attention(2, 3, 5, 3, 1, 16), dtype)
    out = case._replace(lengths=torch.zeros(2, dtype=torch.int32)).run()
    assert (out == 0).all()


@pytest.mark.parametrize("tokens, past", [(1, 20), (4, 3)])
def test_opcheck(tokens: int, past: int, dtype: torch.dtype) -> None:
    case = make(shapes.Attention(2, tokens, past, 4, 2, 16), dtype, spare=0)
    mask = torch.rand(2, 1, tokens, past + tokens) < 0.8
    head_mask = torch.rand(4)
    torch.library.opcheck(torch.ops.alula.attention, (*case, None, None, 0.25, True))
    torch.library.opcheck(torch.ops.alula.attention, (*case, mask, head_mask, 0.25, False))
    out = torch.zeros(*case.q.shape[:2], 4 * 16 + 8, dtype=dtype)[..., 8:]
    torch.library.opcheck(torch.ops.alula.attention_into, (*case, None, None, 0.25, True, out))


@pytest.mark.parametrize("which", ["q", "kv_cache", "mask", "head_mask"])
def test_gradients_are_refused(which: str) -> None:
    case = make(shapes.Attention(1, 2, 3, 2, 1, 8), torch.float32)
    options = {"mask": torch.zeros(1, 1, 2, 5), "head_mask": torch.ones(2)}
    {"q": case.q, "kv_cache": case.kv_cache, **options}[which].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        case.run(**options)
    assert not case.run(**options).requires_grad
