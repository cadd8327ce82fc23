"""DecoderBlocks: the bits of its ops one by one, in a team of threads and without; copies; what it refuses."""

import copy
import gc
import threading
from typing import Any, NamedTuple

import pytest
import torch
from alula import _C, ops
from alula.testing import reference
from alula.testing.compare import assert_close, assert_equal_bits
from torch import Tensor

E, F, LAYERS, SLOTS = 96, 200, 3, 40
SHAPES = [(4, 1, 24), (3, 3, 32)]  # H, G, D
ROWS = [(1, 1), (2, 1), (1, 3), (5, 1), (13, 1), (2, 9)]  # B, T: in a team up to a tile's rows, then not


class Stack(NamedTuple):
    dims: dict[str, Any]
    plain: list[Tensor]  # weights as a checkpoint has them
    weights: list[Any]  # packed
    table: Tensor | None  # rotary: parallel blocks
    activation: str

    def bound(self) -> ops.DecoderBlocks:
        return ops.DecoderBlocks(
            self.weights, is_parallel=self.table is not None, activation=self.activation, **self.dims
        )


def make_stack(
    shape: tuple[int, int, int], dtype: torch.dtype, is_parallel: bool, activation: str = "gelu_pytorch_tanh"
) -> Stack:
    heads, kv_heads, head_dim = shape
    qkv, attended = (heads + 2 * kv_heads) * head_dim, heads * head_dim
    sizes = [(E,), (E,)]
    if is_parallel:
        sizes += [(qkv + F, E), (qkv + F,), (E, attended + F), (E,)]
    else:
        sizes += [(qkv, E), (qkv,), (E, attended), (E,), (E,), (E,), (F, E), (F,), (E, F), (E,)]
    plain = [(torch.randn(size) * (0.1 if len(size) == 2 else 1)).to(dtype) for _ in range(LAYERS) for size in sizes]
    dims = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "mlp_width": F}
    scales = [head_dim**-0.5 / (layer + 1) for layer in range(LAYERS)]
    weights = [ops.pack(w) if w.dim() == 2 else w for w in plain]
    table = ops.rotary_table(SLOTS, 16) if is_parallel else None
    return Stack({**dims, "scales": scales}, plain, weights, table, activation)


class Inputs(NamedTuple):
    x: Tensor
    kv_caches: list[Tensor]
    positions: Tensor
    lengths: Tensor


def make_inputs(stack: Stack, rows: tuple[int, int], dtype: torch.dtype, past: int = 11) -> Inputs:
    batch, tokens = rows
    caches = [
        torch.randn(batch, stack.dims["num_kv_heads"], SLOTS, 2 * stack.dims["head_dim"]).to(dtype)
        for _ in range(LAYERS)
    ]
    positions = torch.arange(past, past + tokens, dtype=torch.int32).repeat(batch, 1)
    lengths = torch.full((batch,), past + tokens, dtype=torch.int32)
    if batch > 1:  # a row with padding
        positions[-1] -= 1
        positions[-1, 0] = -1
        lengths[-1] -= 1
    return Inputs(torch.randn(batch, tokens, E).to(dtype), caches, positions, lengths)


def one_by_one(stack: Stack, inputs: Inputs, at: Any = ops, **options: Any) -> Tensor:
    """The blocks by the ops they are made of: alula's, or the reference's."""
    weights = stack.weights if at is ops else stack.plain
    (x, kv_caches, positions, lengths), dims = inputs, stack.dims
    heads = {name: dims[name] for name in ("num_heads", "num_kv_heads", "head_dim")}
    head_masks = options.pop("head_masks", [None] * LAYERS)
    per_block = len(weights) // LAYERS
    for layer, (kv, scale, head_mask) in enumerate(zip(kv_caches, dims["scales"], head_masks, strict=True)):
        n1w, n1b, qkv_w, qkv_b, out_w, out_b, *rest = weights[layer * per_block : (layer + 1) * per_block]
        extra = {}
        if stack.table is not None:
            mlp = x.new_empty(*x.shape[:2], F)
            extra = {
                "rotary_table": stack.table,
                "rotary_positions": positions.clamp(min=0),
                "mlp": mlp,
                "mlp_activation": stack.activation,
            }
        q = at.qkv_projection(
            x, qkv_w, qkv_b, norm_weight=n1w, norm_bias=n1b, kv_cache=kv, positions=positions, **heads, **extra
        )
        y = at.attention(q, kv, positions, lengths, scale=scale, head_mask=head_mask, **options)
        if stack.table is not None:
            x = at.linear(torch.cat([y, mlp], dim=-1), out_w, out_b, residual=x)
            continue
        n2w, n2b, fc_w, fc_b, proj_w, proj_b = rest
        x = at.linear(y, out_w, out_b, residual=x)
        y = at.linear(x, fc_w, fc_b, norm_weight=n2w, norm_bias=n2b, activation=stack.activation)
        x = at.linear(y, proj_w, proj_b, residual=x)
    return x


def run(stack: Stack, inputs: Inputs, **options: Any) -> Tensor:
    if stack.table is not None:
        options |= {"rotary_table": stack.table, "rotary_positions": inputs.positions.clamp(min=0)}
    return stack.bound()(*inputs, **options)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_parallel", [False, True], ids=["sequential", "parallel"])
def test_same_bits_as_its_ops(
    shape: tuple[int, int, int], rows: tuple[int, int], is_parallel: bool, dtype: torch.dtype, isa: str
) -> None:
    stack = make_stack(shape, dtype, is_parallel)
    inputs, again = (copy.deepcopy(t) for t in [make_inputs(stack, rows, dtype)] * 2)
    kept = inputs.x.clone()
    assert_equal_bits(run(stack, inputs), one_by_one(stack, again))
    assert_equal_bits(inputs.x, kept)
    for kv, other in zip(inputs.kv_caches, again.kv_caches, strict=True):
        assert_equal_bits(kv, other)


@pytest.mark.parametrize("count", [1, 4, 8, 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_parallel", [False, True], ids=["sequential", "parallel"])
def test_fewer_tokens_kept_are_the_same_bits(
    shape: tuple[int, int, int], is_parallel: bool, count: int, dtype: torch.dtype, isa: str
) -> None:
    """Of the output and of every cache, with masks of all kinds, in a team (2 x 3 tokens) and without."""
    stack = make_stack(shape, dtype, is_parallel)
    for rows in ((1, 20), (2, 20), (2, 3)):
        inputs, again = (copy.deepcopy(t) for t in [make_inputs(stack, rows, dtype)] * 2)
        options: dict[str, Any] = {}
        if rows == (2, 20):
            options = {
                "mask": torch.rand(1, 1, 20, SLOTS) > 0.3,
                "causal": False,
                "head_masks": [torch.rand(shape[0]) for _ in range(LAYERS)],
            }
        kept = run(stack, inputs, **options, tokens_to_keep=count)
        assert_equal_bits(kept, run(stack, again, **options)[:, -count:])
        for kv, other in zip(inputs.kv_caches, again.kv_caches, strict=True):
            assert_equal_bits(kv, other)


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_parallel", [False, True], ids=["sequential", "parallel"])
def test_a_batch_without_its_padding_has_the_same_bits(
    shape: tuple[int, int, int], is_parallel: bool, count: int, dtype: torch.dtype, isa: str
) -> None:
    """Rows with much padding in front run one by one; not with padding elsewhere, nor where some of it is kept."""
    stack = make_stack(shape, dtype, is_parallel)
    tokens, past = 39, [0, 1, 0, 0]
    real = torch.ones(4, tokens, dtype=torch.bool)
    for row, padding in enumerate((0, 30, 13, 33)):
        real[row, :padding] = False
    for hole in (None, (2, 20), (3, 35), (1, slice(None))):
        if hole is not None:
            real[hole] = False
        slots = real.cumsum(1).sub(1) + torch.tensor(past).unsqueeze(1)
        inputs = make_inputs(stack, (4, tokens), dtype)._replace(
            positions=slots.masked_fill(~real, -1).int(), lengths=(slots[:, -1] + 1).int()
        )
        inputs, again = (copy.deepcopy(t) for t in [inputs] * 2)
        options = {"head_masks": [torch.rand(shape[0]) for _ in range(LAYERS)]}
        kept = run(stack, inputs, **options, tokens_to_keep=count)
        assert_equal_bits(kept, run(stack, again, **options)[:, -count:])
        for kv, other in zip(inputs.kv_caches, again.kv_caches, strict=True):
            assert_equal_bits(kv, other)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("is_parallel", [False, True], ids=["sequential", "parallel"])
def test_against_the_reference(is_parallel: bool, activation: str, isa: str) -> None:
    stack = make_stack((4, 1, 24), torch.float32, is_parallel, activation)
    inputs, again = (copy.deepcopy(t) for t in [make_inputs(stack, (2, 3), torch.float32)] * 2)
    wide = again._replace(x=again.x.double(), kv_caches=[kv.double() for kv in again.kv_caches])
    plain = stack._replace(plain=[w.double() for w in stack.plain])
    assert_close(run(stack, inputs), one_by_one(plain, wide, reference), tolerance=2e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_same_bits_on_any_number_of_threads(count: int, threads: None) -> None:
    """More threads than cores, too: members wait for each other, and none is left behind."""
    stack = make_stack((4, 1, 24), torch.float32, False)
    inputs = make_inputs(stack, (1, 1), torch.float32, past=30)
    torch.set_num_threads(1)
    expected = run(stack, copy.deepcopy(inputs))
    torch.set_num_threads(count)
    for _ in range(50):
        assert_equal_bits(run(stack, copy.deepcopy(inputs)), expected)


def test_callers_on_several_threads() -> None:
    stack = make_stack((3, 3, 32), torch.float32, False)
    bound = stack.bound()
    inputs = make_inputs(stack, (1, 1), torch.float32)
    expected = bound(*copy.deepcopy(inputs))
    results: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.extend(bound(*copy.deepcopy(inputs)) for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert len(results) == 80
    for result in results:
        assert_equal_bits(result, expected)


def test_masks(dtype: torch.dtype) -> None:
    stack = make_stack((4, 1, 24), dtype, False)
    inputs, again = (copy.deepcopy(t) for t in [make_inputs(stack, (2, 3), dtype)] * 2)
    options = {
        "mask": torch.rand(2, 1, 3, SLOTS) > 0.3,
        "causal": False,
        "head_masks": [torch.rand(4) for _ in range(LAYERS)],
    }
    assert_equal_bits(run(stack, inputs, **options), one_by_one(stack, again, **options))


def test_no_rows() -> None:
    stack = make_stack((4, 1, 24), torch.float32, False)
    assert run(stack, make_inputs(stack, (0, 1), torch.float32)).shape == (0, 1, E)
    assert run(stack, make_inputs(stack, (0, 3), torch.float32), tokens_to_keep=2).shape == (0, 2, E)


@pytest.mark.parametrize("is_parallel", [False, True], ids=["sequential", "parallel"])
def test_opcheck(is_parallel: bool) -> None:
    stack = make_stack((4, 1, 24), torch.float32, is_parallel)
    bound = stack.bound()
    inputs = make_inputs(stack, (2, 2), torch.float32)
    rotary = (None, None) if stack.table is None else (stack.table, inputs.positions.clamp(min=0))
    args = (inputs.x, bound._number, *inputs[1:], None, [], True, *rotary)
    torch.library.opcheck(torch.ops.alula.decoder_blocks.default, args)
    torch.library.opcheck(torch.ops.alula.decoder_blocks.default, args, {"tokens_to_keep": 1})


def test_a_stack_is_forgotten_with_its_object_and_never_copied() -> None:
    stack = make_stack((4, 1, 24), torch.float32, False)
    bound = stack.bound()
    number = bound._number
    with pytest.raises(TypeError, match="copy the weights and bind them"):
        copy.deepcopy(bound)
    inputs = make_inputs(stack, (1, 1), torch.float32)
    del bound
    gc.collect()
    with pytest.raises(RuntimeError, match=f"blocks is {number}, which stands for no stack of blocks"):
        torch.ops.alula.decoder_blocks(inputs.x, number, *inputs[1:], None, [], True, None, None)
    _C.release_decoder_blocks(number)  # twice is no harm


def test_bad_stacks() -> None:
    stack = make_stack((4, 1, 24), torch.float32, False)

    def refused(match: str, weights: list[Any] = stack.weights, **dims: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            ops.DecoderBlocks(weights, **{**stack.dims, **dims})

    refused("weights holds 35 tensors; 3 sequential blocks .* have 36, 12 each", stack.weights[:-1])
    refused("weights holds 36 tensors; 3 parallel blocks .* have 18", is_parallel=True)
    refused("scales is empty", scales=[])
    refused("is not what alula::pack_weight makes of", mlp_width=F + 32)
    refused("mlp_width is 0", mlp_width=0)
    refused("num_heads 4 and num_kv_heads 3 do not fit", num_kv_heads=3)
    refused("bias has shape", [*stack.weights[:3], stack.weights[3][1:], *stack.weights[4:]])
    half = [w if w.dim() == 1 else ops.pack(p.half()) for w, p in zip(stack.plain, stack.plain, strict=True)]
    refused("dtype", [stack.weights[0], stack.weights[1], *half[2:]])
    with pytest.raises(ValueError, match="weights is empty"):
        ops.DecoderBlocks([], **stack.dims)
    with pytest.raises(ValueError, match="activation"):
        ops.DecoderBlocks(stack.weights, **stack.dims, activation="swoosh")


def test_bad_inputs() -> None:
    stack = make_stack((4, 1, 24), torch.float32, False)
    bound = stack.bound()
    good = make_inputs(stack, (2, 2), torch.float32)

    def refused(match: str, options: dict[str, Any] | None = None, **changes: Any) -> None:
        inputs = good._replace(**changes)
        before = copy.deepcopy(inputs.kv_caches)
        with pytest.raises(RuntimeError, match=match):
            bound(*inputs, **(options or {}))
        for kv, old in zip(inputs.kv_caches, before, strict=True):
            assert_equal_bits(kv, old)

    refused("tokens_to_keep is -1; accepted: 0 ", {"tokens_to_keep": -1})
    refused("x has shape", x=good.x[..., 1:])
    refused("x has dtype BFloat16", x=good.x.bfloat16())
    refused("kv_caches holds 2 tensors; the stack has 3 blocks", kv_caches=good.kv_caches[:2])
    refused("kv_cache has shape", kv_caches=[*good.kv_caches[:2], good.kv_caches[2][:1]])
    refused("kv_caches hold 40 and 39 slots", kv_caches=[*good.kv_caches[:2], good.kv_caches[2][:, :, 1:]])
    refused("kv_cache is expanded", kv_caches=[*good.kv_caches[:2], good.kv_caches[2][:1].expand(2, -1, -1, -1)])
    refused("kv_cache has dtype", kv_caches=[*good.kv_caches[:2], good.kv_caches[2].half()])
    refused("positions holds 40", positions=good.positions.clamp(min=SLOTS))
    refused("lengths holds 41", lengths=good.lengths + 41 - good.lengths.max())
    refused("mask has shape", options={"mask": torch.ones(2, 1, 3, SLOTS, dtype=torch.bool)})
    refused("head_masks holds 1 tensors", options={"head_masks": [torch.ones(4)]})
    refused("head_mask has shape", options={"head_masks": [torch.ones(4), torch.ones(4), torch.ones(5)]})
    refused("rotary_table and rotary_positions go together", options={"rotary_table": torch.ones(4, 8)})
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward"):
        bound(good.x.requires_grad_(), *good[1:])
