"""Shapes chosen to break kernels (nothing, one, a tile and its neighbours, primes, odd), then those of real models.

The kernels work on tiles of 4, 6 or 12 rows x 32 output columns, vectors of 4, 8 or 16 lanes, pairs of K for
bfloat16, blocks of 192 or 384 of K, and at most 768 rows in one pass over the weights: a list has the numbers on both
sides of each. Every ISA runs the small lists; the real lists run on the best one.
"""

from __future__ import annotations

from typing import NamedTuple


class Linear(NamedTuple):
    """[rows, in_features] @ [out_features, in_features].T"""

    rows: int
    out_features: int
    in_features: int


class Attention(NamedTuple):
    """`tokens` new query tokens after `past` cached ones, for each of `batch` rows."""

    batch: int
    tokens: int
    past: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class Softmax(NamedTuple):
    """[rows..., tokens, keys] with two leading dimensions."""

    batch: int
    heads: int
    tokens: int
    keys: int


ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 24, 25, 37]
WEIGHTS = [(1, 1), (1, 17), (31, 2), (32, 3), (33, 16), (65, 31), (127, 65), (3, 1031)]  # (out, in)
HEAD_DIMS = [8, 16, 24, 64, 72, 80, 128, 256]

LINEAR = [
    *(Linear(rows, 33, 19) for rows in [0, *ROWS]),
    *(Linear(rows, 64, 48) for rows in (1, 12, 13)),
    *(Linear(1, *weight) for weight in WEIGHTS),
    *(Linear(13, *weight) for weight in WEIGHTS),
    *(Linear(5, 40, k) for k in (191, 192, 193, 255, 257, 383, 384, 385, 511, 513, 769, 1025)),
    Linear(97, 97, 97),
    Linear(130, 70, 515),
    Linear(769, 35, 9),
    Linear(1601, 2, 5),
]

# As in SantaCoder, StarCoder, tiny_starcoder_py and GPT-2 sized layers (of the widest a part), two output matrices.
LINEAR_REAL = [
    Linear(1, 896, 768),
    Linear(9, 3072, 768),
    Linear(3, 768, 3072),
    Linear(1, 3072, 1024),
    Linear(1, 2304, 2048),
    Linear(33, 2304, 2048),
    Linear(2, 4096, 2048),
    Linear(4, 1024, 8192),
    Linear(1, 1792, 6144),
    Linear(1, 49152, 768),
    Linear(2, 49280, 256),
    Linear(1, 50257, 768),
    Linear(13, 51200, 64),
    Linear(2, 50257, 160),
    Linear(1, 51200, 1024),
    Linear(1, 1024, 5120),
]

ATTENTION = [
    Attention(1, 1, 0, 1, 1, 8),
    Attention(2, 3, 0, 3, 1, 8),
    Attention(1, 7, 0, 5, 5, 16),
    Attention(3, 13, 0, 4, 2, 24),
    Attention(2, 33, 0, 3, 1, 64),
    Attention(1, 17, 5, 6, 3, 72),
    Attention(2, 1, 30, 5, 1, 80),
    Attention(1, 1, 31, 12, 12, 128),
    Attention(2, 1, 32, 16, 1, 128),
    Attention(1, 2, 63, 3, 3, 256),
    Attention(2, 4, 64, 20, 4, 16),
    Attention(1, 65, 0, 2, 1, 64),
    Attention(1, 31, 129, 2, 2, 8),
    Attention(1, 1, 257, 24, 1, 64),
    Attention(1, 127, 3, 1, 1, 256),
    Attention(1, 97, 31, 2, 1, 24),
    Attention(1, 331, 0, 4, 1, 8),  # enough rows for query tiles of the full 192
]

ATTENTION_REAL = [
    Attention(1, 1, 1023, 12, 1, 64),
    Attention(1, 129, 0, 12, 1, 64),
    Attention(8, 1, 255, 12, 1, 64),
    Attention(1, 128, 0, 16, 1, 128),
    Attention(1, 1, 2047, 16, 1, 128),
    Attention(1, 5, 300, 48, 1, 128),
    Attention(1, 40, 17, 12, 12, 64),
    Attention(1, 1, 700, 25, 25, 64),
    Attention(1, 3, 511, 32, 8, 128),
    Attention(1, 33, 100, 32, 32, 80),
    Attention(1, 2, 130, 16, 16, 256),
    Attention(1, 1, 300, 20, 20, 64),
    Attention(1, 17, 40, 24, 24, 256),
    Attention(1, 9, 60, 16, 16, 64),
    Attention(1, 5, 90, 12, 12, 128),
]

QKV = [  # (heads, kv heads, head_dim, width)
    (1, 1, 8, 8),
    (3, 1, 8, 24),
    (5, 5, 16, 80),
    (4, 2, 24, 96),
    (2, 1, 72, 31),
    (12, 1, 64, 768),
]

QKV_REAL = [
    (16, 1, 128, 2048),
    (12, 12, 64, 768),
    (25, 25, 64, 1600),
    (32, 8, 80, 512),
    (48, 1, 128, 256),
    *(
        (heads, heads, head_dim, width)
        for heads, head_dim, width in ((16, 64, 1024), (20, 64, 1280), (32, 80, 640), (16, 256, 512), (24, 256, 384))
    ),
]

SOFTMAX = [
    Softmax(1, 1, 1, 1),
    Softmax(2, 3, 4, 1),
    Softmax(1, 2, 3, 7),
    Softmax(1, 1, 5, 8),
    Softmax(2, 1, 5, 15),
    Softmax(1, 1, 16, 16),
    Softmax(1, 3, 17, 17),
    Softmax(1, 1, 2, 31),
    Softmax(1, 1, 3, 33),
    Softmax(1, 2, 9, 5),
    Softmax(2, 2, 3, 127),
    Softmax(1, 1, 2, 1021),
    Softmax(1, 1, 2, 10007),
]

SOFTMAX_REAL = [Softmax(1, 16, 65, 65), Softmax(2, 12, 1, 1024), Softmax(1, 48, 3, 2048), Softmax(1, 2, 129, 4096)]

NORM_WIDTHS = [1, 2, 7, 8, 15, 16, 17, 31, 33, 97, 1031]
NORM_WIDTHS_REAL = [768, 1024, 2048, 6144]
