"""scaled_masked_softmax: scale, mask, causal limit, softmax in float32 and the cast, in one pass."""

import pytest
import torch
from alula import ops
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor


def check(scores: Tensor, mask: Tensor | None = None, *, tolerance: float = 1e-6, **options: object) -> Tensor:
    """Within `tolerance` of each element (not of the largest), and one rounding to the dtype of the result."""
    actual = ops.scaled_masked_softmax(scores, mask, **options)
    expected = reference.scaled_masked_softmax(scores, mask, **{**options, "dtype": None})
    assert actual.dtype == (options.get("dtype") or scores.dtype)
    assert actual.is_contiguous()
    assert_close(actual, expected, magnitude=expected.abs() + 1e-30, tolerance=tolerance)
    return actual


@pytest.mark.parametrize("shape", shapes.SOFTMAX, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_against_the_reference(shape: shapes.Softmax, causal: bool, dtype: torch.dtype, isa: str) -> None:
    check(torch.randn(shape).to(dtype), causal=causal, tolerance=3e-6)
    check(torch.randn(shape).to(dtype) * 3, causal=causal, scale=0.3, tolerance=3e-6)


@pytest.mark.parametrize("shape", shapes.SOFTMAX_REAL, ids=str)
def test_shapes_of_real_models(shape: shapes.Softmax, dtype: torch.dtype) -> None:
    check(torch.randn(shape).to(dtype), scale=0.125, causal=shape.tokens > 1, tolerance=3e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3), (2, 2, 2, 2, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_dimensions(shape: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    if len(shape) == 1:
        shape, causal = (1, *shape), False
    check(torch.randn(shape).to(dtype), causal=causal)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_result(out: torch.dtype, dtype: torch.dtype, isa: str) -> None:
    check(torch.randn(2, 3, 5, 37).to(dtype), dtype=out, scale=0.5)


@pytest.mark.parametrize(
    "mask_shape",
    [(2, 3, 5, 37), (1, 3, 5, 37), (2, 1, 5, 37), (2, 1, 1, 37), (1, 1, 5, 1), (3, 1, 37), (5, 37), (37,), (1,), ()],
)
@pytest.mark.parametrize("kind", ["bool", "float", "same dtype"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_broadcast(mask_shape: tuple[int, ...], kind: str, causal: bool, dtype: torch.dtype, isa: str) -> None:
    visible = torch.rand(mask_shape) < 0.7
    mask = visible
    if kind != "bool":
        mask = torch.randn(mask_shape).masked_fill(~visible, -torch.inf)
        mask = mask.to(dtype if kind == "same dtype" else torch.float32)
    scores = torch.randn(2, 3, 5, 37).to(dtype)
    result = check(scores, mask, scale=0.7, causal=causal, tolerance=3e-6)
    assert_equal_bits(ops.scaled_masked_softmax(scores, mask.expand(scores.shape), scale=0.7, causal=causal), result)
    whole = mask.expand(scores.shape).contiguous()
    assert_equal_bits(ops.scaled_masked_softmax(scores, whole, scale=0.7, causal=causal), result)


def test_mask_with_any_strides(dtype: torch.dtype, isa: str) -> None:
    scores, mask = torch.randn(2, 3, 5, 37).to(dtype), torch.rand(2, 3, 5, 37) < 0.7
    expected = ops.scaled_masked_softmax(scores, mask)
    spread = torch.zeros(2, 3, 10, 80, dtype=torch.bool)[:, :, ::2, 3:77:2].copy_(mask)
    for same in (mask.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), spread):
        assert_equal_bits(ops.scaled_masked_softmax(scores, same), expected)


def test_nothing_visible_gives_zeros(dtype: torch.dtype, isa: str) -> None:
    scores = torch.randn(2, 3, 4, 37).to(dtype)
    visible = torch.rand(2, 1, 4, 37) < 0.5
    visible[0, :, 1] = False
    visible[1, :, 3] = False
    visible[..., 2, 36] = True
    additive = torch.zeros(2, 1, 4, 37).masked_fill(~visible, -torch.inf)
    for mask in (visible, additive, additive.to(dtype)):
        out = check(scores, mask)
        assert (out[0, :, 1] == 0).all()
        assert (out[1, :, 3] == 0).all()
    assert (ops.scaled_masked_softmax(torch.full((2, 3), -torch.inf, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("tokens, keys", [(1, 40), (5, 40), (40, 40), (40, 5), (3, 1), (33, 17)])
def test_causal_limit_counts_from_the_last_key(tokens: int, keys: int, dtype: torch.dtype, isa: str) -> None:
    """Invisible scores are not looked at: they are NaN here."""
    scores = torch.randn(2, tokens, keys).to(dtype)
    visible = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    expected = ops.scaled_masked_softmax(scores, visible)
    actual = ops.scaled_masked_softmax(scores.masked_fill(~visible, torch.nan), causal=True)
    assert (actual[:, ~visible] == 0).all()
    assert_close(actual, expected.double(), tolerance=1e-6)


def test_scores_hidden_by_a_bool_mask_do_not_matter(dtype: torch.dtype, isa: str) -> None:
    scores, visible = torch.randn(3, 5, 37).to(dtype), torch.rand(3, 5, 37) < 0.6
    expected = ops.scaled_masked_softmax(scores, visible)
    for junk in (torch.nan, torch.inf, -torch.inf):
        assert_equal_bits(ops.scaled_masked_softmax(scores.masked_fill(~visible, junk), visible), expected)


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_very_large_scores(size: float, isa: str) -> None:
    scores = torch.tensor([[size, -size, 0.0], [-size, -size, -size], [size, size, size], [0.0, 1.0, -size]])
    check(scores.repeat(1, 7))
    check(scores.repeat(1, 7) / 4, scale=3.0)


def test_mask_of_a_very_negative_number(isa: str) -> None:
    scores, visible = torch.randn(4, 50), torch.rand(4, 50) < 0.5
    visible[:, 0] = True
    lowest = torch.zeros(4, 50).masked_fill(~visible, torch.finfo(torch.float32).min)
    assert_close(
        ops.scaled_masked_softmax(scores, lowest), ops.scaled_masked_softmax(scores, visible).double(), tolerance=1e-6
    )


def test_infinite_and_nan_scores(dtype: torch.dtype, isa: str) -> None:
    """NaN and +inf spoil their own row, as in PyTorch; -inf is a probability of 0."""
    scores = torch.randn(4, 37).to(dtype)
    scores[1, 3], scores[2, 3], scores[3, 3] = torch.nan, torch.inf, -torch.inf
    out = check(scores)
    assert out[1].isnan().all()
    assert out[3, 3] == 0
    assert out[[0, 3]].isfinite().all()


@pytest.mark.parametrize("keys", [37, 130, 192])
def test_a_nan_spoils_what_the_causal_limit_hides_of_its_row(keys: int, dtype: torch.dtype, isa: str) -> None:
    scores = torch.randn(5, keys, keys).to(dtype)
    scores[1, :, 0], scores[2, 0, 0], scores[3, :, keys - 1] = torch.nan, torch.inf, torch.nan
    out = check(scores, causal=True)
    assert out[1].isnan().all()
    assert out[2, 0].isnan().all()
    assert out[3, -1].isnan().all()
    assert out[3, :-1].isfinite().all()
    many = scores.repeat(-(-(17 << 20) // scores.nbytes), 1, 1)  # written past the caches
    assert_equal_bits(ops.scaled_masked_softmax(many, causal=True).isnan(), out.isnan().repeat(len(many) // 5, 1, 1))


def test_exp_is_accurate_to_float32(isa: str) -> None:
    """The second of two probabilities, e^x / (1 + e^x), relative, down to where float32 ends."""
    x = torch.cat([torch.linspace(-87, 0, 40009), -torch.logspace(-40, 0, 2001), torch.tensor([-0.0, 0.0])])
    actual = ops.scaled_masked_softmax(torch.stack([torch.zeros_like(x), x], dim=-1))
    expected = torch.sigmoid(torch.stack([-x, x], dim=-1).double())
    assert_close(actual, expected, magnitude=expected, tolerance=5e-7)


def test_probabilities_below_float32_fade_to_zero(isa: str) -> None:
    x = torch.linspace(-300, -87, 5003)
    actual = ops.scaled_masked_softmax(torch.stack([torch.zeros_like(x), x], dim=-1))
    assert_close(actual, torch.sigmoid(torch.stack([-x, x], dim=-1).double()), tolerance=0.0, floor=1.2e-38)
    assert (actual[:, 0] == 1).all()


def test_long_rows_sum_to_one(isa: str) -> None:
    out = ops.scaled_masked_softmax(torch.zeros(2, 10007))
    assert_close(out, torch.full((2, 10007), 1 / 10007, dtype=torch.float64), tolerance=1e-6)
    assert (ops.scaled_masked_softmax(torch.randn(3, 10007)).double().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_in_memory_does_not_matter(layout: str, dtype: torch.dtype, isa: str) -> None:
    scores, mask = torch.randn(2, 3, 6, 37).to(dtype), torch.randn(2, 1, 6, 37)
    expected = ops.scaled_masked_softmax(scores, mask, scale=0.5, causal=True)
    place = hostile.LAYOUTS[layout]
    assert_equal_bits(ops.scaled_masked_softmax(place(scores), place(mask), scale=0.5, causal=True), expected)
    permuted = scores.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    assert_equal_bits(ops.scaled_masked_softmax(permuted, mask, scale=0.5, causal=True), expected)


def test_expanded_scores(dtype: torch.dtype, isa: str) -> None:
    scores = torch.randn(1, 1, 37).to(dtype).expand(4, 5, 37)
    assert_equal_bits(
        ops.scaled_masked_softmax(scores, causal=True), ops.scaled_masked_softmax(scores.contiguous(), causal=True)
    )


def test_input_is_not_changed(dtype: torch.dtype, isa: str) -> None:
    scores = torch.randn(3, 4, 37).to(dtype)
    before = scores.clone()
    ops.scaled_masked_softmax(scores, scale=2.0, causal=True)
    assert_equal_bits(scores, before)


def test_rows_threads_and_repetition_do_not_change_bits(dtype: torch.dtype, isa: str, threads: None) -> None:
    scores, mask = torch.randn(40, 3, 5, 515).to(dtype), torch.randn(40, 1, 5, 515)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.scaled_masked_softmax(scores, mask))
    for result in results[1:]:
        assert_equal_bits(result, results[0])
    assert_equal_bits(ops.scaled_masked_softmax(scores[7:8], mask[7:8]), results[0][7:8])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_do(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = ops.scaled_masked_softmax(torch.zeros(shape, dtype=dtype))
    assert out.shape == shape
    assert out.dtype == dtype


def test_opcheck(dtype: torch.dtype) -> None:
    scores = torch.randn(2, 3, 4, 7).to(dtype)
    op = torch.ops.alula.scaled_masked_softmax
    torch.library.opcheck(op, (scores, None, 0.5, False, None))
    torch.library.opcheck(op, (scores, torch.rand(2, 1, 4, 7) < 0.8, 0.5, True, torch.float32))
    torch.library.opcheck(op, (scores.transpose(1, 2), torch.randn(7), 0.5, False, torch.bfloat16))


@pytest.mark.parametrize("which", ["scores", "mask"])
def test_gradients_are_refused(which: str) -> None:
    arguments = {"scores": torch.randn(3, 4), "mask": torch.randn(4)}
    arguments[which].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        ops.scaled_masked_softmax(**arguments)
    assert not ops.scaled_masked_softmax(**arguments).requires_grad
