"""Small random BigBird models, made alike in transformers and in alula."""

from __future__ import annotations

import functools
import random
from typing import Any

import alula
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.big_bird import modeling_big_bird

# transformers 5.17 gives a BigBird decoder the mask of an encoder: its tokens see later ones.
HAS_CAUSAL_DECODER = transformers.__version__.startswith("4.") or hasattr(modeling_big_bird, "create_causal_mask")
needs_causal_decoder = pytest.mark.skipif(
    not HAS_CAUSAL_DECODER, reason=f"a BigBird decoder of transformers {transformers.__version__} is not causal"
)
TOLERANCE = 2e-4  # on hidden states, logits and losses in float32
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh", "tanh", "gelu_fast", "swish")
SEP, MASK = 66, 67
CLASSES = (
    "BigBirdModel",
    "BigBirdForPreTraining",
    "BigBirdForCausalLM",
    "BigBirdForMaskedLM",
    "BigBirdForSequenceClassification",
    "BigBirdForMultipleChoice",
    "BigBirdForTokenClassification",
    "BigBirdForQuestionAnswering",
)


def random_values(seed: int, **fixed: Any) -> dict[str, Any]:
    """Configuration values that differ with the seed in everything that kernels or layouts depend on."""
    draw = random.Random(seed)
    head_dim = (8, 16, 24, 32, 64, 40)[seed % 6]
    heads = draw.choice([n for n in (1, 2, 3, 5) if n * head_dim <= 130])
    values = {
        "vocab_size": draw.choice([97, 131, 160]),
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": heads,
        "intermediate_size": draw.choice([37, 64, 2 * heads * head_dim + 6]),
        "hidden_act": ACTIVATIONS[seed % len(ACTIVATIONS)],
        "hidden_dropout_prob": 0.0,  # transformers applies it in training mode
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 1100,
        "layer_norm_eps": draw.choice([1e-12, 1e-6]),
        "block_size": draw.choice([16, 16, 32]),
        "num_random_blocks": draw.choice([1, 2, 3]),
        "use_bias": draw.random() < 0.7,
        "rescale_embeddings": draw.random() < 0.3,
        "type_vocab_size": draw.choice([2, 3]),
        "tie_word_embeddings": draw.random() < 0.6,
    }
    return {**values, **fixed}


def switch(values: Any) -> int:
    """The longest input that gets full attention."""
    get = values.get if isinstance(values, dict) else functools.partial(getattr, values)
    return (5 + 2 * get("num_random_blocks")) * get("block_size")


def randomise(model: nn.Module, seed: int) -> None:
    """Values that leave no bias zero and no norm trivial, with activations and logits of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "LayerNorm" in name:
                weight.copy_(0.2 * noise + name.endswith("weight"))
            elif name.endswith("bias"):
                weight.copy_(0.2 * noise)
            elif "embeddings" in name:
                weight.copy_(min(0.5, 4 * weight.shape[1] ** -0.5) * noise)
            else:
                scale = 2.0 if ".self." in name else 1.0  # attention that is not flat
                weight.copy_(scale * weight.shape[1] ** -0.5 * noise)


@functools.lru_cache(maxsize=8)
def hf_model(seed: int, cls: str = "BigBirdModel", **fixed: Any) -> Any:
    """A transformers model, eager attention, float32, evaluation mode. It goes back to the attention type of its
    configuration in every call: see :func:`fresh`."""
    config = transformers.BigBirdConfig(**random_values(seed, **fixed), attn_implementation="eager")
    model = getattr(transformers, cls)(config).eval()
    randomise(model, seed)
    return model


def fresh(model: Any) -> Any:
    """The model with the attention type of its configuration, from which a short input makes it stray."""
    bert = getattr(model, "bert", model)
    if not model.config.add_cross_attention:
        bert.set_attention_type(model.config.attention_type)
    return model


def alula_model(reference: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same model in alula, through its state dict."""
    cls = getattr(alula, type(reference).__name__)
    model = cls(alula.BigBirdConfig(**{**reference.config.to_dict(), **changes}), dtype=dtype, init_weights=False)
    model.load_state_dict(reference.state_dict())
    return model


def random_ids(model: Any, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids without special ones; [SEP] once in every row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, model.config.vocab_size, (batch, tokens), generator=generator)
    ids[ids == SEP] = 5
    ids[torch.arange(batch), torch.arange(batch) % max(1, tokens // 2) + min(2, tokens - 1)] = SEP
    return ids


def padding_mask(kind: str, batch: int, tokens: int) -> Tensor | None:
    """[batch, tokens] of the named kind, rows of different lengths."""
    if kind == "none":
        return None
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    for row in range(batch):
        count = 1 + (5 + 23 * row) % (tokens - 2)
        if kind == "left":
            mask[row, :count] = 0
        elif kind == "right":
            mask[row, tokens - count :] = 0
        elif kind == "holes":
            mask[row, 1 + row :: 3] = 0
    return mask


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; what transformers leaves of its internal padding is cut off."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = (ours.double() - theirs.double()).abs()
    assert not difference.isnan().any()
    return difference.max().item()
