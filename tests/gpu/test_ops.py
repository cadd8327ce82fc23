"""Every op on a GPU against the references: the shapes that break things, then those of real models."""

import pytest
import torch
from alula import devices, ops
from alula.ops import RowState
from alula.testing import hostile, reference, shapes
from alula.testing.compare import assert_close, assert_equal_bits
from test_attention import Case, make, ragged
from test_choose_token import CASES as CHOICES
from test_choose_token import compare, scores_of, state_of
from test_linear import everything, magnitude, operands
from torch import Tensor


def on_gpu(value: object) -> object:
    return value.cuda() if isinstance(value, Tensor) else value


def run(op: object, *args: object, **options: object) -> Tensor:
    """The op on copies of its operands on the GPU; the result on the CPU."""
    return op(*map(on_gpu, args), **{name: on_gpu(value) for name, value in options.items()}).cpu()


# --- one kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*shapes.SOFTMAX, *shapes.SOFTMAX_REAL], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_softmax(shape: shapes.Softmax, causal: bool, dtype: torch.dtype) -> None:
    scores, mask = torch.randn(shape).to(dtype) * 3, torch.rand(shape) < 0.8
    for m in (None, mask, torch.randn(shape).masked_fill(~mask, -torch.inf)):
        actual = run(ops.scaled_masked_softmax, scores, m, scale=0.3, causal=causal)
        expected = reference.scaled_masked_softmax(scores, m, scale=0.3, causal=causal)
        assert_close(actual, expected, magnitude=expected.abs() + 1e-30, tolerance=4e-6)


@pytest.mark.parametrize("width", [*shapes.NORM_WIDTHS, *shapes.NORM_WIDTHS_REAL, 16400])
def test_layer_norm(width: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(33, width).to(dtype), torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    for residual in (None, torch.randn(33, width).to(dtype)):
        actual = run(ops.layer_norm, x, weight, bias, residual=residual)
        expected = reference.layer_norm(x, weight, bias, residual=residual)
        assert_close(actual, expected, tolerance=4e-6 if width > 2 else 1e-4)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head_dim, rotary_dim", [(8, 2), (64, 32), (80, 64), (256, 64), (7, 4)])
def test_rotary(head_dim: int, rotary_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 30, 16, head_dim).to(dtype), torch.randn(2, 30, 2, head_dim).to(dtype)
    positions, table = torch.randint(0, 50, (2, 30), dtype=torch.int32), ops.rotary_table(50, rotary_dim)
    results = ops.rotary(q.cuda(), k.cuda(), positions.cuda(), table.cuda(), interleaved=interleaved)
    expected = reference.rotary(q, k, positions, table, interleaved=interleaved)
    for actual, value in zip(results, expected, strict=True):
        assert_close(actual.cpu(), value, tolerance=1e-6)


@pytest.mark.parametrize("width", [1, 7, 768, 2048])
def test_embedding(width: int, dtype: torch.dtype) -> None:
    table, ids = torch.randn(1000, width).to(dtype), torch.randint(0, 1000, (3, 70))
    packed = ops.pack(table.cuda())
    assert_equal_bits(packed.unpack().cpu(), table)
    assert_equal_bits(ops.embedding(ids.cuda(), packed).cpu(), table[ids])
    out = ops.embedding(torch.tensor([[0, 1000]]).cuda(), packed)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="input_ids holds 1000; accepted: 0 to 999"):
        ops.embedding(ids.cuda(), packed)
    assert out[0, 1].isnan().all()


# --- products --------------------------------------------------------------------------------------------------------


def check_linear(x: Tensor, weight: Tensor, **options: object) -> None:
    actual = ops.linear(
        x.cuda(), ops.pack(weight.cuda()), **{name: on_gpu(value) for name, value in options.items()}
    ).cpu()
    expected = reference.linear(x, weight, **options)
    norm = {name: value for name, value in options.items() if name.startswith("norm")}
    product, bias = reference.same_dtype(reference.linear, x, weight, **norm), options.get("bias")
    budget = reference.ACTIVATIONS[options.get("activation", "none")](product if bias is None else product + bias)
    budget = budget if options.get("residual") is None else budget + options["residual"]
    assert_close(actual, expected, budget_from=budget, magnitude=magnitude(x, weight, expected, **options))


@pytest.mark.parametrize("shape", [*shapes.LINEAR, *shapes.LINEAR_REAL[:9]], ids=str)
def test_linear(shape: shapes.Linear, dtype: torch.dtype) -> None:
    x, weight = operands(*shape, dtype)
    check_linear(x, weight)
    if shape.rows:
        check_linear(x, weight, activation="gelu_pytorch_tanh", **everything(x, weight))


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations(activation: str, dtype: torch.dtype) -> None:
    for rows in (2, 40):
        x, weight = operands(rows, 77, 40, dtype)
        check_linear(x, weight, bias=torch.randn(77).to(dtype), activation=activation)


@pytest.mark.parametrize("shape", [*shapes.QKV, *shapes.QKV_REAL[:3]], ids=str)
@pytest.mark.parametrize("batch, tokens", [(1, 1), (8, 1), (2, 40)])
def test_qkv_projection(shape: tuple[int, int, int, int], batch: int, tokens: int, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, width = shape
    features = (heads + 2 * kv_heads) * head_dim
    x, weight = torch.randn(batch, tokens, width).to(dtype), torch.randn(features, width).to(dtype)
    cache = torch.zeros(batch, kv_heads, tokens + 9, 2 * head_dim, dtype=dtype)
    options = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "positions": torch.arange(4, 4 + tokens, dtype=torch.int32).repeat(batch, 1),
        "bias": torch.randn(features).to(dtype),
        "norm_weight": torch.randn(width).to(dtype),
        "norm_bias": torch.randn(width).to(dtype),
        "rotary_table": ops.rotary_table(50, 8),
        "rotary_positions": torch.randint(0, 50, (batch, tokens), dtype=torch.int32),
    }
    expected_cache, torch_cache, gpu_cache = cache.double(), cache.clone(), cache.cuda()
    expected = reference.qkv_projection(x, weight, kv_cache=expected_cache, **options)
    budget = reference.same_dtype(reference.qkv_projection, x, weight, kv_cache=torch_cache, **options)
    packed, given = ops.pack(weight.cuda()), {name: on_gpu(value) for name, value in options.items()}
    q = ops.qkv_projection(x.cuda(), packed, kv_cache=gpu_cache, **given)
    size = max(width**0.5, expected.abs().max().item())
    assert_close(q.cpu(), expected, budget_from=budget, magnitude=size, name="query")
    assert_close(gpu_cache.cpu(), expected_cache, budget_from=torch_cache, magnitude=size, name="cache")


# --- attention -------------------------------------------------------------------------------------------------------


def check_attention(case: Case, **options: object) -> Tensor:
    actual = run(ops.attention, *case, **options)
    clean = case._replace(q=case.q.masked_fill((case.positions < 0)[..., None, None], 0.0))
    expected = reference.attention(*clean, **options)
    assert_close(actual, expected, budget_from=reference.same_dtype(reference.attention, *clean, **options))
    return actual


@pytest.mark.parametrize("shape", [*shapes.ATTENTION, *shapes.ATTENTION_REAL], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_attention(shape: shapes.Attention, causal: bool, dtype: torch.dtype) -> None:
    check_attention(make(shape, dtype), causal=causal)


def test_attention_with_padding_and_masks(dtype: torch.dtype) -> None:
    case = ragged(4, 2, 64, dtype, [(0, 0), (4, 0), (0, 3), (2, 5), (9, 0)])
    assert (check_attention(case)[case.positions < 0] == 0).all()
    case = make(shapes.Attention(2, 7, 300, 4, 2, 64), dtype)
    visible = torch.rand(2, 4, 7, 307) < 0.6
    check_attention(case, mask=visible)
    check_attention(case, mask=torch.randn(visible.shape).masked_fill(~visible, -torch.inf))
    check_attention(case._replace(kv_cache=hostile.misaligned(case.kv_cache)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_rows_that_fill_the_gpu(head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    """Two blocks of 128 rows a multiprocessor and a bit, over few keys; one batch row has padding on the left."""
    heads, keys = 32, 105
    tokens = 4 * torch.cuda.get_device_properties("cuda").multi_processor_count + 9
    case = make(shapes.Attention(2, tokens, 0, heads, 1, head_dim), dtype)
    positions = case.positions % keys
    positions[1, :50] = -1
    cache, lengths = case.kv_cache[:, :, :keys].contiguous(), torch.full_like(case.lengths, keys)
    out = check_attention(Case(case.q, cache, positions, lengths), causal=causal)
    assert (out[1, :50] == 0).all()


def test_repetition_does_not_change_bits(dtype: torch.dtype) -> None:
    """Which block of a split comes last differs from run to run; the result must not."""
    case = [on_gpu(value) for value in make(shapes.Attention(2, 1, 3000, 16, 1, 128), dtype)]
    first = ops.attention(*case)
    for _ in range(50):
        assert_equal_bits(ops.attention(*case).cpu(), first.cpu())


# --- choosing tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, size", [*CHOICES, (1, 50257), (8, 49280), (300, 1000)])
@pytest.mark.parametrize("eos", [None, [0, 3]])
def test_choose_token(rows: int, size: int, eos: list[int] | None, dtype: torch.dtype) -> None:
    pad, ends = torch.tensor([6]), None if eos is None else torch.tensor(eos)
    for drawn in (None, torch.randint(0, size, (rows,))):
        state, scores = state_of(rows, num_running=rows - rows // 3), scores_of(rows, size, dtype)
        expected = reference.choose_token(scores, state, pad, ends, drawn=drawn)
        there = RowState(*(tensor.cuda() for tensor in state))
        ops.choose_token(scores.cuda(), there, pad.cuda(), on_gpu(ends), drawn=on_gpu(drawn))
        compare(RowState(*(tensor.cpu() for tensor in there)), expected)


def test_a_rotary_position_outside_the_table_is_named() -> None:
    q, k, table = torch.randn(1, 3, 2, 16).cuda(), torch.randn(1, 3, 1, 16).cuda(), ops.rotary_table(10, 8).cuda()
    turned, _ = ops.rotary(q, k, torch.tensor([[9, 10, 0]], dtype=torch.int32).cuda(), table)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"rotary_positions .* holds 10; accepted: 0 to 9"):
        devices.raise_id_fault(q.device)
    assert turned[0, 1, :, :8].isnan().all()


# --- streams, graphs, errors -----------------------------------------------------------------------------------------


def test_ops_run_on_the_current_stream() -> None:
    """Two streams at once, each with its own keys split over blocks."""
    case = [on_gpu(value) for value in make(shapes.Attention(1, 1, 8000, 16, 1, 128), torch.bfloat16)]
    expected = ops.attention(*case)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.attention(*case))
    torch.cuda.synchronize()
    for result in results:
        assert_equal_bits(result.cpu(), expected.cpu())


def test_a_graph_serves_every_length() -> None:
    case = Case(*(on_gpu(value) for value in make(shapes.Attention(2, 1, 1500, 16, 1, 128), torch.bfloat16)))
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        ops.attention(*case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(*case)
    for length in (1501, 700, 1, 129):
        case.lengths.fill_(length)
        case.positions.fill_(length - 1)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal_bits(out.cpu(), ops.attention(*case).cpu())


def test_tensors_on_different_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="residual is on another device"):
        ops.layer_norm(torch.zeros(2, 8).cuda(), torch.ones(8).cuda(), residual=torch.zeros(2, 8))


@pytest.mark.parametrize("op", ["scaled_masked_softmax", "layer_norm"])
def test_opcheck(op: str) -> None:
    x = torch.randn(3, 40, device="cuda")
    if op == "layer_norm":
        torch.library.opcheck(torch.ops.alula.layer_norm, (x, torch.ones(40, device="cuda"), None, 1e-5, None))
    else:
        torch.library.opcheck(torch.ops.alula.scaled_masked_softmax, (x, None, 0.5, False, None))
