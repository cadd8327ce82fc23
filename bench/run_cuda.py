"""`alula bench cuda`: ops and models on a GPU, in turn with PyTorch's own and with transformers.

Each op is first compared with the peer's result; a case that differs is reported and not timed. Times are of the GPU
(events), the median of rounds in which all contestants take turns, over copies of the operands that together exceed the
second-level cache, and are given as a share of what the GPU was seen to do. Of models, prefill and decoding are timed.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from alula.bench.cuda import attention, block_sparse, models, products, quantized
from alula.bench.cuda.timing import Bench, line_of, measure
from alula.devices import why_no_gpu

MAKERS = (
    products.norm_cases,
    products.softmax_cases,
    products.linear_cases,
    quantized.cases,
    attention.decode_cases,
    attention.prefill_cases,
    block_sparse.cases,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `alula bench cuda`."""
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case (default %(default)s)")
    parser.add_argument("--filter", default="", help="only cases and models whose name contains this")
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
    with torch.inference_mode():
        limits = results["limits"] = bench.limits()
        print(f"{name}, torch {torch.__version__}: {limits}")
        if args.parts != "models":
            results["cases"] = _ops(bench, args, limits, end)
    if args.parts != "ops":
        results["models"] = models.run(bench, args.filter, limits, end)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    return 1 if any(row.get("wrong") for row in (*results["cases"], *results["models"])) else 0


def _ops(bench: Bench, args: argparse.Namespace, limits: dict[str, float], end: float) -> list[dict[str, Any]]:
    rows = []
    for make in MAKERS:
        try:
            cases = make(bench)
        except (RuntimeError, ImportError) as error:
            rows.append({"case": make.__name__, "wrong": f"could not be made: {error}"})
            print(line_of(rows[-1]))
            continue
        for case in cases:
            if args.filter not in case.name or time.monotonic() > end:
                continue
            try:
                rows.append(measure(bench, case, args.rounds, limits))
            except RuntimeError as error:  # one case that fails does not keep the others from running
                rows.append({"case": case.name, "wrong": str(error)[:500]})
            print(line_of(rows[-1]), flush=True)
        bench.forget()
    return rows
