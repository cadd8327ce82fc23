"""`alula bench model --through transformers`: a model of transformers, plain and accelerated by alula."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from alula.bench import report

ACCELERATED, OWN = "hf-alula", "alula"


def engine_names(config: dict[str, Any], is_encoder: bool) -> list[str]:
    """The accelerated engine, and the plain one in the fastest attention that it has."""
    without_sdpa = is_encoder or config["model_type"] == "codegen"
    return [ACCELERATED, "hf-eager" if without_sdpa else "hf-sdpa"]


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each phase and engine: the accelerated model's speed as a multiple of the engine's, the median over
    the rounds, each against its neighbour in time."""
    lines = []
    timed = [record for record in records if "round_medians_s" in record]
    for ours in (record for record in timed if record["engine"] == ACCELERATED):
        for other in timed:
            if other["engine"] == ACCELERATED or any(other.get(key) != ours.get(key) for key in ("phase", "context")):
                continue
            pairs = zip(other["round_medians_s"], ours["round_medians_s"], strict=True)
            ratio = statistics.median(theirs / mine for theirs, mine in pairs)
            name = "alula's own class" if other["engine"] == OWN else f"{other['engine']}, plain"
            lines.append(f"{report.phase(ours)}: accelerated runs at {ratio:.2f} x the speed of {name}")
    return lines
