"""Draw which key blocks each query block of a block-sparse attention sees: in text, or as a picture (--out FILE.png).

In text, # is a block that counts once, a digit one that counts that often (+: 10 and more), o one of which only pairs
with a global token count, and . one that is not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from alula.commands import CommandError

if TYPE_CHECKING:
    from alula.block_plan import BlockPlan

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `alula plot-plan`."""
    parser.add_argument(
        "--pattern",
        choices=("evaluation", "training", "own"),
        default="evaluation",
        help="BigBird's in evaluation or in training, or one of your own (default %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="length of the sequence (default %(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="16, 32, 64 or 128 (default %(default)s)")
    parser.add_argument("--random-blocks", type=int, help="random blocks of a row (default 3; own pattern: 0)")
    parser.add_argument("--heads", type=int, help="heads with random blocks of their own (default 1; training: 12)")
    parser.add_argument("--head", type=int, default=0, help="the head to draw (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a picture, PNG, PDF or SVG, in place of text")
    training = parser.add_argument_group("the training pattern")
    training.add_argument("--layer", type=int, help="index of the layer, the seed of its blocks (default 0)")
    training.add_argument("--max-positions", type=int, help="max_position_embeddings of the model (default 4096)")
    own = parser.add_argument_group("an own pattern")
    own.add_argument("--window", type=int, help="odd number of blocks around the query's own (default 3)")
    own.add_argument("--global-blocks", type=_numbers, metavar="LIST", help="such as 0,1,-1 (default 0,-1)")
    own.add_argument("--global-tokens", type=_numbers, metavar="LIST", help="positions, such as 0,17 (default none)")
    own.add_argument("--seed", type=int, help="of the random blocks (default 0)")
    own.add_argument("--causal", action="store_true", default=None, help="no token sees a later one")


def run(args: argparse.Namespace) -> int:
    """Print or write the picture; returns the exit code."""
    plan = _plan(args)
    if args.out is None:
        picture = plan.draw(args.head)
        print(f"{plan.describe()}\n{picture}")
        return 0
    try:
        plan.save_picture(str(args.out), args.head)
    except ImportError:
        raise CommandError(
            "a picture needs matplotlib: pip install matplotlib; without --out it is drawn as text"
        ) from None
    print(f"{plan.describe()}: {args.out}")
    return 0


_ONLY_FOR = {
    "layer": "training",
    "max_positions": "training",
    "window": "own",
    "global_blocks": "own",
    "global_tokens": "own",
    "seed": "own",
    "causal": "own",
}


def _plan(args: argparse.Namespace) -> BlockPlan:
    from alula.block_plan import BlockPlan

    for name, pattern in _ONLY_FOR.items():
        if getattr(args, name) is not None and args.pattern != pattern:
            raise CommandError(f"--{name.replace('_', '-')} belongs to --pattern {pattern}")
    size = (args.tokens, args.block_size)
    if args.pattern == "own":
        return BlockPlan.pattern(
            *size,
            num_random_blocks=args.random_blocks or 0,
            num_heads=_given(args.heads, 1),
            window=_given(args.window, 3),
            global_blocks=_given(args.global_blocks, (0, -1)),
            global_tokens=_given(args.global_tokens, ()),
            seed=_given(args.seed, 0),
            is_causal=bool(args.causal),
        )
    num_random = _given(args.random_blocks, 3)
    if args.pattern == "training":
        return BlockPlan.training(
            *size,
            num_random,
            num_heads=_given(args.heads, 12),
            layer_idx=_given(args.layer, 0),
            max_position_embeddings=_given(args.max_positions, 4096),
        )
    return BlockPlan.evaluation(*size, num_random)


def _given(value, default):
    return default if value is None else value


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers, such as 0,-1") from None
