"""A text for calibrated quantization: which of its tokens a model is calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CALIBRATION_TOKENS", "calibration_ids"]

CALIBRATION_TOKENS = 16384
ROW = 512  # tokens of a text that stay together


def calibration_ids(tokenizer: Any, texts: Sequence[str], tokens: int = CALIBRATION_TOKENS) -> Tensor:
    """Token ids int64 [n] for ``model.quantize(calibration=...)``: pieces of 512 tokens, evenly spread over the texts,
    ``tokens`` in all, or all where there are not so many.

    Every text follows the tokenizer's begin-of-text (else end-of-text) token, as in
    :func:`alula.evaluation.bits_per_byte`. ValueError for texts without a token, and for ``tokens`` below 1.
    """
    if tokens < 1:
        raise ValueError(f"{tokens} calibration tokens; accepted: 1 and more")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        found = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ids += found if start is None or not found else [start, *found]
    if not ids:
        raise ValueError("the calibration text has no token")
    whole = torch.tensor(ids)
    if len(whole) <= tokens:
        return whole
    pieces = whole.split(ROW)
    count = -(-tokens // ROW)
    return torch.cat([pieces[i * len(pieces) // count] for i in range(count)])[:tokens]
