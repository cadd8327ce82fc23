"""Which transformers this is, and whether it still has what the adapter relies on.

The releases in ``TESTED`` run the tests. Any other release from 4.57 on is probed: names and parameters that the
adapter calls or answers to are looked up, and what is missing is an error that names the release.
"""

from __future__ import annotations

import functools
import importlib
import inspect

import transformers

__all__ = ["TESTED", "VERSION", "check", "masks_big_bird_decoders", "parameters", "selects_hidden_states"]

TESTED = ("4.57.6", "5.17.0", "5.23.0")
OLDEST = (4, 57)
VERSION: str = transformers.__version__

# module: {object: parameters it must have}
_RELIED_ON: dict[str, dict[str, tuple[str, ...]]] = {
    "cache_utils": {
        "Cache": ("layers",),
        "DynamicCache": ("config",),
        "CacheLayerMixin": (),
        "DynamicLayer.update": ("key_states", "value_states"),
        "DynamicLayer.crop": (),
        "DynamicLayer.reorder_cache": ("beam_idx",),
        "DynamicLayer.batch_repeat_interleave": ("repeats",),
        "DynamicLayer.batch_select_indices": ("indices",),
        "StaticLayer": ("max_cache_len",),
        "StaticLayer.update": ("key_states", "value_states"),
        "EncoderDecoderCache": (),
    },
    "masking_utils": {
        "AttentionMaskInterface.register": (),
        "causal_mask_function": ("q_idx", "kv_idx"),
        "find_packed_sequence_indices": ("position_ids",),
        "sdpa_mask": (
            "batch_size",
            "kv_length",
            "kv_offset",
            "mask_function",
            "attention_mask",
            "allow_is_causal_skip",
        ),
    },
    "modeling_utils": {
        "AttentionInterface.register": (),
        "PreTrainedModel.get_output_embeddings": (),
    },
    "modeling_outputs": {
        "BaseModelOutputWithPast": ("last_hidden_state", "past_key_values", "hidden_states", "attentions"),
        "BaseModelOutputWithPastAndCrossAttentions": ("last_hidden_state", "past_key_values", "cross_attentions"),
        "BaseModelOutputWithPoolingAndCrossAttentions": ("last_hidden_state", "pooler_output", "cross_attentions"),
    },
    "pytorch_utils": {"Conv1D": ("nf", "nx")},
    "activations": {"ACT2FN": ()},
}
# What the forward of every family must take by these names.
FORWARD = (
    "input_ids",
    "past_key_values",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "use_cache",
)


def parameters(function: object) -> tuple[str, ...]:
    """Names of the parameters of a function or class, without ``self``."""
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


def number(version: str) -> tuple[int, ...]:
    """(major, minor) of a version string."""
    return tuple(int(part) for part in version.split(".")[:2])


def masks_big_bird_decoders() -> bool:
    """Whether a token of a BigBird decoder does not see later ones: 5.17 gives decoders the mask of an encoder."""
    from transformers.models.big_bird import modeling_big_bird

    return number(VERSION) < (5, 0) or hasattr(modeling_big_bird, "create_causal_mask")


def selects_hidden_states() -> bool:
    """Whether ``output_hidden_states`` may be indices, as 5.23 means them; elsewhere it is a flag."""
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return False
    return hasattr(output_capturing, "selected_hidden_states")


@functools.cache
def check() -> None:
    """Raises ImportError for a transformers that is too old, and RuntimeError for one that lacks what is relied on."""
    if number(VERSION) < OLDEST:
        raise ImportError(
            f"transformers {VERSION} is too old for alula.integrations.transformers; accepted: "
            f"{'.'.join(map(str, OLDEST))} or newer (tested with {', '.join(TESTED)})"
        )
    missing = problems()
    if missing:
        raise RuntimeError(
            f"transformers {VERSION} is not what alula.integrations.transformers was made for: {'; '.join(missing)}. "
            f"Tested with {', '.join(TESTED)}."
        )


def problems() -> list[str]:
    """What the installed transformers lacks, one sentence each."""
    found = []
    for module_name, objects in _RELIED_ON.items():
        try:
            module = importlib.import_module(f"transformers.{module_name}")
        except ImportError as error:
            found.append(f"transformers.{module_name} cannot be imported ({error})")
            continue
        for path, names in objects.items():
            target = module
            for part in path.split("."):
                target = getattr(target, part, None)
            if target is None:
                found.append(f"transformers.{module_name} has no {path}")
            else:
                found += _lacking(f"{module_name}.{path}", target, names)
    from alula.integrations.transformers import cache, families

    for layer in (cache.GrowingLayer, cache.FixedLayer):
        if inspect.isabstract(layer):
            found.append(f"cache layers need {', '.join(sorted(layer.__abstractmethods__))}")
    both = cache.EncoderDecoderCache(cache.DynamicCache(), cache.DynamicCache())
    for name in ("self_attention_cache", "cross_attention_cache", "is_updated"):
        if not hasattr(both, name):
            found.append(f"cache_utils.EncoderDecoderCache has no {name}")
    for family in families.FAMILIES:
        found += _lacking(f"{family.body.__name__}.forward", family.body.forward, FORWARD)
    found += _lacking("BigBirdAttention", families.FAMILIES[-1].parts[0], ("config", "seed"))
    return found


def _lacking(name: str, target: object, names: tuple[str, ...]) -> list[str]:
    have = parameters(target) if names else ()
    return [f"{name} has no parameter {wanted!r}" for wanted in names if wanted not in have]
