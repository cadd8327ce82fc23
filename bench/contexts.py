"""`alula bench model --context N,M`: how much longer a step takes after many tokens than after few."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each engine and further context: the time of its steps as a multiple of that after the first context,
    the median over the rounds, each against its neighbour in time."""
    lines, first = [], {}
    for record in records:
        if record["phase"] != "decode" or "round_medians_s" not in record:
            continue
        base = first.setdefault(record["engine"], record)
        if base is not record:
            pairs = zip(record["round_medians_s"], base["round_medians_s"], strict=True)
            ratio = statistics.median(longer / shorter for longer, shorter in pairs)
            lines.append(
                f"{record['engine']}: a step after {record['context']} tokens takes {ratio:.3f} x the time of one "
                f"after {base['context']}"
            )
    return lines
