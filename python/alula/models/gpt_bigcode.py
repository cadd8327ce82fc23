"""GPTBigCode: SantaCoder, StarCoder and their kin. Multi-query or multi-head attention, learned positions."""

from __future__ import annotations

import re
from typing import ClassVar

import torch

from alula.config import GPTBigCodeConfig
from alula.models.decoder import DecoderPreTrainedModel
from alula.models.gpt import GPTForCausalLM, GPTForSequenceClassification, GPTForTokenClassification, GPTModel
from alula.models.layers import QKV
from alula.models.santacoder import SantaCoderSource, is_santacoder
from alula.weights import TensorSource

__all__ = [
    "GPTBigCodeForCausalLM",
    "GPTBigCodeForSequenceClassification",
    "GPTBigCodeForTokenClassification",
    "GPTBigCodeModel",
    "GPTBigCodePreTrainedModel",
]


class GPTBigCodePreTrainedModel(DecoderPreTrainedModel):
    """What the four classes share: configuration, old buffers, SantaCoder's layout."""

    config: GPTBigCodeConfig
    config_class = GPTBigCodeConfig
    ignored_tensors: ClassVar[re.Pattern[str]] = re.compile(r"bias|h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")
    residual_projections = ("c_proj.weight",)

    def checkpoint_view(self, source: TensorSource) -> TensorSource:
        return SantaCoderSource(source) if is_santacoder(source) else source


class GPTBigCodeModel(GPTModel, GPTBigCodePreTrainedModel):
    """The blocks without a head."""

    def make_qkv(self, config: GPTBigCodeConfig, dtype: torch.dtype) -> QKV:
        kv_heads = config.num_key_value_heads
        return QKV(config.n_embd, config.n_head, kv_heads, config.head_dim, dtype, interleaved=not config.multi_query)


class GPTBigCodeForCausalLM(GPTForCausalLM, GPTBigCodePreTrainedModel):
    """Language model: logits over the vocabulary, from the embedding table where ``tie_word_embeddings``."""

    model_class = GPTBigCodeModel


class GPTBigCodeForSequenceClassification(GPTForSequenceClassification, GPTBigCodePreTrainedModel):
    """``score`` [num_labels, E] at the last token that is not ``pad_token_id``."""

    model_class = GPTBigCodeModel


class GPTBigCodeForTokenClassification(GPTForTokenClassification, GPTBigCodePreTrainedModel):
    """``classifier`` [num_labels, E] with bias, at every token."""

    model_class = GPTBigCodeModel
