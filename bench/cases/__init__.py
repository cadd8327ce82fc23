"""The named cases of `alula bench ops`: one module for each op, `cases(quick)` in each."""

from __future__ import annotations

from collections.abc import Callable

from alula.bench.cases import (
    attention,
    block_sparse_attention,
    embedding,
    layer_norm,
    linear,
    qkv_projection,
    quantized_linear,
    scaled_masked_softmax,
)
from alula.bench.cases.case import Case

OPS: dict[str, Callable[[bool], list[Case]]] = {
    "linear": linear.cases,
    "quantized_linear": quantized_linear.cases,
    "qkv_projection": qkv_projection.cases,
    "attention": attention.cases,
    "block_sparse_attention": block_sparse_attention.cases,
    "scaled_masked_softmax": scaled_masked_softmax.cases,
    "layer_norm": layer_norm.cases,
    "embedding": embedding.cases,
}
