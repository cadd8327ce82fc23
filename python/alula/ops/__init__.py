"""The tensor ops of alula: one documented function per op, and for torch.compile, export and the meta device its shapes
and dtypes without data.

Each function checks that no gradient is asked for and calls ``torch.ops.alula.<op>``, whose C++ side checks shapes,
dtypes and devices and runs the kernel. The meaning of every op, in readable PyTorch, stands in
:mod:`alula.testing.reference`.

Alphabet: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head size, E model width,
N output features, K input features, V vocabulary, P positions.
"""

from alula.activations import ACTIVATIONS
from alula.ops.attention import attention
from alula.ops.block_sparse_attention import block_sparse_attention, block_sparse_probabilities
from alula.ops.cache_layers import cache_layers
from alula.ops.choose_token import RowState, choose_token
from alula.ops.decoder_blocks import DecoderBlocks
from alula.ops.embedding import embedding
from alula.ops.layer_norm import layer_norm
from alula.ops.linear import linear
from alula.ops.qkv_projection import qkv_projection
from alula.ops.quantize_columns import quantize_columns
from alula.ops.rotary import rotary, rotary_table
from alula.ops.scaled_masked_softmax import scaled_masked_softmax
from alula.packed_weight import PackedWeight, pack

__all__ = [
    "ACTIVATIONS",
    "DecoderBlocks",
    "PackedWeight",
    "RowState",
    "attention",
    "block_sparse_attention",
    "block_sparse_probabilities",
    "cache_layers",
    "choose_token",
    "embedding",
    "layer_norm",
    "linear",
    "pack",
    "qkv_projection",
    "quantize_columns",
    "rotary",
    "rotary_table",
    "scaled_masked_softmax",
]
