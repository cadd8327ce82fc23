"""Write a quantized copy of a model: a folder with the packed weights, which loads by memory map.

A table of the matrices, their bytes and their relative errors is printed. OUT must not exist yet; it appears when it is
complete. With --calibration the 4-bit formats choose their codes for what the matrices multiply on a text (GPTQ); take
text of the kind that the model is for, and none that it will be judged on.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from alula.commands import CommandError
from alula.commands.evaluate import progress, read_text
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
    add("--calibration", metavar="FILE", nargs="+", help="UTF-8 texts to choose 4-bit codes for; - is standard input")
    add(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="tokens of them, evenly spread (default: 16384, more for wide models)",
    )
    add("--json", action="store_true", help="print the table as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Quantize as asked; returns the exit code."""
    if args.quantize is None:
        raise CommandError("--format is missing; accepted: int8, int4, int4_asymmetric, nf4")
    if args.calibration is None and args.calibration_tokens is not None:
        raise CommandError("--calibration-tokens goes with --calibration FILE")
    if args.calibration_tokens is not None and args.calibration_tokens < 1:
        raise CommandError(f"--calibration-tokens {args.calibration_tokens}; accepted: 1 and more")
    if args.calibration is not None and args.quantize == "int8":
        raise CommandError("--calibration goes with int4, int4_asymmetric and nf4; int8 weights lose next to nothing")
    folder, out = model_folder(args.source, "IN"), Path(args.out)
    if os.path.lexists(out):
        raise CommandError(f"{out} exists; give a folder that does not exist yet")
    if not out.absolute().parent.is_dir():
        raise CommandError(f"{out.absolute().parent} is no folder; make it first")

    texts = [read_text(name, "--calibration") for name in args.calibration or ()]

    from alula.config import AutoConfig
    from alula.models.auto import class_of

    cls = class_of(AutoConfig.from_pretrained(folder))
    options = quantization_options(args)
    if texts:
        model = _calibrated(cls, folder, texts, args, options)
    else:
        model = cls.from_pretrained(folder, dtype=DTYPES[args.dtype], **options)
    unfinished = out.absolute().parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        model.save_pretrained(unfinished)
        for file in sorted({file for pattern in COPIED for file in folder.glob(pattern)}):
            if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
                shutil.copyfile(file, unfinished / file.name)
        os.rename(unfinished, out)
    except OSError as error:
        raise CommandError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report = model.quantization_report()
    print(report.to_json() if args.json else report)
    return 0


def _calibrated(cls: Any, folder: Path, texts: list[str], args: argparse.Namespace, options: dict[str, Any]) -> Any:
    from alula.calibration import CALIBRATION_TOKENS, calibration_ids
    from alula.models.matrix import matrices
    from alula.tokenization import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = cls.from_pretrained(folder, dtype=DTYPES[args.dtype])
    # As many tokens as the widest matrix has inputs are demanded.
    least = max((matrix.shape[1] for matrix in matrices(model)), default=0)
    ids = calibration_ids(tokenizer, texts, args.calibration_tokens or max(CALIBRATION_TOKENS, least))
    return model.quantize(
        options.pop("quantize"),
        **options,
        calibration=ids,
        progress=lambda matrices: progress(matrices, "calibrating", "matrix"),
    )
