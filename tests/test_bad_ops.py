"""Wrong input to the ops: an error that names what is wrong and what is accepted, and nothing half-done."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from alula import ops
from torch import Tensor

ERRORS = (RuntimeError, ValueError, TypeError)
Change = dict[str, Any]


def raises(call: Callable[..., Any], arguments: Change, change: Change, *words: str) -> None:
    """`call` works with `arguments`; with `change` it raises, and the message has all the words."""
    call(**arguments)
    with pytest.raises(ERRORS) as caught:
        call(**{**arguments, **change})
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"


def cases(*rows: tuple[str, Callable[[], Change], tuple[str, ...]]) -> pytest.MarkDecorator:
    """(what is wrong, how, words of the message)"""
    return pytest.mark.parametrize("change, words", [row[1:] for row in rows], ids=[row[0] for row in rows])


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ids(*shape: int, fill: int = 0) -> Tensor:
    return torch.full(shape, fill, dtype=torch.int64)


def index(*shape: int, fill: int = 0) -> Tensor:
    return torch.full(shape, fill, dtype=torch.int32)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


@cases(
    ("one dimension", lambda: {"weight": zeros(8)}, (r"\[8\]", "out")),
    ("three dimensions", lambda: {"weight": zeros(2, 3, 4)}, (r"\[2, 3, 4\]", "out")),
    (
        "float64",
        lambda: {"weight": zeros(4, 4, dtype=torch.float64)},
        ("weight", "(?i)double|float64", "float32.*bfloat16"),
    ),
    ("int8", lambda: {"weight": zeros(4, 4, dtype=torch.int8)}, ("weight", "float32.*bfloat16.*float16")),
    ("a list", lambda: {"weight": [[1.0]]}, ("list|Tensor|dim",)),
)
def test_pack(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    if isinstance(change()["weight"], list):
        with pytest.raises((*ERRORS, AttributeError)):
            ops.pack(**change())
        return
    raises(ops.pack, {"weight": zeros(4, 4)}, change(), *words)


def test_unpack_with_another_shape() -> None:
    packed = ops.pack(zeros(40, 24))
    for out_features, in_features in ((65, 24), (40, 25), (40, 0), (-1, 24), (40, -24)):
        with pytest.raises(ERRORS, match=r"weight|features"):
            torch.ops.alula.unpack_weight(packed.data, out_features, in_features)


def embedding_arguments() -> Change:
    return {
        "input_ids": ids(2, 3),
        "table": ops.pack(zeros(10, 8)),
        "position_ids": ids(1, 3),
        "position_table": zeros(5, 8),
        "token_type_ids": ids(2, 3),
    }


@cases(
    ("id too large", lambda: {"input_ids": ids(2, 3, fill=10)}, ("input_ids", r"\b10\b", r"\b9\b|< 10")),
    ("id negative", lambda: {"input_ids": ids(2, 3, fill=-1)}, ("input_ids", "-1", r"\b9\b|< 10")),
    ("id far out of range", lambda: {"input_ids": ids(2, 3, fill=2**62)}, ("input_ids", str(2**62))),
    ("one id among many", lambda: {"input_ids": torch.tensor([[0, 1, 2], [3, 77, 5]])}, ("input_ids", "77")),
    ("ids int32", lambda: {"input_ids": index(2, 3)}, ("input_ids", "(?i)int", "(?i)long|int64")),
    ("ids float", lambda: {"input_ids": zeros(2, 3)}, ("input_ids", "(?i)float", "(?i)long|int64")),
    ("position too large", lambda: {"position_ids": ids(1, 3, fill=5)}, ("position_ids", r"\b5\b", r"\b4\b|< 5")),
    ("position negative", lambda: {"position_ids": ids(1, 3, fill=-2)}, ("position_ids", "-2")),
    ("positions int32", lambda: {"position_ids": index(1, 3)}, ("position_ids", "(?i)long|int64")),
    ("positions too many", lambda: {"position_ids": ids(1, 4)}, ("position_ids", r"\[1, 4\]", r"\[2, 3\]")),
    ("positions of another batch", lambda: {"position_ids": ids(3, 3)}, ("position_ids", r"\[3, 3\]")),
    ("positions transposed", lambda: {"position_ids": ids(3, 2)}, ("position_ids", r"\[3, 2\]")),
    ("positions a column", lambda: {"position_ids": ids(3, 1)}, ("position_ids", r"\[3, 1\]")),
    ("positions without a table", lambda: {"position_table": None}, ("position_ids", "position_table")),
    ("a table without positions", lambda: {"position_ids": None}, ("position_ids", "position_table")),
    ("table of another width", lambda: {"position_table": zeros(5, 7)}, ("position_table", r"\[5, 7\]", "8")),
    ("table of another dtype", lambda: {"position_table": zeros(5, 8).half()}, ("position_table", "(?i)half|float16")),
    ("types too large", lambda: {"token_type_ids": ids(2, 3, fill=10)}, ("token_type_ids", r"\b10\b")),
    ("types negative", lambda: {"token_type_ids": ids(2, 3, fill=-3)}, ("token_type_ids", "-3")),
    ("types of another shape", lambda: {"token_type_ids": ids(2, 4)}, ("token_type_ids", r"\[2, 4\]", r"\[2, 3\]")),
    ("types transposed", lambda: {"token_type_ids": ids(3, 2)}, ("token_type_ids", r"\[3, 2\]", r"\[2, 3\]")),
    (
        "types beyond their table",
        lambda: {"token_type_table": zeros(2, 8), "token_type_ids": ids(2, 3, fill=2)},
        ("token_type_ids", r"\b2\b", r"\b1\b"),
    ),
    ("table of types too wide", lambda: {"token_type_table": zeros(2, 9)}, ("token_type_table", r"\[2, 9\]", "8")),
    ("table of types in half", lambda: {"token_type_table": zeros(2, 8).half()}, ("token_type_table", "(?i)half")),
    (
        "table of types alone",
        lambda: {"token_type_ids": None, "token_type_table": zeros(2, 8)},
        ("token_type_table", "token_type_ids"),
    ),
    ("on two devices", lambda: {"position_table": meta(5, 8)}, ("position_table", "device")),
)
def test_embedding(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    raises(ops.embedding, embedding_arguments(), change(), *words)


def linear_arguments() -> Change:
    return {
        "x": zeros(2, 3, 8),
        "weight": ops.pack(zeros(40, 8)),
        "bias": zeros(40),
        "norm_weight": zeros(8),
        "norm_bias": zeros(8),
        "activation": "gelu",
        "residual": zeros(2, 3, 40),
    }


@cases(
    ("x of another width", lambda: {"x": zeros(2, 3, 9)}, (r"\b9\b", r"\b8\b")),
    ("x without dimensions", lambda: {"x": torch.tensor(1.0)}, ("x", "dimension|shape")),
    ("x bfloat16", lambda: {"x": zeros(2, 3, 8).bfloat16()}, ("x", "(?i)bfloat16", "(?i)float")),
    ("x float64", lambda: {"x": zeros(2, 3, 8).double()}, ("x", "(?i)double|float64")),
    ("x integer", lambda: {"x": ids(2, 3, 8)}, ("x", "(?i)long|int64")),
    ("x on another device", lambda: {"x": meta(2, 3, 8)}, ("x", "device")),
    ("bias too long", lambda: {"bias": zeros(41)}, ("bias", r"\[41\]", r"\b40\b")),
    ("bias with two dimensions", lambda: {"bias": zeros(1, 40)}, ("bias", r"\[1, 40\]", r"\b40\b")),
    ("bias of another dtype", lambda: {"bias": zeros(40).half()}, ("bias", "(?i)half|float16")),
    ("bias on another device", lambda: {"bias": meta(40)}, ("bias", "device")),
    ("norm_weight too short", lambda: {"norm_weight": zeros(7)}, ("norm_weight", r"\[7\]", r"\b8\b")),
    ("norm_bias too long", lambda: {"norm_bias": zeros(40)}, ("norm_bias", r"\[40\]", r"\b8\b")),
    ("norm_bias alone", lambda: {"norm_weight": None}, ("norm_bias", "norm_weight")),
    ("norm_weight of another dtype", lambda: {"norm_weight": zeros(8).half()}, ("norm_weight", "(?i)half|float16")),
    ("unknown activation", lambda: {"activation": "gelo"}, ("gelo", "gelu_new", "relu", "silu", "sqrtsoftplus")),
    ("activation with parameters", lambda: {"activation": "prelu"}, ("'prelu'", "parameters of their own", "mish")),
    ("residual of another shape", lambda: {"residual": zeros(2, 40)}, ("residual", r"\[2, 40\]", r"\b40\b")),
    ("residual to be broadcast", lambda: {"residual": zeros(1, 3, 40)}, ("residual", r"\[1, 3, 40\]")),
    ("residual of another dtype", lambda: {"residual": zeros(2, 3, 40).half()}, ("residual", "(?i)half|float16")),
    ("residual on another device", lambda: {"residual": meta(2, 3, 40)}, ("residual", "device")),
    (
        "weight not packed",
        lambda: {"weight": ops.PackedWeight(zeros(40, 8), 40, 8)},
        ("(?i)pack", r"\[40, 8\]"),
    ),
    (
        "weight said larger than it is",
        lambda: {"weight": ops.PackedWeight(ops.pack(zeros(40, 8)).data, 80, 8), "bias": None, "residual": None},
        ("(?i)pack|weight",),
    ),
)
def test_linear(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    raises(ops.linear, linear_arguments(), change(), *words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 8, 10])
def test_linear_width_that_packing_would_hide(width: int, dtype: torch.dtype) -> None:
    """Packed in pairs, bfloat16 weights of 9 and of 10 input features look the same."""
    weight = ops.pack(zeros(40, 9, dtype=dtype))
    with pytest.raises(ERRORS, match=rf"\b{width}\b.*\b9\b"):
        ops.linear(zeros(2, width, dtype=dtype), weight)


@pytest.mark.parametrize("code", [-1, max(ops.ACTIVATIONS.values()) + 1, 1000])
def test_linear_activation_code(code: int) -> None:
    x, packed = zeros(2, 8), ops.pack(zeros(4, 8)).data
    with pytest.raises(RuntimeError, match=f"activation.*{code}"):
        torch.ops.alula.linear(x, packed, 4, None, None, None, 1e-5, code, None)


def qkv_arguments() -> Change:
    return {
        "x": torch.randn(2, 3, 8),
        "weight": ops.pack(torch.randn(40, 8)),
        "bias": torch.randn(40),
        "num_heads": 3,
        "num_kv_heads": 1,
        "head_dim": 8,
        "kv_cache": zeros(2, 1, 6, 16),
        "positions": torch.arange(3, dtype=torch.int32).repeat(2, 1),
        "norm_weight": torch.randn(8),
        "norm_bias": torch.randn(8),
    }


def of_head_dim(head_dim: int) -> Change:
    weight = ops.pack(zeros(5 * head_dim, 8))
    return {"head_dim": head_dim, "weight": weight, "bias": None, "kv_cache": zeros(2, 1, 6, 2 * head_dim)}


@cases(
    ("x with two dimensions", lambda: {"x": zeros(6, 8)}, ("x", r"\[6, 8\]", r"B, T, E")),
    ("x of another width", lambda: {"x": zeros(2, 3, 9)}, (r"\b9\b", r"\b8\b")),
    ("x of another dtype", lambda: {"x": zeros(2, 3, 8).half()}, ("x", "(?i)half|float16")),
    ("x on another device", lambda: {"x": meta(2, 3, 8)}, ("x", "device")),
    ("heads that do not add up", lambda: {"num_heads": 4, "bias": None}, ("num_heads", r"\b48\b", r"\b40\b")),
    ("heads that kv heads do not divide", lambda: {"num_kv_heads": 2}, ("num_heads", "num_kv_heads")),
    ("no heads", lambda: {"num_heads": 0}, ("num_heads",)),
    ("negative heads", lambda: {"num_heads": -3}, ("num_heads",)),
    ("no kv heads", lambda: {"num_kv_heads": 0}, ("num_kv_heads",)),
    ("head_dim not a multiple of 8", lambda: of_head_dim(12), ("head_dim", "12", "multiple", "256")),
    ("head_dim too large", lambda: of_head_dim(264), ("head_dim", "264", "256")),
    ("head_dim 0", lambda: {"head_dim": 0}, ("head_dim",)),
    ("bias of another shape", lambda: {"bias": zeros(24)}, ("bias", r"\[24\]", r"\b40\b")),
    ("norm_bias alone", lambda: {"norm_weight": None}, ("norm_bias", "norm_weight")),
    ("norm_weight of another shape", lambda: {"norm_weight": zeros(9)}, ("norm_weight", r"\[9\]", r"\b8\b")),
    ("cache of another batch", lambda: {"kv_cache": zeros(3, 1, 6, 16)}, ("kv_cache", r"\[3, 1, 6, 16\]", r"\b2\b")),
    ("cache of another head count", lambda: {"kv_cache": zeros(2, 3, 6, 16)}, ("kv_cache", r"\[2, 3, 6, 16\]")),
    ("cache without values", lambda: {"kv_cache": zeros(2, 1, 6, 8)}, ("kv_cache", r"\[2, 1, 6, 8\]", "16")),
    ("cache with three dimensions", lambda: {"kv_cache": zeros(2, 6, 16)}, ("kv_cache", r"\[2, 6, 16\]")),
    ("cache of another dtype", lambda: {"kv_cache": zeros(2, 1, 6, 16).bfloat16()}, ("kv_cache", "(?i)bfloat16")),
    ("cache on another device", lambda: {"kv_cache": meta(2, 1, 6, 16)}, ("kv_cache", "device")),
    ("cache with a stride", lambda: {"kv_cache": zeros(2, 1, 16, 6).mT}, ("kv_cache", "contiguous|stride")),
    ("cache rows that share memory", lambda: {"kv_cache": zeros(1, 1, 6, 16).expand(2, 1, 6, 16)}, ("kv_cache",)),
    ("cache full", lambda: {"positions": index(2, 3, fill=6)}, ("position", r"\b6\b")),
    (
        "one token beyond the cache",
        lambda: {"positions": torch.tensor([[0, 1, 2], [3, 4, 6]]).int()},
        ("position", "6"),
    ),
    ("positions int64", lambda: {"positions": ids(2, 3)}, ("positions", "(?i)long|int64", "(?i)int")),
    ("positions of another shape", lambda: {"positions": index(2, 4)}, ("positions", r"\[2, 4\]", r"\b3\b")),
    ("positions with one dimension", lambda: {"positions": index(6)}, ("positions", r"\[6\]")),
    ("positions on another device", lambda: {"positions": meta(2, 3, dtype=torch.int32)}, ("positions", "device")),
)
def test_qkv_projection(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    arguments = qkv_arguments()
    changed = change()
    raises(ops.qkv_projection, arguments, changed, *words)
    cache = changed.get("kv_cache", arguments["kv_cache"].zero_())
    with pytest.raises(ERRORS):
        ops.qkv_projection(**{**arguments, **changed})
    assert cache.is_meta or (cache == 0).all()  # refused before anything was written


def qkv_parallel_arguments() -> Change:
    return {
        **qkv_arguments(),
        "weight": ops.pack(torch.randn(45, 8)),
        "bias": None,
        "rotary_table": zeros(9, 4),
        "rotary_positions": index(2, 3, fill=8),
        "mlp": zeros(2, 3, 5),
        "mlp_activation": "relu",
    }


@cases(
    ("table without positions", lambda: {"rotary_positions": None}, ("rotary_table", "rotary_positions")),
    ("positions without a table", lambda: {"rotary_table": None}, ("rotary_table", "rotary_positions")),
    ("table with an odd width", lambda: {"rotary_table": zeros(9, 3)}, ("rotary_table", r"\[9, 3\]", "even")),
    ("table wider than a head", lambda: {"rotary_table": zeros(9, 10)}, ("rotary_table", r"\[9, 10\]", r"\b8\b")),
    ("table of another dtype", lambda: {"rotary_table": zeros(9, 4).half()}, ("rotary_table", "(?i)half|float16")),
    ("table on another device", lambda: {"rotary_table": meta(9, 4)}, ("rotary_table", "device")),
    ("position beyond the table", lambda: {"rotary_positions": index(2, 3, fill=9)}, ("position", r"\b9\b", r"\b8\b")),
    ("negative position", lambda: {"rotary_positions": index(2, 3, fill=-1)}, ("position", "-1")),
    ("positions of another shape", lambda: {"rotary_positions": index(1, 3)}, ("position", r"\[1, 3\]")),
    ("mlp of another shape", lambda: {"mlp": zeros(3, 2, 5)}, ("mlp", r"\[3, 2, 5\]")),
    ("mlp of another width", lambda: {"mlp": zeros(2, 3, 4)}, ("mlp", r"\b44\b", r"\b45\b")),
    ("mlp without dimensions", lambda: {"mlp": torch.tensor(0.0)}, ("mlp",)),
    ("mlp of another dtype", lambda: {"mlp": zeros(2, 3, 5).half()}, ("mlp", "(?i)half|float16")),
    ("mlp with strides", lambda: {"mlp": zeros(2, 3, 10)[..., ::2]}, ("mlp", "stride|contiguous")),
    ("mlp expanded", lambda: {"mlp": zeros(1, 1, 5).expand(2, 3, 5)}, ("mlp",)),
    ("mlp on another device", lambda: {"mlp": meta(2, 3, 5)}, ("mlp", "device")),
    ("unknown activation", lambda: {"mlp_activation": "relo"}, ("relo", "relu")),
)
def test_qkv_projection_of_the_parallel_block(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    arguments = qkv_parallel_arguments()
    changed = change()
    raises(ops.qkv_projection, arguments, changed, *words)
    cache, mlp = arguments["kv_cache"].zero_(), changed.get("mlp", arguments["mlp"]).zero_()
    with pytest.raises(ERRORS):
        ops.qkv_projection(**{**arguments, **changed})
    assert (cache == 0).all()
    assert mlp.is_meta or (mlp == 0).all()


def rotary_arguments() -> Change:
    return {"q": zeros(2, 3, 4, 16), "k": zeros(2, 3, 1, 16), "positions": index(2, 3), "table": zeros(9, 8)}


@cases(
    ("q with three dimensions", lambda: {"q": zeros(2, 3, 16)}, ("q", r"\[2, 3, 16\]")),
    ("q float64", lambda: {"q": zeros(2, 3, 4, 16).double()}, ("(?i)double|float64",)),
    ("k of another batch", lambda: {"k": zeros(1, 3, 1, 16)}, ("k", r"\[1, 3, 1, 16\]")),
    ("k of another head size", lambda: {"k": zeros(2, 3, 1, 8)}, ("k", r"\[2, 3, 1, 8\]")),
    ("k of another dtype", lambda: {"k": zeros(2, 3, 1, 16).half()}, ("k", "(?i)half|float16")),
    ("k on another device", lambda: {"k": meta(2, 3, 1, 16)}, ("k", "device")),
    ("positions int64", lambda: {"positions": ids(2, 3)}, ("positions", "(?i)long|int64")),
    ("positions of another shape", lambda: {"positions": index(3)}, ("positions", r"\[3\]")),
    ("position beyond the table", lambda: {"positions": index(2, 3, fill=9)}, ("position", r"\b9\b", r"\b8\b")),
    ("negative position", lambda: {"positions": index(2, 3, fill=-1)}, ("position", "-1")),
    ("table with an odd width", lambda: {"table": zeros(9, 7)}, ("table", r"\[9, 7\]", "even")),
    ("table wider than a head", lambda: {"table": zeros(9, 18)}, ("table", r"\[9, 18\]", r"\b16\b")),
    ("table of another dtype", lambda: {"table": zeros(9, 8).double()}, ("table", "(?i)double|float64")),
)
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary(inplace: bool, change: Callable[[], Change], words: tuple[str, ...]) -> None:
    raises(ops.rotary, {**rotary_arguments(), "inplace": inplace}, change(), *words)


@cases(
    ("q with a stride", lambda: {"q": zeros(2, 3, 16, 4).mT}, ("q", "stride|contiguous")),
    ("q expanded", lambda: {"q": zeros(1, 3, 4, 16).expand(2, 3, 4, 16)}, ("q",)),
    ("k expanded", lambda: {"k": zeros(2, 3, 1, 16).expand(2, 3, 4, 16)}, ("k",)),
)
def test_rotary_in_place(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    raises(ops.rotary, {**rotary_arguments(), "inplace": True}, change(), *words)


def attention_arguments() -> Change:
    return {
        "q": zeros(2, 3, 4, 8),
        "kv_cache": zeros(2, 2, 6, 16),
        "positions": torch.arange(3, dtype=torch.int32).repeat(2, 1),
        "lengths": index(2, fill=3),
        "mask": zeros(2, 1, 3, 6),
        "head_mask": zeros(4),
    }


@cases(
    ("q with three dimensions", lambda: {"q": zeros(2, 3, 32)}, (r"\bq\b", r"\[2, 3, 32\]")),
    ("q of another dtype", lambda: {"q": zeros(2, 3, 4, 8).bfloat16()}, ("(?i)bfloat16", "(?i)float")),
    ("q float64", lambda: {"q": zeros(2, 3, 4, 8).double()}, (r"\bq\b", "(?i)double|float64")),
    ("q on another device", lambda: {"q": meta(2, 3, 4, 8)}, (r"\bq\b", "device")),
    ("head_dim not a multiple of 8", lambda: {"q": zeros(2, 3, 4, 12), "kv_cache": zeros(2, 2, 6, 24)}, ("12", "256")),
    ("head_dim too large", lambda: {"q": zeros(2, 3, 4, 264), "kv_cache": zeros(2, 2, 6, 528)}, ("264", "256")),
    ("heads that kv heads do not divide", lambda: {"q": zeros(2, 3, 5, 8)}, (r"\b5\b", r"\b2\b")),
    ("cache of another batch", lambda: {"kv_cache": zeros(1, 2, 6, 16)}, ("kv_cache", r"\[1, 2, 6, 16\]")),
    ("cache of another head size", lambda: {"kv_cache": zeros(2, 2, 6, 8)}, ("kv_cache", r"\[2, 2, 6, 8\]", "16")),
    ("cache of another dtype", lambda: {"kv_cache": zeros(2, 2, 6, 16).half()}, ("kv_cache", "(?i)half|float16")),
    ("cache on another device", lambda: {"kv_cache": meta(2, 2, 6, 16)}, ("kv_cache", "device")),
    ("positions int64", lambda: {"positions": ids(2, 3)}, ("positions", "(?i)long|int64")),
    ("positions of another shape", lambda: {"positions": index(2, 1)}, ("positions", r"\[2, 1\]")),
    ("positions on another device", lambda: {"positions": meta(2, 3, dtype=torch.int32)}, ("positions", "device")),
    ("lengths int64", lambda: {"lengths": ids(2, fill=3)}, ("lengths", "(?i)long|int64")),
    ("lengths of another batch", lambda: {"lengths": index(3)}, ("lengths", r"\[3\]")),
    ("lengths beyond the cache", lambda: {"lengths": torch.tensor([3, 7]).int(), "mask": None}, ("lengths", "7", "6")),
    ("negative length", lambda: {"lengths": torch.tensor([3, -1]).int()}, ("lengths", "-1")),
    ("mask with two dimensions", lambda: {"mask": zeros(3, 6)}, ("mask", r"\[3, 6\]")),
    ("mask of another batch", lambda: {"mask": zeros(3, 1, 3, 6)}, ("mask", r"\[3, 1, 3, 6\]")),
    ("mask of another head count", lambda: {"mask": zeros(2, 2, 3, 6)}, ("mask", r"\[2, 2, 3, 6\]")),
    ("mask of another token count", lambda: {"mask": zeros(2, 1, 2, 6)}, ("mask", r"\[2, 1, 2, 6\]")),
    ("mask too short", lambda: {"mask": zeros(2, 1, 3, 2)}, ("mask", r"\[2, 1, 3, 2\]", r"\b3\b")),
    ("mask of integers", lambda: {"mask": ids(2, 1, 3, 6)}, ("mask", "(?i)long|int64", "(?i)bool")),
    ("mask float64", lambda: {"mask": zeros(2, 1, 3, 6).double()}, ("mask", "(?i)double|float64", "(?i)bool")),
    ("mask on another device", lambda: {"mask": meta(2, 1, 3, 6)}, ("mask", "device")),
    ("head_mask of another length", lambda: {"head_mask": zeros(3)}, ("head_mask", r"\[3\]", r"\b4\b")),
    ("head_mask of another dtype", lambda: {"head_mask": zeros(4).half()}, ("head_mask", "(?i)half|float16")),
    ("out of another shape", lambda: {"out": zeros(2, 3, 31)}, (r"\bout\b", r"\[2, 3, 31\]", r"\b32\b")),
    ("out of another dtype", lambda: {"out": zeros(2, 3, 32).half()}, (r"\bout\b", "(?i)half|float16")),
    ("out on another device", lambda: {"out": meta(2, 3, 32)}, (r"\bout\b", "device")),
    ("out that is expanded", lambda: {"out": zeros(1, 3, 32).expand(2, 3, 32)}, (r"\bout\b", "expanded")),
    ("out with its heads apart", lambda: {"out": zeros(2, 3, 64)[..., ::2]}, (r"\bout\b", "strides")),
    ("out with its rows apart", lambda: {"out": zeros(2, 4, 32)[:, :3]}, (r"\bout\b", "strides")),
)
def test_attention(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    raises(ops.attention, attention_arguments(), change(), *words)


def softmax_arguments() -> Change:
    return {"scores": zeros(2, 3, 4), "mask": zeros(2, 1, 4), "causal": True}


@cases(
    ("scores without dimensions", lambda: {"scores": torch.tensor(1.0), "mask": None}, ("scores",)),
    ("scores with one dimension, causal", lambda: {"scores": zeros(4), "mask": None}, ("scores", r"\[4\]")),
    ("scores float64", lambda: {"scores": zeros(2, 3, 4).double()}, ("scores", "(?i)double|float64", "float32")),
    ("scores of integers", lambda: {"scores": ids(2, 3, 4)}, ("scores", "(?i)long|int64", "float32")),
    ("mask that does not broadcast", lambda: {"mask": zeros(3, 5)}, ("mask", r"\[3, 5\]", r"\[2, 3, 4\]")),
    ("mask with more dimensions", lambda: {"mask": zeros(1, 2, 3, 4)}, ("mask", r"\[1, 2, 3, 4\]", r"\[2, 3, 4\]")),
    ("mask longer than the scores", lambda: {"mask": zeros(2, 3, 5)}, ("mask", r"\[2, 3, 5\]")),
    ("mask of integers", lambda: {"mask": ids(2, 3, 4)}, ("mask", "(?i)long|int64", "(?i)bool")),
    ("mask on another device", lambda: {"mask": meta(2, 1, 4)}, ("mask", "device")),
    ("dtype of integers", lambda: {"dtype": torch.int32}, ("dtype", "float32")),
    ("dtype float64", lambda: {"dtype": torch.float64}, ("dtype", "float32")),
)
def test_scaled_masked_softmax(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    raises(ops.scaled_masked_softmax, softmax_arguments(), change(), *words)


def norm_arguments() -> Change:
    return {"x": zeros(2, 3, 8), "weight": zeros(8), "bias": zeros(8), "residual": zeros(2, 3, 8)}


@cases(
    ("x without dimensions", lambda: {"x": torch.tensor(1.0), "residual": None}, ("x", "dimension|shape")),
    ("x float64", lambda: {"x": zeros(2, 3, 8).double()}, ("x", "(?i)double|float64")),
    ("x of another dtype", lambda: {"x": zeros(2, 3, 8).half()}, ("(?i)half|float16",)),
    ("weight of another width", lambda: {"weight": zeros(9)}, ("weight", r"\[9\]", r"\b8\b")),
    ("weight with two dimensions", lambda: {"weight": zeros(1, 8)}, ("weight", r"\[1, 8\]")),
    ("weight of another dtype", lambda: {"weight": zeros(8).bfloat16()}, ("weight", "(?i)bfloat16")),
    ("weight on another device", lambda: {"weight": meta(8)}, ("weight", "device")),
    ("bias of another width", lambda: {"bias": zeros(7)}, ("bias", r"\[7\]", r"\b8\b")),
    ("bias of another dtype", lambda: {"bias": zeros(8).half()}, ("bias", "(?i)half|float16")),
    ("residual of another shape", lambda: {"residual": zeros(3, 8)}, ("residual", r"\[3, 8\]", r"\[2, 3, 8\]")),
    ("residual of another dtype", lambda: {"residual": zeros(2, 3, 8).half()}, ("residual", "(?i)half|float16")),
    ("residual on another device", lambda: {"residual": meta(2, 3, 8)}, ("residual", "device")),
)
def test_layer_norm(change: Callable[[], Change], words: tuple[str, ...]) -> None:
    raises(ops.layer_norm, norm_arguments(), change(), *words)
