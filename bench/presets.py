"""Models of published shapes: their configurations, their tensors, and the work of one token.

A family tells how many numbers a step reads and computes with; a preset is a configuration of a family. A further
family is one more entry of FAMILIES, a further model one more entry of PRESETS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a checkpoint: normal values around `mean` with deviation `std`."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


@dataclass(frozen=True)
class Family:
    """What the benchmark has to know about a `model_type`.

    tensors: every tensor of the checkpoint in groups: those outside the layers, then layer by layer.
    matrix_elements: weights that every token is multiplied with, without the language-model head.
    head_elements: weights of the language-model head.
    cache_elements: keys and values kept for one token.
    attention_width: H * D of all layers: a query-key pair costs 4 operations for each.
    """

    tensors: Callable[[Config], Iterator[list[TensorSpec]]]
    matrix_elements: Callable[[Config], int]
    head_elements: Callable[[Config], int]
    cache_elements: Callable[[Config], int]
    attention_width: Callable[[Config], int]


def _gpt_bigcode_qkv_rows(config: Config) -> int:
    width = config["n_embd"]
    return width + 2 * (width // config["n_head"] if config["multi_query"] else width)


def _norm(name: str, width: int) -> list[TensorSpec]:
    return [TensorSpec(f"{name}.weight", (width,), 0.1, 1.0), TensorSpec(f"{name}.bias", (width,), 0.1)]


def _dense(name: str, rows: int, columns: int, *, turned: bool = False, bias: bool = True) -> list[TensorSpec]:
    """A matrix that keeps activations near 1, so that layers outweigh the embedding and logits have a spread of about
    1; `turned`: stored as (in, out)."""
    shape = (columns, rows) if turned else (rows, columns)
    weight = TensorSpec(f"{name}.weight", shape, columns**-0.5)
    return [weight, TensorSpec(f"{name}.bias", (rows,), 0.02)] if bias else [weight]


def _gpt_tensors(config: Config, qkv_rows: int, turned: bool) -> Iterator[list[TensorSpec]]:
    """GPTBigCode and GPT-2, whose matrices lie the other way."""
    width, inner = config["n_embd"], config["n_inner"]
    yield [
        TensorSpec("transformer.wte.weight", (config["vocab_size"], width), width**-0.5),
        TensorSpec("transformer.wpe.weight", (config["n_positions"], width), width**-0.5),
        *_norm("transformer.ln_f", width),
    ]
    for layer in range(config["n_layer"]):
        start = f"transformer.h.{layer}"
        yield [
            *_norm(f"{start}.ln_1", width),
            *_dense(f"{start}.attn.c_attn", qkv_rows, width, turned=turned),
            *_dense(f"{start}.attn.c_proj", width, width, turned=turned),
            *_norm(f"{start}.ln_2", width),
            *_dense(f"{start}.mlp.c_fc", inner, width, turned=turned),
            *_dense(f"{start}.mlp.c_proj", width, inner, turned=turned),
        ]


def _codegen_tensors(config: Config) -> Iterator[list[TensorSpec]]:
    width, inner = config["n_embd"], config["n_inner"]
    yield [
        TensorSpec("transformer.wte.weight", (config["vocab_size"], width), width**-0.5),
        *_norm("transformer.ln_f", width),
        *_dense("lm_head", config["vocab_size"], width),
    ]
    for layer in range(config["n_layer"]):
        start = f"transformer.h.{layer}"
        yield [
            *_norm(f"{start}.ln_1", width),
            *_dense(f"{start}.attn.qkv_proj", 3 * width, width, bias=False),
            *_dense(f"{start}.attn.out_proj", width, width, bias=False),
            *_dense(f"{start}.mlp.fc_in", inner, width),
            *_dense(f"{start}.mlp.fc_out", width, inner),
        ]


def _big_bird_tensors(config: Config) -> Iterator[list[TensorSpec]]:
    """The encoder with its pooler and without a head."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    start = "bert.embeddings"
    yield [
        TensorSpec(f"{start}.word_embeddings.weight", (config["vocab_size"], width), 0.5),
        TensorSpec(f"{start}.position_embeddings.weight", (config["max_position_embeddings"], width), 0.5),
        TensorSpec(f"{start}.token_type_embeddings.weight", (config["type_vocab_size"], width), 0.5),
        *_norm(f"{start}.LayerNorm", width),
        *_dense("bert.pooler", width, width),
    ]
    for layer in range(config["num_hidden_layers"]):
        start = f"bert.encoder.layer.{layer}"
        yield [
            *(
                spec
                for name in ("query", "key", "value")
                for spec in _dense(f"{start}.attention.self.{name}", width, width)
            ),
            *_dense(f"{start}.attention.output.dense", width, width),
            *_norm(f"{start}.attention.output.LayerNorm", width),
            *_dense(f"{start}.intermediate.dense", inner, width),
            *_dense(f"{start}.output.dense", width, inner),
            *_norm(f"{start}.output.LayerNorm", width),
        ]


def _matrices(config: Config, qkv_rows: int) -> int:
    width, inner = config["n_embd"], config["n_inner"]
    return config["n_layer"] * width * (qkv_rows + width + 2 * inner)


def _multi_head(tensors: Callable[[Config], Iterator[list[TensorSpec]]]) -> Family:
    """A family with as many key/value heads as query heads."""
    return Family(
        tensors=tensors,
        matrix_elements=lambda config: _matrices(config, 3 * config["n_embd"]),
        head_elements=lambda config: config["vocab_size"] * config["n_embd"],
        cache_elements=lambda config: config["n_layer"] * 2 * config["n_embd"],
        attention_width=lambda config: config["n_layer"] * config["n_embd"],
    )


FAMILIES: dict[str, Family] = {
    "gpt_bigcode": Family(
        tensors=lambda config: _gpt_tensors(config, _gpt_bigcode_qkv_rows(config), turned=False),
        matrix_elements=lambda config: _matrices(config, _gpt_bigcode_qkv_rows(config)),
        head_elements=lambda config: config["vocab_size"] * config["n_embd"],
        cache_elements=lambda config: config["n_layer"] * (_gpt_bigcode_qkv_rows(config) - config["n_embd"]),
        attention_width=lambda config: config["n_layer"] * config["n_embd"],
    ),
    "gpt2": _multi_head(lambda config: _gpt_tensors(config, 3 * config["n_embd"], turned=True)),
    "codegen": _multi_head(_codegen_tensors),
    "big_bird": Family(
        tensors=_big_bird_tensors,
        matrix_elements=lambda config: (
            config["num_hidden_layers"]
            * config["hidden_size"]
            * (4 * config["hidden_size"] + 2 * config["intermediate_size"])
        ),
        head_elements=lambda config: 0,
        cache_elements=lambda config: 0,
        attention_width=lambda config: config["num_hidden_layers"] * config["hidden_size"],
    ),
}


def _decoder(model_type: str, cls: str, layers: int, width: int, heads: int, positions: int, vocabulary: int) -> Config:
    return {
        "model_type": model_type,
        "architectures": [cls],
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_inner": 4 * width,
        "n_positions": positions,
        "vocab_size": vocabulary,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
    }


def gpt_bigcode(
    layers: int, width: int, heads: int, positions: int, vocabulary: int, multi_query: bool = True
) -> Config:
    """A GPTBigCode configuration; the activation is one that every engine computes alike."""
    config = _decoder("gpt_bigcode", "GPTBigCodeForCausalLM", layers, width, heads, positions, vocabulary)
    return {**config, "multi_query": multi_query, "activation_function": "gelu_pytorch_tanh"}


def gpt2(layers: int, width: int, heads: int) -> Config:
    """A GPT-2 configuration."""
    return _decoder("gpt2", "GPT2LMHeadModel", layers, width, heads, 1024, 50257)


def codegen(layers: int, width: int, heads: int, rotary_dim: int) -> Config:
    """A CodeGen configuration."""
    config = _decoder("codegen", "CodeGenForCausalLM", layers, width, heads, 2048, 51200)
    return {**config, "rotary_dim": rotary_dim, "n_ctx": 2048, "tie_word_embeddings": False}


PRESETS: dict[str, Config] = {
    "santacoder": gpt_bigcode(24, 2048, 16, 2048, 49280),
    "starcoder": gpt_bigcode(40, 6144, 48, 8192, 49152),
    "tiny-starcoder": gpt_bigcode(20, 768, 12, 8192, 49152),
    "mqa-768": gpt_bigcode(12, 768, 12, 2048, 49152),
    "mha-768": gpt_bigcode(12, 768, 12, 2048, 49152, multi_query=False),
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    "codegen-350m": codegen(20, 1024, 16, 32),
    "codegen-2b": codegen(32, 2560, 32, 64),
    "toy": gpt_bigcode(2, 64, 4, 256, 512),
}


def big_bird(layers: int, width: int, heads: int, positions: int, vocabulary: int, block: int = 64) -> Config:
    """A BigBird encoder."""
    return {
        "model_type": "big_bird",
        "architectures": ["BigBirdModel"],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": positions,
        "vocab_size": vocabulary,
        "type_vocab_size": 2,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-12,
        "attention_type": "block_sparse",
        "block_size": block,
        "num_random_blocks": 3,
    }


# Encoders: the time of a whole forward is what counts.
ENCODERS: dict[str, Config] = {
    "bigbird-base": big_bird(12, 768, 12, 4096, 50358),
    "bigbird-large": big_bird(24, 1024, 16, 4096, 50358),
    "bigbird-toy": big_bird(2, 64, 4, 512, 512, 16),
}


def config_of(name: str) -> Config:
    """The configuration of a name of PRESETS or ENCODERS."""
    return ENCODERS[name] if name in ENCODERS else PRESETS[name]


def family(config: Config) -> Family:
    """The family of a configuration."""
    return FAMILIES[config["model_type"]]


def parameters(config: Config) -> int:
    """Numbers in the checkpoint; a tied head counts once."""
    total = 0
    for group in family(config).tensors(config):
        for spec in group:
            elements = 1
            for size in spec.shape:
                elements *= size
            total += elements
    return total


def step_bytes(config: Config, element_bytes: float, batch: int, context: int) -> int:
    """Bytes that one decode step must read: every matrix once, and the keys and values of `context` tokens a row (of
    quantized models in 16 bits)."""
    of = family(config)
    weights = of.matrix_elements(config) + of.head_elements(config)
    return int(element_bytes * weights + max(2, element_bytes) * batch * context * of.cache_elements(config))


def encoder_flops(config: Config, tokens: int, batch: int) -> int:
    """Operations of an encoder's forward: matrices, and the pairs of tokens that BigBird's pattern in evaluation makes
    (or all, for an input of at most (5 + 2 r) N tokens); a block that counts more than once is computed once."""
    of, size = family(config), config["block_size"]
    pairs = tokens * tokens
    if tokens > (5 + 2 * config["num_random_blocks"]) * size:
        blocks = -(-tokens // size)
        pairs = (2 * blocks + 2 * 4 + 5 * (blocks - 4)) * size * size
    return batch * (2 * tokens * of.matrix_elements(config) + 4 * pairs * of.attention_width(config))


def prefill_flops(config: Config, lengths: list[int]) -> int:
    """Operations that the cache and the last token's logits need, for prompts of these lengths: matrices, causal
    attention, the head for the last token. In the last block all tokens but the last need keys and values only; an
    engine that computes more for them does so in the same time, and its rate is the lower."""
    of = family(config)
    layers = config["n_layer"]
    block = of.matrix_elements(config) // layers
    keys_and_values = config["n_embd"] * of.cache_elements(config) // layers
    width = of.attention_width(config) // layers
    return sum(
        2 * length * ((layers - 1) * block + keys_and_values)
        + 2 * (block - keys_and_values)
        + 2 * length * (length + 1) * (layers - 1) * width
        + 4 * length * width
        + 2 * of.head_elements(config)
        for length in lengths
    )
