"""pack_weight and unpack_weight: bit-exact inverses for any shape, dtype, strides and bit pattern."""

import pytest
import torch
from alula import ops
from alula.testing import hostile, shapes
from alula.testing.compare import assert_equal_bits


@pytest.mark.parametrize("out_features, in_features", [*shapes.WEIGHTS, (96, 64), (97, 513), (2304, 768)])
def test_unpack_gives_back_every_bit(out_features: int, in_features: int, dtype: torch.dtype, isa: str) -> None:
    weight = hostile.any_bits((out_features, in_features), dtype)
    packed = ops.pack(weight)
    assert (packed.out_features, packed.in_features, packed.dtype) == (out_features, in_features, dtype)
    assert_equal_bits(packed.unpack(), weight)


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
def test_layout_of_the_weight_does_not_matter(layout: str, dtype: torch.dtype) -> None:
    weight = torch.randn(45, 37).to(dtype)
    viewed = hostile.LAYOUTS[layout](weight)
    assert_equal_bits(ops.pack(viewed).data, ops.pack(weight).data)
    assert_equal_bits(ops.pack(viewed).unpack(), weight)


def test_expanded_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(1, 7).to(dtype).expand(40, 7)
    assert_equal_bits(ops.pack(weight).unpack(), weight.contiguous())


def test_packing_does_not_depend_on_isa_or_threads(dtype: torch.dtype, isa: str, threads: None) -> None:
    weight = torch.randn(300, 77).to(dtype)
    torch.set_num_threads(1)
    one = ops.pack(weight).data
    torch.set_num_threads(2)
    assert_equal_bits(ops.pack(weight).data, one)


def test_packed_weight_is_a_copy(dtype: torch.dtype) -> None:
    weight = torch.randn(33, 9).to(dtype)
    before = weight.clone()
    packed = ops.pack(weight)
    weight.zero_()
    assert_equal_bits(packed.unpack(), before)


@pytest.mark.parametrize("out_features, in_features", [(1, 1), (33, 17), (64, 64)])
def test_opcheck(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    weight = torch.randn(out_features, in_features).to(dtype)
    torch.library.opcheck(torch.ops.alula.pack_weight, (weight,))
    torch.library.opcheck(torch.ops.alula.unpack_weight, (ops.pack(weight).data, out_features, in_features))
