"""Model configurations: Hugging Face's keys, defaults and aliases, a class per family."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from alula.pretrained_config import PretrainedConfig, parse_dtype, read_json, without_downloading

__all__ = [
    "AutoConfig",
    "BigBirdConfig",
    "CodeGenConfig",
    "GPT2Config",
    "GPTBigCodeConfig",
    "PretrainedConfig",
    "parse_dtype",
    "read_json",
    "without_downloading",
]

MAX_HEAD_DIM = 256


class DecoderConfig(PretrainedConfig):
    """What the decoder families share: GPT-2's names of the sizes, and their checks.

    Dropout rates are kept, and not applied. The head size, ``n_embd / n_head``, must be a multiple of 8 up to 256.
    """

    aliases: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    fields: ClassVar[dict[str, tuple[str, Any]]] = {
        "vocab_size": ("count", 50257),
        "n_positions": ("positions", 1024),
        "n_embd": ("count", 768),
        "n_layer": ("count", 12),
        "n_head": ("count", 12),
        "n_inner": ("count?", None),
        "activation_function": ("activation", "gelu_new"),
        "resid_pdrop": ("rate", 0.1),
        "embd_pdrop": ("rate", 0.1),
        "attn_pdrop": ("rate", 0.1),
        "layer_norm_epsilon": ("positive", 1e-5),
        "initializer_range": ("scale", 0.02),
        "bos_token_id": ("id?", 50256),
        "eos_token_id": ("ids?", 50256),
    }

    @property
    def head_dim(self) -> int:
        """D, the size of one head."""
        return self.n_embd // self.n_head

    @property
    def num_key_value_heads(self) -> int:
        """G: 1 for multi-query attention, H otherwise."""
        return self.n_head

    @property
    def intermediate_size(self) -> int:
        """F, the width of the MLP: ``n_inner``, or 4 * n_embd where that is null."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def validate(self) -> None:
        super().validate()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head size n_embd / n_head = {self.n_embd} / {self.n_head} = {self.head_dim} is not supported; "
                f"accepted: a multiple of 8 up to {MAX_HEAD_DIM}"
            )


class GPTBigCodeConfig(DecoderConfig):
    """GPTBigCode: SantaCoder, StarCoder, tiny_starcoder_py. Keys and defaults are Hugging Face's.

    ``attention_softmax_in_fp32`` and ``scale_attention_softmax_in_fp32`` change nothing: scores and softmax are always
    float32. Cross-attention (``add_cross_attention``) is refused with multi-query attention.
    """

    model_type = "gpt_bigcode"
    fields: ClassVar[dict[str, tuple[str, Any]]] = {
        **DecoderConfig.fields,
        "activation_function": ("activation", "gelu_pytorch_tanh"),
        "scale_attn_weights": ("bool", True),
        "attention_softmax_in_fp32": ("bool", True),
        "scale_attention_softmax_in_fp32": ("bool", True),
        "multi_query": ("bool", True),
        "add_cross_attention": ("bool", False),
    }

    @property
    def num_key_value_heads(self) -> int:
        """G: 1 for multi-query attention, H otherwise."""
        return 1 if self.multi_query else self.n_head

    def validate(self) -> None:
        super().validate()
        if self.add_cross_attention and self.multi_query:
            raise ValueError("add_cross_attention=True is not supported with multi-query attention; accepted: false")

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> GPTBigCodeConfig:
        return super().from_dict(_from_santacoder(values), **overrides)


class GPT2Config(DecoderConfig):
    """GPT-2. Keys and defaults are Hugging Face's.

    ``scale_attn_by_inverse_layer_idx`` divides the scores of block i by i + 1. ``reorder_and_upcast_attn`` changes
    nothing: scores and softmax are always float32. The ``summary_*`` keys shape the second head of
    :class:`alula.models.GPT2DoubleHeadsModel`.
    """

    model_type = "gpt2"
    fields: ClassVar[dict[str, tuple[str, Any]]] = {
        **DecoderConfig.fields,
        "scale_attn_weights": ("bool", True),
        "scale_attn_by_inverse_layer_idx": ("bool", False),
        "reorder_and_upcast_attn": ("bool", False),
        "add_cross_attention": ("bool", False),
        "summary_type": ("summary", "cls_index"),
        "summary_use_proj": ("bool", True),
        "summary_activation": ("activation?", None),
        "summary_proj_to_labels": ("bool", True),
        "summary_first_dropout": ("rate", 0.1),
    }

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> GPT2Config:
        if is_santacoder_original(values):
            raise ValueError("attention_head_type is a key of SantaCoder's original files; load them as GPTBigCode")
        return super().from_dict(values, **overrides)


class CodeGenConfig(DecoderConfig):
    """CodeGen. Keys and defaults are Hugging Face's, but for one.

    ``num_shards`` is how many pieces the checkpoint's ``qkv_proj`` comes in, each with the query, value and key rows of
    its share of the heads: 4 for CodeGen (as in transformers), 8 for CodeGen2. Nothing in a CodeGen2 checkpoint says
    so: give ``num_shards=8`` to ``from_pretrained``, or put it into config.json. ``rotary_dim`` is even and at most the
    head size. ``n_ctx`` changes nothing, here as there.
    """

    model_type = "codegen"
    fields: ClassVar[dict[str, tuple[str, Any]]] = {
        **DecoderConfig.fields,
        "vocab_size": ("count", 50400),
        "n_positions": ("positions", 2048),
        "n_ctx": ("count", 2048),
        "n_embd": ("count", 4096),
        "n_layer": ("count", 28),
        "n_head": ("count", 16),
        "rotary_dim": ("count", 64),
        "resid_pdrop": ("rate", 0.0),
        "embd_pdrop": ("rate", 0.0),
        "attn_pdrop": ("rate", 0.0),
        "tie_word_embeddings": ("bool", False),
        "num_shards": ("count", 4),
    }

    def validate(self) -> None:
        super().validate()
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} does not fit the head size {self.head_dim}; accepted: an even number up "
                "to the head size"
            )
        if self.n_embd % self.num_shards or self.n_head % self.num_shards:
            raise ValueError(
                f"n_embd={self.n_embd} and n_head={self.n_head} are not both divisible by "
                f"num_shards={self.num_shards}, the pieces of the query, value and key projection"
            )


class BigBirdConfig(PretrainedConfig):
    """BigBird. Keys and defaults are Hugging Face's.

    ``attention_type`` is "block_sparse" or "original_full". Where it is the first, inputs of at most
    :attr:`max_full_tokens` tokens get full attention all the same, which is decided in every call; ``sticky=True`` (a
    key of alula's own) keeps to full attention from the first such input on, as transformers does. Dropout rates are
    kept, and not applied. The head size must be a multiple of 8 up to 256, ``block_size`` a power of two.
    """

    model_type = "big_bird"
    fields: ClassVar[dict[str, tuple[str, Any]]] = {
        "vocab_size": ("count", 50358),
        "hidden_size": ("count", 768),
        "num_hidden_layers": ("count", 12),
        "num_attention_heads": ("count", 12),
        "intermediate_size": ("count", 3072),
        "hidden_act": ("activation", "gelu_new"),
        "hidden_dropout_prob": ("rate", 0.1),
        "attention_probs_dropout_prob": ("rate", 0.1),
        "max_position_embeddings": ("positions", 4096),
        "type_vocab_size": ("count", 2),
        "initializer_range": ("scale", 0.02),
        "layer_norm_eps": ("positive", 1e-12),
        "pad_token_id": ("id?", 0),
        "bos_token_id": ("id?", 1),
        "eos_token_id": ("ids?", 2),
        "sep_token_id": ("id?", 66),
        "attention_type": ("attention", "block_sparse"),
        "use_bias": ("bool", True),
        "rescale_embeddings": ("bool", False),
        "block_size": ("count", 64),
        "num_random_blocks": ("count or 0", 3),
        "classifier_dropout": ("rate?", None),
        "is_decoder": ("bool", False),
        "add_cross_attention": ("bool", False),
        "sticky": ("bool", False),
    }

    @property
    def head_dim(self) -> int:
        """D, the size of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """G: as many as query heads."""
        return self.num_attention_heads

    @property
    def max_full_tokens(self) -> int:
        """The longest input that gets full attention although ``attention_type`` is "block_sparse"."""
        return (5 + 2 * self.num_random_blocks) * self.block_size

    def validate(self) -> None:
        super().validate()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head size hidden_size / num_attention_heads = {self.hidden_size} / {self.num_attention_heads} = "
                f"{self.head_dim} is not supported; accepted: a multiple of 8 up to {MAX_HEAD_DIM}"
            )
        if self.attention_type == "block_sparse" and self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size} is not supported; accepted: a power of two, such as 64")
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("add_cross_attention=True needs is_decoder=True")

    def to_dict(self) -> dict[str, Any]:
        """Every key, known and unknown, as it goes into config.json; ``sticky`` only where it is true."""
        values = super().to_dict()
        if not self.sticky:
            del values["sticky"]
        return values


def is_santacoder_original(values: dict[str, Any]) -> bool:
    """Whether a config.json is of bigcode/santacoder's original custom code: GPT-2 with an attention head type."""
    return values.get("model_type") == "gpt2" and "attention_head_type" in values


def _from_santacoder(values: dict[str, Any]) -> dict[str, Any]:
    """The original SantaCoder configuration under GPTBigCode's keys; any other configuration as it is."""
    if not is_santacoder_original(values):
        return values
    values = dict(values)
    head_type = values.pop("attention_head_type")
    if head_type != "multiquery":
        raise ValueError(f"attention_head_type={head_type!r} of an original SantaCoder; accepted: 'multiquery'")
    if values.pop("scale_attn_by_inverse_layer_idx", False):
        raise ValueError("scale_attn_by_inverse_layer_idx=true is not supported in an original SantaCoder")
    for name in ("auto_map", "architectures", "reorder_and_upcast_attn"):
        values.pop(name, None)
    return {**values, "model_type": GPTBigCodeConfig.model_type, "multi_query": True}


CONFIG_CLASSES: dict[str, type[PretrainedConfig]] = {
    cls.model_type: cls for cls in (GPTBigCodeConfig, GPT2Config, CodeGenConfig, BigBirdConfig)
}


class AutoConfig:
    """Makes the configuration class that ``model_type`` names."""

    @staticmethod
    def for_model(model_type: str, **kwargs: Any) -> PretrainedConfig:
        if model_type not in CONFIG_CLASSES:
            raise ValueError(f"unknown model_type {model_type!r}; accepted: {', '.join(CONFIG_CLASSES)}")
        return CONFIG_CLASSES[model_type](**kwargs)

    @staticmethod
    def from_pretrained(path: str | os.PathLike, **overrides: Any) -> PretrainedConfig:
        """Reads config.json from a folder (or the file itself) into the class of its ``model_type``."""
        values = PretrainedConfig.get_config_dict(path)
        model_type = "gpt_bigcode" if is_santacoder_original(values) else values.get("model_type")
        if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
            what = f"has model_type {model_type!r}" if model_type else "names no model_type"
            raise ValueError(f"{path}: config.json {what}; accepted: {', '.join(CONFIG_CLASSES)}")
        return CONFIG_CLASSES[model_type].from_dict(values, **without_downloading(overrides))
