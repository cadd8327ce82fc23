"""The options that say how a model is loaded, which several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from alula.commands import CommandError

__all__ = ["add_quantization_arguments", "quantization_options"]

FORMATS = ("int8", "int4", "int4_asymmetric", "nf4")


def add_quantization_arguments(parser: argparse.ArgumentParser, option: str = "--quantize") -> None:
    """Add the options that choose a format; `option` is what the format itself is called."""
    add = parser.add_argument
    add(option, dest="quantize", choices=FORMATS, metavar="FORMAT", help="int8, int4, int4_asymmetric or nf4")
    add("--group-size", type=int, metavar="G", help="weights that share a scale: 32, 64 (default) or 128; 4-bit only")
    add("--keep", action="append", metavar="NAME", help="leave this module as it is (lm_head, embeddings, ...); repeat")
    add("--activations", choices=("int8", "full"), help="int8 (default) is faster, full more accurate")


def quantization_options(args: argparse.Namespace) -> dict[str, Any]:
    """What from_pretrained takes of them. CommandError for options that go with a format where there is none."""
    if args.quantize is None:
        for name in ("group_size", "keep"):
            if getattr(args, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} goes with --quantize FORMAT")
    options = {name: getattr(args, name) for name in ("quantize", "group_size", "keep", "activations")}
    return {name: value for name, value in options.items() if value is not None}
