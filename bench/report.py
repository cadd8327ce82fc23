"""Results for people (a fixed-width table) and for programs (JSON lines), and progress on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Fixed-width text; the first column is set left, the others right. A row equal to () is a blank line."""
    widths = [max(len(row[i]) for row in [header, *filter(None, rows)]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *padded]).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) if row else "" for row in rows)])


def seconds(value: float) -> str:
    """A time with the unit that keeps three or four digits before and after the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            return f"{value / scale:.4g} {unit}"
    raise AssertionError("unreachable")


def share(value: float | None) -> str:
    """A share of a limit as per cent, `n/a` where the limit could not be measured."""
    return "n/a" if value is None else f"{100 * value:.0f} %"


def times(value: float | None) -> str:
    """A ratio, `-` where there is none."""
    return "-" if value is None else f"{value:.3f}"


def rate(value: float, unit: str) -> str:
    """A rate with its unit."""
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def phase(record: dict[str, Any]) -> str:
    """What a record of a model timed: a step, after how many tokens, or another phase."""
    is_step = record["phase"] == "decode" and "context" in record
    return f"decode @ {record['context']}" if is_step else record["phase"]


class Recorder:
    """Collects records, and writes each at once as a JSON line, so that an interrupted run keeps what it measured."""

    def __init__(self, path: Path | None) -> None:
        """path: the file to write (replaced if it exists), None for none."""
        self.records: list[dict[str, Any]] = []
        self._file = path.open("w") if path is not None else None

    def add(self, record: dict[str, Any]) -> None:
        """Keep one record and write it."""
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file that a Recorder wrote. ValueError names the line that is none."""
    records = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"{path}, line {number}: not a record of alula bench (an object with a `kind`)")
        records.append(record)
    return records


def progress(items: Iterable[Any], description: str, *, total: int | None = None) -> Iterator[Any]:
    """Iterate with a bar on standard error where that is a terminal and tqdm is installed."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            items = tqdm(items, desc=description, total=total, leave=False, file=sys.stderr)
    yield from items


def note(text: str) -> None:
    """One line to people on standard error."""
    print(text, file=sys.stderr, flush=True)
