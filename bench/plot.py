"""`alula bench plot`: bar charts of results written with --json."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alula.bench import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `alula bench plot`."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results written with --json")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture to write")


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """0: written; 2: a file that holds no results, or matplotlib is not installed."""
    try:
        panels = collect([record for path in args.files for record in report.read_records(path)])
    except (OSError, ValueError) as error:
        report.note(f"alula bench plot: {error}")
        return 2
    if not panels:
        report.note("alula bench plot: no timed results in these files")
        return 2
    try:
        import matplotlib
    except ImportError:
        report.note("alula bench plot: matplotlib is not installed: pip install matplotlib")
        return 2
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [sum(len(group) for group in groups.values()) + len(groups) for groups, _ in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.24 * sum(bars) + 0.9 * len(panels)), height_ratios=bars, squeeze=False
    )
    for axis, (title, (groups, unit)) in zip(axes[:, 0], panels.items(), strict=True):
        draw(axis, title, groups, unit)
    figure.tight_layout()
    figure.savefig(args.out, dpi=150)
    print(f"{args.out}: {len(panels)} charts")
    return 0


def collect(records: list[dict[str, Any]]) -> dict[str, tuple[dict[str, list[tuple[str, float, float]]], str]]:
    """Title -> (group -> [(engine, value, half spread)], unit). Models by time, ops by the share of their limit."""
    panels: dict[str, tuple[dict[str, list[tuple[str, float, float]]], str]] = {}
    for record in records:
        if "median_s" not in record:
            continue
        half = (record["q75_s"] - record["q25_s"]) / 2
        if record["kind"] == "model":
            title = f"{record['preset']}, {record['phase']}"
            tokens = record["context"] if record["phase"] == "decode" else record["prompt_tokens"]
            group = f"{record['dtype']}, batch {record['batch']}, {tokens} tokens"
            entry, unit = (record["engine"], 1e3 * record["median_s"], 1e3 * half), "ms"
        elif record["limit_share"] is not None:
            title, group = record["op"], f"{record['case']} {record['dtype']}"
            value = 100 * record["limit_share"]
            entry, unit = (record["engine"], value, value * half / record["median_s"]), "% of the limit"
        else:
            continue
        panels.setdefault(title, ({}, unit))[0].setdefault(group, []).append(entry)
    return panels


def draw(axis: Any, title: str, groups: dict[str, list[tuple[str, float, float]]], unit: str) -> None:
    """One chart: a block of bars for each group, alula's set off by its colour."""
    at, ticks = 0, []
    for group, entries in groups.items():
        axis.text(0, at, f" {group}", va="center", fontsize=7, fontweight="bold")
        at += 1
        for engine, value, half in entries:
            axis.barh(at, value, xerr=half, height=0.8, color="#1b6ca8" if engine == "alula" else "#b8c4cc")
            axis.text(value + half, at, f" {value:.3g}", va="center", fontsize=7)
            ticks.append((at, engine))
            at += 1
    axis.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=7)
    axis.set_ylim(at - 0.4, -0.7)
    axis.set_xlabel(unit, fontsize=7)
    axis.set_title(title, fontsize=9, loc="left")
    axis.margins(x=0.08)
    axis.spines[["top", "right"]].set_visible(False)
