"""Say how well a model predicts texts, in bits per byte, to compare models and formats of weights.

Each text is read left to right in windows that overlap; every token is scored once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alula.commands import CommandError
from alula.commands.generate import DTYPES, decode_input, model_folder
from alula.commands.loading import add_quantization_arguments, quantization_options

__all__ = ["add_arguments", "progress", "read_text", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alula evaluate`."""
    add = parser.add_argument
    add("--model", metavar="PATH", help="folder in Hugging Face format (default: the small model inside alula)")
    add(
        "--text",
        metavar="FILE",
        nargs="+",
        required=True,
        help="UTF-8 texts, each scored on its own; - is standard input",
    )
    add("--dtype", choices=DTYPES, default="auto", metavar="DTYPE", help="auto (as stored), float32, bfloat16, float16")
    add_quantization_arguments(parser)
    add("--window", type=int, metavar="N", help="tokens read at once (default: the model's positions)")
    add("--stride", type=int, metavar="N", help="how far a window moves on (default: half a window)")
    add("--json", action="store_true", help="print one JSON object, and nothing else")


def run(args: argparse.Namespace) -> int:
    """Evaluate as asked; returns the exit code."""
    options = quantization_options(args)
    folder = model_folder(args.model)
    texts = [read_text(name, "--text") for name in args.text]

    from alula.config import AutoConfig
    from alula.evaluation import Score, bits_per_byte
    from alula.models.auto import AutoModelForCausalLM
    from alula.tokenization import AutoTokenizer

    AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype], **options)
    if getattr(model.config, "is_decoder", True) is False:
        raise CommandError("this model is an encoder: it does not predict the next token")
    start = time.perf_counter()
    score = Score(0.0, 0, 0)
    for name, text in zip(args.text, texts, strict=True):
        try:
            score += bits_per_byte(
                model,
                tokenizer,
                text,
                window=args.window,
                stride=args.stride,
                progress=lambda windows, name=name: progress(windows, name, "window"),
            )
        except ValueError as error:
            raise CommandError(f"{name}: {error}") from None
    seconds = time.perf_counter() - start
    stored = getattr(model.config, "quantization_config", None)
    weights = str(model.dtype).removeprefix("torch.")
    if stored is not None:
        weights = stored["format"] + (f" in groups of {stored['group_size']}" if stored["group_size"] else "")
    weight_bytes = model.quantization_report().total_bytes
    if args.json:
        report = {
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "weights": weights,
            "activations": "full" if stored is None else stored["activations"],
            "weight_bytes": weight_bytes,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(report))
    else:
        print(
            f"{score.bits_per_byte:.4f} bits per byte ({score.tokens} tokens, {score.bytes} bytes; weights {weights}, "
            f"{weight_bytes / 1e6:.1f} MB; {score.tokens / seconds:.0f} tokens/s)"
        )
    return 0


def read_text(name: str, option: str) -> str:
    """The UTF-8 text of a file, - for standard input. CommandError for a file that cannot be read, and an empty one."""
    if not name:
        raise CommandError(f"{option} has an empty name; give a file, or - for standard input")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise CommandError(f"{option} {name} cannot be read: {error.strerror}") from error
    text = decode_input(data, name)
    if not text:
        raise CommandError(f"{option} {name} is empty")
    return text


def progress(items: list[Any], description: str, unit: str) -> Iterable[Any]:
    """The items, behind a bar on standard error where that is a terminal and tqdm is there."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, unit=unit, delay=2.0, leave=False, file=sys.stderr)
