"""`alula bench cuda`: ops and models on a GPU, in turn with PyTorch's own and with transformers.

Each op is first compared with the peer's result; a case that differs is reported and not timed. Times are of the GPU
(events), the median of rounds in which all contestants take turns, over copies of the operands that together exceed the
second-level cache, and are given as a share of what the GPU was seen to do. Of models, prefill and decoding are timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from alula.bench.cuda import attention, block_sparse, models, products, quantized
from alula.bench.cuda.timing import Bench, line_of, measure
from alula.devices import why_no_gpu

MAKERS = (  # where time ends early, the last are missing; peers of block_sparse and prefill take long to compile
    attention.decode_cases,
    products.softmax_cases,
    products.norm_cases,
    products.rotary_cases,
    products.linear_cases,
    block_sparse.cases,
    attention.prefill_cases,
    quantized.cases,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `alula bench cuda`."""
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON, after each case")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case (default %(default)s)")
    parser.add_argument(
        "--filter", default="", help="only cases and models whose name contains this; starcoder only so"
    )
    parser.add_argument("--parts", choices=("all", "ops", "models"), default="all", help="(default %(default)s)")
    parser.add_argument("--device", default="cuda", help="of the tensors (default %(default)s); cpu needs --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not how fast it is")
    parser.add_argument("--seconds", type=float, default=600.0, help="no case begins after (default %(default)s)")


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Print the table; returns the exit status: 1 where a result was wrong."""
    device = torch.device(args.device)
    if device.type == "cuda" and why_no_gpu():
        print(f"alula bench cuda needs a GPU; {why_no_gpu()}")
        return 2
    if device.type != "cuda" and not args.quick:
        print(f"on {device} only --quick is of use")
        return 2
    bench, end = Bench(device, args.quick), time.monotonic() + args.seconds
    name = torch.cuda.get_device_name(device) if bench.is_gpu else "CPU (a dry run)"
    results: dict[str, Any] = {"device": name, "command": argv, "cases": [], "models": []}

    def keep(part: str = "", row: dict[str, Any] | None = None) -> None:
        """At once: whoever is stopped has what was seen."""
        if row:
            results[part].append(row)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")

    with torch.inference_mode():
        limits = results["limits"] = bench.limits()
        print(f"{name}, torch {torch.__version__}: {limits}", flush=True)
        keep()
        if args.parts != "models":
            for row in _ops(bench, args, limits, end):
                keep("cases", row)
    if args.parts != "ops":
        for row in models.run(bench, args.filter, limits, end):
            keep("models", row)
    return 1 if any(row.get("wrong") for row in (*results["cases"], *results["models"])) else 0


def _ops(bench: Bench, args: argparse.Namespace, limits: dict[str, float], end: float) -> Iterator[dict[str, Any]]:
    for make in MAKERS:
        if time.monotonic() > end:
            return
        try:
            cases = make(bench)
        except Exception as error:
            row = {"case": make.__name__, "wrong": f"could not be made: {type(error).__name__}: {error}"[:500]}
            print(line_of(row), flush=True)
            yield row
            continue
        for case in cases:
            if args.filter not in case.name or time.monotonic() > end:
                continue
            try:
                row = measure(bench, case, args.rounds, limits)
            except Exception as error:  # one case that fails does not keep the others from running
                row = {"case": case.name, "wrong": f"{type(error).__name__}: {error}"[:500]}
            print(line_of(row), flush=True)
            yield row
        bench.forget()
