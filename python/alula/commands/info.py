"""Print what alula runs on: versions, instruction sets in use and available, threads, CUDA build, GPUs, environment."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

__all__ = ["add_arguments", "collect", "run"]

VARIABLES = ("ALULA_FORCE_ISA", "ALULA_LOG", "ALULA_SYNC", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `alula info`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print the report; returns the exit code."""
    report = collect()
    if args.json:
        print(json.dumps(report))
        return 0
    variables = report["environment"]
    rows = {
        "alula": report["alula"],
        "torch": report["torch"],
        "python": report["python"],
        "machine": report["machine"],
        "compiler": report["compiler"],
        "ISA in use": report["isa"],
        "ISA available": ", ".join(report["available_isas"]),
        "threads": f"{report['threads']} (of {report['cores']} cores)",
        "CUDA build": f"{report['cuda']} for {report['cuda_archs']}"
        if report["cuda"]
        else f"none: {report['cuda_reason']}",
        "GPUs": ", ".join(report["gpus"]) or f"none: {report['gpu_reason']}",
        "environment": " ".join(f"{name}={value}" for name, value in variables.items()) or "nothing set",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def collect() -> dict[str, Any]:
    """Return the report as a dictionary that JSON can hold."""
    import torch

    import alula
    from alula import (
        _C,
        _library,  # noqa: F401  (loads the op library)
    )

    build = dict(_C.build_info())
    gpus, gpu_reason = _gpus(torch)
    return {
        "alula": alula.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "compiler": build.get("compiler", "unknown"),
        "isa": _C.isa(),
        "available_isas": list(_C.available_isas()),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda": build.get("cuda"),
        "cuda_archs": build.get("cuda_archs"),
        "cuda_reason": build.get("cuda_reason"),
        "gpus": gpus,
        "gpu_reason": gpu_reason,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _gpus(torch: Any) -> tuple[list[str], str | None]:
    if torch.version.cuda is None:
        return [], "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return [], "torch finds no CUDA device"
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], None
