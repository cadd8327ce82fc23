"""Write a quantized copy of a model: a folder with the packed weights, which loads by memory map.

A table of the matrices, their bytes and their relative errors is printed. OUT must not exist yet; it appears when it is
complete.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from alula.commands import CommandError
from alula.commands.generate import DTYPES, model_folder
from alula.commands.loading import add_quantization_arguments, quantization_options

__all__ = ["add_arguments", "run"]

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
NOT_COPIED = ("config.json", "*.index.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alula quantize`."""
    add = parser.add_argument
    add("source", metavar="IN", help="folder of a model in Hugging Face format")
    add("out", metavar="OUT", help="folder to write; it must not exist")
    add_quantization_arguments(parser, "--format")
    add(
        "--dtype", choices=DTYPES, default="auto", metavar="DTYPE", help="of what is not quantized (default: as stored)"
    )
    add("--json", action="store_true", help="print the table as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Quantize as asked; returns the exit code."""
    if args.quantize is None:
        raise CommandError("--format is missing; accepted: int8, int4, int4_asymmetric, nf4")
    folder, out = model_folder(args.source), Path(args.out)
    if os.path.lexists(out):
        raise CommandError(f"{out} exists; give a folder that does not exist yet")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"{out.absolute().parent} is no folder; make it first")

    from alula.config import AutoConfig
    from alula.models.auto import class_of

    cls = class_of(AutoConfig.from_pretrained(folder))
    model = cls.from_pretrained(folder, dtype=DTYPES[args.dtype], **quantization_options(args))
    unfinished = out.absolute().parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        model.save_pretrained(unfinished)
        for file in sorted({file for pattern in COPIED for file in folder.glob(pattern)}):
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, unfinished / file.name)
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report = model.quantization_report()
    print(report.to_json() if args.json else report)
    return 0
