"""`alula bench`: the command line."""

from __future__ import annotations

import argparse

from alula.bench import plot, run_cuda, run_model, run_ops


def main(argv: list[str]) -> int:
    """Run `alula bench` with these arguments (without the program's name) and return the exit status."""
    parser = argparse.ArgumentParser(prog="alula bench", description="Time ops and models against peers and limits.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, text in (
        ("ops", run_ops, "each op at named cases, in turn with PyTorch"),
        ("model", run_model, "prefill and decode of a model with random weights, in turn with peers"),
        ("cuda", run_cuda, "the ops on a GPU, in turn with PyTorch"),
        ("plot", plot, "bar charts of results written with --json"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args, argv)
