"""Small random decoder models, made alike in transformers and in alula."""

from __future__ import annotations

import functools
import random
from typing import Any

import alula
import torch
import transformers
from torch import Tensor, nn

TOLERANCE = 2e-4  # on logits in float32
HEAD_DIMS = (8, 16, 24, 40, 56, 64, 72, 80, 96, 120, 128, 136, 176, 200, 248, 256)
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu", "relu", "silu", "swish", "tanh")
FAMILIES = {"GPTBigCode": "gpt_bigcode", "GPT2": "gpt2", "CodeGen": "codegen"}  # start of class names -> model_type
LANGUAGE_MODELS = ("GPTBigCodeForCausalLM", "GPT2LMHeadModel", "CodeGenForCausalLM")


def random_values(seed: int, model_type: str = "gpt_bigcode", **fixed: Any) -> dict[str, Any]:
    """Configuration values that differ with the seed in everything that kernels or layouts depend on."""
    draw = random.Random(seed)
    head_dim = HEAD_DIMS[seed % len(HEAD_DIMS)]
    counts = (4, 8) if model_type == "codegen" else (1, 2, 3, 5, 7, 8)  # CodeGen has its heads in four shards
    heads = draw.choice([n for n in counts if n * head_dim <= 520 or n == 4])
    width = heads * head_dim
    values = {
        "vocab_size": draw.choice([31, 64, 97, 160, 257]),
        "n_positions": draw.choice([48, 64, 77]),
        "n_embd": width,
        "n_layer": draw.choice([1, 2, 3]),
        "n_head": heads,
        "n_inner": draw.choice([None, width, 2 * width + 6, 37]),
        "activation_function": ACTIVATIONS[(seed // 2) % len(ACTIVATIONS)],
        "layer_norm_epsilon": draw.choice([1e-5, 1e-6, 1e-3]),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if model_type == "codegen":
        values["rotary_dim"] = 2 * draw.randint(1, head_dim // 2)
        return {**values, **fixed}
    values["scale_attn_weights"] = draw.random() < 0.75
    flags = {
        "gpt_bigcode": ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
        "gpt2": ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    }
    for flag in flags[model_type]:
        values[flag] = draw.random() < 0.5
    if model_type == "gpt_bigcode":
        values["multi_query"] = draw.random() < 0.6
    values["tie_word_embeddings"] = draw.random() < 0.6
    return {**values, **fixed}


def randomise(model: nn.Module, seed: int) -> None:
    """Values that leave no bias zero and no norm trivial, with activations and logits of order one."""
    config = model.config
    unscaled = 1.0 if getattr(config, "scale_attn_weights", True) else (config.n_head / config.n_embd) ** 0.25
    inputs = {module: 0 for module in model.modules() if isinstance(module, transformers.pytorch_utils.Conv1D)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "ln_" in name:
                weight.copy_(0.2 * noise + name.endswith("weight"))
            elif name.endswith("bias"):
                weight.copy_(0.2 * noise)
            elif "wte" in name or "wpe" in name:
                weight.copy_(min(0.5, 4 * weight.shape[1] ** -0.5) * noise)
            else:
                fan_in = weight.shape[inputs.get(model.get_submodule(name.rpartition(".")[0]), 1)]
                weight.copy_((unscaled if "c_attn" in name else 1.0) * fan_in**-0.5 * noise)


@functools.lru_cache(maxsize=8)
def hf_model(seed: int, cls: str = "GPTBigCodeForCausalLM", **fixed: Any) -> Any:
    """A transformers model, eager attention, float32, evaluation mode."""
    model_type = next(kind for start, kind in FAMILIES.items() if cls.startswith(start))
    values = random_values(seed, model_type, **fixed)
    config = transformers.AutoConfig.for_model(model_type, **values, attn_implementation="eager")
    model = getattr(transformers, cls)(config).eval()
    randomise(model, seed)
    return model


def alula_model(reference: Any, dtype: torch.dtype = torch.float32, cls: Any = None) -> Any:
    """The same model in alula, through its state dict."""
    cls = cls or getattr(alula, type(reference).__name__)
    model = cls(cls.config_class(**reference.config.to_dict()), dtype=dtype, init_weights=False)
    model.load_state_dict(reference.state_dict())
    return model


def random_ids(model: Any, batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(4, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padding_mask(kind: str, batch: int, tokens: int) -> Tensor | None:
    """[batch, tokens] of the named kind, rows of different lengths, each with at least one token."""
    if kind == "none":
        return None
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    for row in range(batch):
        count = (3 * row) % (tokens - 1)
        if kind == "left":
            mask[row, :count] = 0
        elif kind == "right":
            mask[row, tokens - count :] = 0
        elif kind == "holes":
            mask[row, 1 + row :: 3] = 0
    return mask


def worst(ours: Tensor, reference: Tensor, real: Tensor | None = None) -> float:
    """Largest difference, over positions that are tokens ([B, T]) where a mask says so."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    difference = (ours.double() - reference.double()).abs()
    if real is not None:
        difference = difference[real.bool()]
    assert not difference.isnan().any()
    return difference.max().item()
