"""Ops called through torch.ops: a gradient that is asked for is refused, whichever tensor asks, never left out."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from alula import ops
from test_choose_token import state_of
from torch import Tensor

Arguments = list[Any]


def _cache() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(2, 1, 4, 16), torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)


def _embedding() -> Arguments:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    return [ids, ops.pack(torch.randn(9, 8)).data, 9, 8, ids, torch.randn(4, 8), ids, torch.randn(2, 8)]


def _linear() -> Arguments:
    weight, norm = ops.pack(torch.randn(5, 6)).data, torch.randn(6)
    return [torch.randn(3, 6), weight, 5, torch.randn(5), norm, norm.clone(), 1e-5, 0, torch.randn(3, 5)]


def _qkv_projection() -> Arguments:
    cache, positions, _ = _cache()
    weight, norm, table = ops.pack(torch.randn(42, 6)).data, torch.randn(6), ops.rotary_table(4, 4)
    product = [torch.randn(2, 3, 6), weight, torch.randn(42), norm, norm.clone(), 1e-5, 2, 1, 8]
    return [*product, cache, positions, table, positions, torch.randn(2, 3, 10)]


def _rotary() -> Arguments:
    table, positions = ops.rotary_table(4, 4), torch.zeros(2, 3, dtype=torch.int32)
    return [torch.randn(2, 3, 2, 8), torch.randn(2, 3, 1, 8), positions, table, True]


def _attention() -> Arguments:
    cache, positions, lengths = _cache()
    return [torch.randn(2, 3, 2, 8), cache, positions, lengths, torch.randn(2, 1, 3, 4), torch.randn(2), 1.0, False]


def _block_sparse_attention() -> Arguments:
    q, kv = torch.randn(1, 16, 2, 8), torch.randn(1, 2, 16, 8)
    starts, entries = torch.tensor([[[0, 1]]]).int(), torch.tensor([[0, 1]]).int()
    return [q, kv, kv.clone(), starts, entries, None, 16, None, None, None, torch.randn(2), 1.0, False]


def _blocks() -> Arguments:
    e, d = 8, 8
    dense = [ops.pack(torch.randn(n, e)).data for n in (3 * d, e, e, e)]
    norm, bias = torch.randn(e), torch.randn(e)
    weights = [norm, bias, dense[0], torch.randn(3 * d), dense[1], bias, norm, bias, dense[2], bias, dense[3], bias]
    return [[w.clone() for w in weights], [0] * 12, False, 1, 1, d, e, [1.0], 1e-5, 1]


def _decoder_blocks() -> Arguments:
    cache, positions, lengths = _cache()
    inputs = [torch.randn(2, 3, 8), torch.ops.alula.bind_decoder_blocks(*_blocks()), [cache], positions, lengths]
    return [*inputs, torch.randn(2, 1, 3, 4), [torch.randn(1)], False, None, None]


def _layer_norm() -> Arguments:
    return [torch.randn(3, 6), torch.randn(6), torch.randn(6), 1e-5, torch.randn(3, 6)]


ARGUMENTS: dict[str, Callable[[], Arguments]] = {
    "pack_weight": lambda: [torch.randn(5, 6)],
    "unpack_weight": lambda: [ops.pack(torch.randn(5, 6)).data, 5, 6],
    "quantize_weight": lambda: [torch.randn(5, 6), ops.pack(torch.randn(5, 6), "int8").code],
    "quantize_columns": lambda: [torch.randn(5, 6), torch.eye(6), ops.pack(torch.randn(5, 6), "int4").code],
    "dequantize_weight": lambda: [*ops.pack(torch.randn(5, 6), "int8")[:4], torch.float32],
    "embedding": _embedding,
    "linear": _linear,
    "qkv_projection": _qkv_projection,
    "rotary": _rotary,
    "rotary_": _rotary,
    "attention": _attention,
    "attention_into": lambda: [*_attention(), torch.zeros(2, 3, 16)],
    "block_sparse_attention": _block_sparse_attention,
    "bind_decoder_blocks": _blocks,
    "decoder_blocks": _decoder_blocks,
    "scaled_masked_softmax": lambda: [torch.randn(2, 2, 3, 4), torch.randn(3, 4), 1.0, False, None],
    "layer_norm": _layer_norm,
    "cache_layers": lambda: [torch.randn(1), 2, [3]],
    "choose_token": lambda: [torch.randn(3, 9), None, torch.tensor([0]), None, True, *state_of(3)],
}


def _floats(arguments: Arguments) -> Iterator[Tensor]:
    for argument in arguments:
        for tensor in argument if isinstance(argument, list) else [argument]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield tensor


def test_every_op_is_here() -> None:
    registered = {
        name.removeprefix("alula::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("alula::")
    }
    assert registered == set(ARGUMENTS)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_tensor_that_requires_grad(op: str) -> None:
    call = getattr(torch.ops.alula, op)
    call(*ARGUMENTS[op]())
    for which in range(len(list(_floats(ARGUMENTS[op]())))):
        for is_leaf in (True, False):
            arguments = ARGUMENTS[op]()
            tensor = list(_floats(arguments))[which]
            with torch.enable_grad():
                tensor.requires_grad_()
                if not is_leaf:
                    made = tensor * 1
                    for i, argument in enumerate(arguments):
                        if argument is tensor:
                            arguments[i] = made
                        elif isinstance(argument, list):
                            arguments[i] = [made if item is tensor else item for item in argument]
                with pytest.raises(RuntimeError, match=r"no backward yet.*requires grad.*no_grad.*detach"):
                    call(*arguments)
            if op != "rotary_" or not is_leaf:
                call(*arguments)  # gradients are off here: none is missing


def test_without_gradients_results_are_as_ever() -> None:
    arguments = _linear()
    expected = torch.ops.alula.linear(*arguments)
    with torch.enable_grad():
        result = torch.ops.alula.linear(*arguments)
    assert torch.equal(result, expected)
    assert not result.requires_grad
    with torch.inference_mode():
        assert torch.equal(torch.ops.alula.linear(*arguments), expected)


def test_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        arguments = _linear()
        expected = torch.ops.alula.linear(*arguments)
    with torch.enable_grad():
        assert torch.equal(torch.ops.alula.linear(*arguments), expected)
