"""qkv_projection: layer norm, product, split and the write into the merged cache, in one call."""

from typing import Any, NamedTuple

import pytest
import torch
from alula import ops
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor


class Case(NamedTuple):
    x: Tensor  # [B, T, E]
    weight: Tensor  # [(H + 2G) * D, E]
    kv_cache: Tensor  # [B, G, S, 2D], NaN everywhere
    positions: Tensor  # [B, T]
    heads: dict[str, int]
    options: dict[str, Any]

    def run(self, kv_cache: Tensor, packed: ops.PackedWeight | None = None, rows: slice = slice(None)) -> Tensor:
        """The op on some rows of the batch; `kv_cache` has just these rows."""
        packed = packed or ops.pack(self.weight)
        x, positions = self.x[rows], self.positions[rows]
        return ops.qkv_projection(x, packed, kv_cache=kv_cache, positions=positions, **self.heads, **self.options)


def with_rotary(case: Case, rotary_dim: int) -> Case:
    options = {
        **case.options,
        "rotary_table": ops.rotary_table(50, rotary_dim),
        "rotary_positions": torch.randint(0, 50, case.positions.shape, dtype=torch.int32),
    }
    return case._replace(options=options)


def make(
    batch: int, tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype, past: int = 0, full: bool = True
) -> Case:
    heads, kv_heads, head_dim, width = shape
    features = (heads + 2 * kv_heads) * head_dim
    options: dict[str, Any] = {}
    if full:
        options = {
            "bias": torch.randn(features).to(dtype),
            "norm_weight": torch.randn(width).to(dtype),
            "norm_bias": torch.randn(width).to(dtype),
        }
    return Case(
        torch.randn(batch, tokens, width).to(dtype),
        torch.randn(features, width).to(dtype),
        torch.full((batch, kv_heads, past + tokens + 3, 2 * head_dim), torch.nan, dtype=dtype),
        torch.arange(past, past + tokens, dtype=torch.int32).repeat(batch, 1),
        {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim},
        options,
    )


def check(case: Case, kv_cache: Tensor | None = None) -> None:
    """Query and cache against the reference; slots that are not written keep their bits (NaN in both)."""
    kv_cache = case.kv_cache if kv_cache is None else kv_cache
    before = kv_cache.clone()
    arguments = {**case.heads, **case.options, "positions": case.positions}
    expected_cache, torch_cache = before.double(), before.clone()
    expected = reference.qkv_projection(case.x, case.weight, kv_cache=expected_cache, **arguments)
    budget = reference.same_dtype(reference.qkv_projection, case.x, case.weight, kv_cache=torch_cache, **arguments)
    q = case.run(kv_cache)
    assert q.dtype == case.x.dtype
    assert q.is_contiguous()
    # The error of a product goes with the norm of its terms; ours are sums of `width` products of unit normals.
    size = max(case.x.shape[-1] ** 0.5, expected.abs().max().item() if expected.numel() else 0.0)
    assert_close(q, expected, budget_from=budget, magnitude=size, name="query")
    assert_close(kv_cache, expected_cache, budget_from=torch_cache, magnitude=size, name="cache")
    written = torch.zeros(kv_cache.shape[:1] + kv_cache.shape[2:3], dtype=torch.bool)
    for b, row in enumerate(case.positions.tolist()):
        written[b, [slot for slot in row if slot >= 0]] = True
    assert_equal_bits(kv_cache.transpose(1, 2)[~written], before.transpose(1, 2)[~written], name="unwritten slots")


@pytest.mark.parametrize("shape", shapes.QKV, ids=str)
@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 13), (3, 5)])
def test_against_the_reference(
    shape: tuple[int, int, int, int], batch: int, tokens: int, dtype: torch.dtype, isa: str
) -> None:
    check(make(batch, tokens, shape, dtype))
    check(make(batch, tokens, shape, dtype, full=False))


@pytest.mark.parametrize("head_dim", shapes.HEAD_DIMS)
def test_head_sizes(head_dim: int, dtype: torch.dtype, isa: str) -> None:
    check(make(2, 3, (3, 1, head_dim, 40), dtype, past=4))


@pytest.mark.parametrize("shape", shapes.QKV_REAL, ids=str)
def test_shapes_of_real_models(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(make(2, 1, shape, dtype, past=100))


def test_padding_writes_nothing(dtype: torch.dtype, isa: str) -> None:
    case = make(4, 5, (3, 1, 16, 24), dtype)
    padded = torch.tensor([[-1, -1, 0, 1, 2], [0, 1, -1, -1, -1], [-1, 0, -1, 1, -1], [-1] * 5], dtype=torch.int32)
    case = case._replace(positions=padded)
    case.x[padded < 0] = torch.nan  # what is in a padding token must not matter
    check(case)


def test_slots_in_any_order(dtype: torch.dtype, isa: str) -> None:
    case = make(2, 4, (2, 2, 8, 16), dtype)
    check(case._replace(positions=torch.tensor([[6, 0, 3, 1], [5, 6, -7, 2]], dtype=torch.int32)))


def test_the_rest_of_the_cache_keeps_every_bit(dtype: torch.dtype, isa: str) -> None:
    case = make(2, 3, (5, 1, 24, 40), dtype, past=7)
    check(case, hostile.any_bits(tuple(case.kv_cache.shape), dtype))


def test_a_view_of_a_larger_cache(dtype: torch.dtype, isa: str) -> None:
    """Rows and slots cut out of a larger allocation: written through the strides, and nothing beside them."""
    case = make(2, 3, (4, 2, 16, 32), dtype)
    base = hostile.any_bits((5, 2, 20, 32), dtype)
    before = base.clone()
    check(case, base[1:5:2, :, 4:10])
    inside = torch.zeros(5, 20, dtype=torch.bool)
    inside[1:5:2, 4:7] = True
    assert_equal_bits(base.transpose(1, 2)[~inside], before.transpose(1, 2)[~inside])


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_in_memory_does_not_matter(layout: str, dtype: torch.dtype, isa: str) -> None:
    case = make(2, 7, (3, 1, 24, 37), dtype)
    place = hostile.LAYOUTS[layout]
    expected_cache = case.kv_cache.clone()
    expected = case.run(expected_cache)
    positions = torch.full((2, 15), 99, dtype=torch.int32)[:, 1::2].copy_(case.positions)
    options = {name: place(tensor) for name, tensor in case.options.items()}
    placed = case._replace(x=place(case.x), positions=positions, options=options)
    kv_cache = case.kv_cache.clone()
    assert_equal_bits(placed.run(kv_cache), expected)
    assert_equal_bits(kv_cache, expected_cache)


@pytest.mark.parametrize("head_dim, rotary_dim", [(8, 2), (8, 8), (24, 6), (40, 24), (64, 32), (80, 64), (256, 64)])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_rotary(head_dim: int, rotary_dim: int, kv_heads: int, dtype: torch.dtype, isa: str) -> None:
    check(with_rotary(make(2, 5, (3, kv_heads, head_dim, 40), dtype), rotary_dim))


@pytest.mark.parametrize("features", [1, 7, 32, 45, 160])
@pytest.mark.parametrize("activation", ["none", "gelu_pytorch_tanh", "sigmoid"])
@pytest.mark.parametrize("shape", [(4, 4, 16, 40), (3, 1, 8, 24)])
def test_columns_of_the_parallel_block(
    features: int, activation: str, shape: tuple[int, int, int, int], dtype: torch.dtype, isa: str
) -> None:
    """`mlp` is a range of a wider tensor: what is beside it keeps its bits."""
    heads, kv_heads, head_dim, width = shape
    case = make(2, 5, shape, dtype)
    rows = (heads + 2 * kv_heads) * head_dim + features
    weight, bias = torch.randn(rows, width).to(dtype), torch.randn(rows).to(dtype)
    case = with_rotary(case._replace(weight=weight, options={**case.options, "bias": bias}), 8)
    arguments = {**case.heads, **case.options, "positions": case.positions, "mlp_activation": activation}
    expected_cache, torch_cache = case.kv_cache.double(), case.kv_cache.clone()
    expected_mlp, torch_mlp = torch.empty(2, 5, features, dtype=torch.float64), torch.empty(2, 5, features, dtype=dtype)
    expected = reference.qkv_projection(case.x, weight, kv_cache=expected_cache, mlp=expected_mlp, **arguments)
    budget = reference.same_dtype(
        reference.qkv_projection, case.x, weight, kv_cache=torch_cache, mlp=torch_mlp, **arguments
    )
    base = hostile.any_bits((2, 5, features + 9), dtype)
    before = base.clone()
    case.options.update(mlp=base[..., 4 : 4 + features], mlp_activation=activation)
    q = case.run(case.kv_cache)
    size = max(width**0.5, expected.abs().max().item())
    assert_close(q, expected, budget_from=budget, magnitude=size, name="query")
    assert_close(case.kv_cache, expected_cache, budget_from=torch_cache, magnitude=size, name="cache")
    assert_close(base[..., 4 : 4 + features], expected_mlp, budget_from=torch_mlp, magnitude=size, name="mlp")
    assert_equal_bits(base[..., :4], before[..., :4], name="left of mlp")
    assert_equal_bits(base[..., 4 + features :], before[..., 4 + features :], name="right of mlp")


def test_query_key_and_value_are_those_of_linear(dtype: torch.dtype, isa: str) -> None:
    case = make(2, 5, (3, 1, 16, 72), dtype)
    q = case.run(case.kv_cache)
    whole = ops.linear(case.x, ops.pack(case.weight), **case.options)
    assert_equal_bits(q.flatten(2), whole[..., :48].contiguous())
    assert_equal_bits(case.kv_cache[:, 0, :5], whole[..., 48:].contiguous())


def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, isa: str) -> None:
    case = make(13, 3, (5, 1, 16, 515), dtype)
    packed = ops.pack(case.weight)
    cache = case.kv_cache.clone()
    whole = case.run(cache, packed)
    for rows in (slice(0, 1), slice(6, 7), slice(12, 13), slice(2, 6)):
        part = case.kv_cache[rows].clone()
        assert_equal_bits(case.run(part, packed, rows), whole[rows])
        assert_equal_bits(part, cache[rows])


def test_a_token_has_the_same_bits_alone(dtype: torch.dtype, isa: str) -> None:
    """What a decode step stores is what a prefill of the same tokens stores."""
    case = make(1, 14, (3, 3, 8, 200), dtype)
    packed = ops.pack(case.weight)
    cache, steps = case.kv_cache.clone(), case.kv_cache.clone()
    whole = case.run(cache, packed)
    for t in range(14):
        step = case._replace(x=case.x[:, t : t + 1], positions=case.positions[:, t : t + 1])
        assert_equal_bits(step.run(steps, packed), whole[:, t : t + 1])
    assert_equal_bits(steps, cache)


@pytest.mark.parametrize("batch, tokens", [(1, 1), (8, 1), (2, 70)])
def test_threads_and_repetition_do_not_change_bits(
    batch: int, tokens: int, dtype: torch.dtype, isa: str, threads: None
) -> None:
    case = make(batch, tokens, (8, 1, 64, 300), dtype)
    packed = ops.pack(case.weight)
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        cache = case.kv_cache.clone()
        results.append((case.run(cache, packed), cache))
    for q, cache in results[1:]:
        assert_equal_bits(q, results[0][0])
        assert_equal_bits(cache, results[0][1])


def test_a_bad_token_does_not_reach_the_others(dtype: torch.dtype, isa: str) -> None:
    case = make(2, 4, (3, 1, 16, 24), dtype)
    clean_cache, cache = case.kv_cache.clone(), case.kv_cache.clone()
    clean = case.run(clean_cache)
    case.x[1, 2] = torch.nan
    dirty = case.run(cache)
    assert dirty[1, 2].isnan().all()
    assert cache[1, :, 2].isnan().all()
    dirty[1, 2], cache[1, :, 2] = clean[1, 2], clean_cache[1, :, 2]
    assert_equal_bits(dirty, clean)
    assert_equal_bits(cache, clean_cache)


@pytest.mark.parametrize("batch, tokens", [(0, 3), (2, 0), (0, 0)])
def test_no_tokens(batch: int, tokens: int, dtype: torch.dtype) -> None:
    case = make(batch, tokens, (3, 1, 16, 24), dtype)
    q = case.run(case.kv_cache)
    assert q.shape == (batch, tokens, 3, 16)
    assert case.kv_cache.isnan().all()


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool, dtype: torch.dtype) -> None:
    case = make(2, 3, (3, 1, 16, 24), dtype, full=full)
    o, kv_cache = case.options, torch.zeros_like(case.kv_cache)
    args = (case.x, ops.pack(case.weight).data, o.get("bias"), o.get("norm_weight"), o.get("norm_bias"), 1e-5)
    torch.library.opcheck(torch.ops.alula.qkv_projection, (*args, 3, 1, 16, kv_cache, case.positions))
    table, turns = ops.rotary_table(9, 8), torch.ones(2, 3, dtype=torch.int32)
    rotary = (kv_cache, case.positions, table, turns)
    torch.library.opcheck(torch.ops.alula.qkv_projection, (*args, 3, 1, 16, *rotary))


@pytest.mark.parametrize("which", ["x", "kv_cache", "bias", "norm_weight", "norm_bias"])
def test_gradients_are_refused(which: str) -> None:
    case = make(1, 2, (1, 1, 8, 8), torch.float32)
    packed = ops.pack(case.weight)
    {"x": case.x, "kv_cache": case.kv_cache, **case.options}[which].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward yet"):
        case.run(case.kv_cache, packed)
    assert case.kv_cache.isnan().all()  # refused before anything was written
