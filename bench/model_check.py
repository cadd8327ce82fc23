"""Whether an engine computes the model: its logits and greedy tokens against transformers eager in fp32.

The reference reads the engine's own tokens, so a search that took another way at a tie is judged on the way it took.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FP32_TOLERANCE = 2e-4  # absolute, on logits: alula in fp32
PEER_FP32_TOLERANCE = 2e-2  # peers keep keys and values, or tables of functions, in fp16
ALULA_FACTOR, PEER_FACTOR = 2.0, 4.0  # times the error of transformers in bf16
OURS = ("alula", "hf-alula")  # held to more than peers
HALF_ULP = {"fp32": 2.0**-24, "bf16": 2.0**-9}


@dataclass(frozen=True)
class Verdict:
    """max_error and tolerance are absolute, on logits; equal_tokens counts greedy tokens equal to the reference's."""

    correct: bool
    max_error: float
    tolerance: float
    equal_tokens: int
    tokens: int
    reason: str = ""


def tolerance(engine: str, dtype: str, bf16_error: float, largest_logit: float) -> float:
    """The error that is allowed.

    bf16_error: that of transformers eager in bf16 on the same weights; of quantized weights, what rounding them changes
    in transformers in fp32.
    """
    if dtype == "fp32":
        return FP32_TOLERANCE if engine in OURS else PEER_FP32_TOLERANCE
    factor = ALULA_FACTOR if engine in OURS else PEER_FACTOR
    return factor * bf16_error + HALF_ULP["bf16"] * largest_logit


def max_error(logits: np.ndarray, scored: np.ndarray) -> float:
    """Largest absolute difference; inf if a value is not finite."""
    if not np.isfinite(logits).all():
        return float("inf")
    return float(np.abs(logits - scored).max())


def judge(
    logits: np.ndarray, tokens: np.ndarray, scored: np.ndarray, reference_tokens: np.ndarray, allowed: float
) -> Verdict:
    """logits, scored: [steps + 1, B, V], the engine's and the reference's on the engine's tokens [steps + 1, B].

    Wrong if a logit is off by more than `allowed`, or if a greedy token is not the reference's best within the error
    that this permits (two logits, each off by `allowed`).
    """
    equal = int((tokens == reference_tokens).sum())
    if logits.shape != scored.shape:
        return Verdict(False, float("inf"), allowed, equal, tokens.size, f"shape {logits.shape}, not {scored.shape}")
    error = max_error(logits, scored)
    chosen = np.take_along_axis(scored, tokens[..., None], axis=-1)[..., 0]
    behind = float((scored.max(axis=-1) - chosen).max())
    reason = ""
    if not error <= allowed:
        reason = f"logits differ by {error:.3g} from transformers eager in fp32, allowed {allowed:.3g}"
    elif behind > 2 * allowed:
        reason = f"a greedy token is {behind:.3g} below the reference's best, allowed {2 * allowed:.3g}"
    return Verdict(not reason, error, allowed, equal, tokens.size, reason)
