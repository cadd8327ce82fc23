"""What a figure was taken on: processor, memory, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from alula.limits import last_level_cache_bytes

# Instruction sets that the kernels of alula or of a peer choose by.
NOTED_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES = ("transformers", "llama-cpp-python", "ctranslate2", "openvino", "optimum-intel", "numpy")


def describe(threads: int, argv: list[str]) -> dict[str, Any]:
    """The header record of a run: everything that a figure needs beside itself."""
    import alula
    import torch

    return {
        "kind": "run",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["alula", "bench", *(os.path.basename(arg) if os.path.isabs(arg) else arg for arg in argv)],
        "machine": processor(),
        "threads": threads,
        "versions": {
            "alula": getattr(alula, "__version__", "unknown"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version for name in PACKAGES if (version := package_version(name))},
        },
        "isa": _isa(),
        "commit": commit(),
    }


def processor() -> dict[str, Any]:
    """Model name, cores, the noted instruction sets, last-level cache and memory of this machine."""
    fields = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "family_model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "cores": os.cpu_count(),
        "flags": [flag for flag in NOTED_FLAGS if flag in flags],
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo does not say MemAvailable")


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the working tree that this package lies in, `+changes` if it differs; `unknown` outside one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != here.parent:
            return "unknown"  # installed inside somebody else's repository
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def one_line(record: dict[str, Any]) -> str:
    """The header record for people: the line above a table."""
    machine, versions = record["machine"], record["versions"]
    return (
        f"{machine['cpu']} ({machine['family_model']}), {machine['cores']} cores, {record['threads']} threads, "
        f"isa {record['isa']}, torch {versions['torch']}, alula {versions['alula']}, commit {record['commit']}, "
        f"python {sys.version_info.major}.{sys.version_info.minor}"
    )


def _isa() -> str:
    try:
        from alula import _C
    except ImportError:
        return "unknown"
    return _C.isa()
