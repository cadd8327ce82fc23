"""The attention implementation "alula" for transformers' dispatch (GPT-2 and GPTBigCode), and the masks it asks for.

The single key/value head of a multi-query model is never expanded. Padding comes as the 2-D mask it is; a static cache,
packed sequences and masks of the caller's own come as 4-D ones.

CodeGen and BigBird have no dispatch. Where they ask for a mask, this name is refused; where they never look it up
(BigBird over blocks, both in 4.57) nothing can refuse it, and they run their own attention, to the same bits.

Alphabet: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from alula import ops
from alula.integrations.transformers.cache import merged_view

__all__ = ["NAME", "attention_forward", "attention_mask", "register"]

NAME = "alula"
_ELSEWHERE = {
    "codegen": "CodeGen has no attention dispatch",
    "big_bird": "BigBird has no attention dispatch",
}


def register() -> None:
    """Makes ``attn_implementation="alula"`` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    *args: Any,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that :func:`attention_forward` gets.

    None for plain causal attention, bool [B, S] where only padding departs from it, bool [B, 1, T, S] else. Called by
    transformers with ``q_length`` and ``q_offset`` (5.x) or ``cache_position`` (4.57).
    """
    model_type = getattr(config, "model_type", None)
    if model_type in _ELSEWHERE:
        raise ValueError(
            f'attn_implementation="{NAME}" cannot be used here: {_ELSEWHERE[model_type]}. Load the model with '
            f'attn_implementation="eager" and call alula.integrations.transformers.accelerate(model)'
        )
    full = kv_length if attention_mask is None else attention_mask.shape[1]
    if mask_function is causal_mask_function and full == kv_length and _ends_at(kv_length, args, kwargs):
        if attention_mask is None:
            return None
        if torch.compiler.is_compiling():
            return attention_mask
        return None if bool(attention_mask.all()) else attention_mask
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(
        batch_size,
        *args,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _ends_at(kv_length: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the last query is the last key: the cache holds nothing beyond (it is not a static one)."""
    columns = args[0] if args else kwargs.get("cache_position", kwargs.get("q_length"))
    if isinstance(columns, Tensor):  # 4.57: the columns of the queries
        if columns.dim() and columns.shape[0] == kv_length:
            return True
        return not torch.compiler.is_compiling() and int(columns.reshape(-1)[-1]) + 1 == kv_length
    offset = kwargs.get("q_offset", 0)
    return not isinstance(offset, Tensor) and offset + columns == kv_length


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    head_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        query: [B, H, T, D]. key, value: [B, G, S, D], G divides H; views of one merged cache are read where they are.
        attention_mask: what :func:`attention_mask` made, or 4-D, bool (True = visible) or floating point (added).
        scaling: multiplies the scores, default ``D ** -0.5``.

    Returns: ([B, T, H, D], None). RuntimeError for dropout and where a gradient is asked for.
    """
    if dropout:
        raise RuntimeError('attn_implementation="alula" has no dropout: call model.eval()')
    batch, heads, tokens, _ = query.shape
    length = key.shape[2]
    merged = None if torch.compiler.is_compiling() else merged_view(key, value)
    if merged is None:
        merged = torch.cat([key, value], dim=-1)
    causal = getattr(module, "is_causal", True) and not getattr(module, "is_cross_attention", False)
    if is_causal is not None and attention_mask is None:  # beside a mask, 4.57 says False whatever the mask holds
        causal = is_causal
    causal = causal and tokens > 1
    mask = None
    if attention_mask is not None and attention_mask.dim() == 4:
        mask, causal = attention_mask.expand(-1, -1, tokens, -1), False
        if mask.shape[3] < length:  # a mask that ends before the keys: the rest is not seen
            fill = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = F.pad(mask, (0, length - mask.shape[3]), value=fill)
    elif attention_mask is not None:
        mask = attention_mask.to(torch.bool)[:, None, None, :].expand(batch, 1, tokens, length)
    start = length - tokens if causal else 0  # where no limit is set, positions only say that there is no padding
    positions = torch.arange(start, start + tokens, dtype=torch.int32, device=query.device).expand(batch, tokens)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=query.device)
    weights = None
    if head_mask is not None:
        weights = head_mask.reshape(-1).float()
        if weights.shape[0] != heads:
            raise ValueError(f"head_mask has shape {list(head_mask.shape)}; accepted: one number a head")
    output = ops.attention(
        query.transpose(1, 2),
        merged,
        positions,
        lengths,
        scale=_scale(module, query) if scaling is None else scaling,
        causal=causal,
        mask=mask,
        head_mask=weights,
    )
    return output.view(batch, tokens, heads, -1), None


def _scale(module: nn.Module, query: Tensor) -> float:
    """The scale of GPT-2 in 4.57, which leaves it to the callee."""
    scale = query.shape[3] ** -0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale
