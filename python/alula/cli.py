"""The command line: `alula generate`, `alula fill-mask`, `alula quantize`, `alula evaluate`, `alula info`, `alula
bench`.

Exit codes: 0 done, 2 an error that one line on standard error explains, 130 Ctrl-C, 141 the reader of the output left.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from typing import NoReturn

from alula._version import __version__
from alula.commands import CommandError, evaluate, fill_mask, generate, info, plot_plan, quantize

__all__ = ["main"]

_DESCRIPTION = "Run GPTBigCode, GPT-2, CodeGen and BigBird models from their Hugging Face checkpoints, fast."
_EXAMPLES = """\
examples:
  alula generate "def fibonacci(n):"                   the small model that ships with alula
  alula generate --model starcoder --stop $'\\n\\n' < start_of_file.py
  alula generate --batch-file prompts.txt --json       one JSON object a prompt
  alula fill-mask "Plants create [MASK]." --model bigbird   tokens and their probabilities
  alula quantize starcoder starcoder-int4 --format int4     a folder with packed weights, which loads at once
  alula evaluate --text file.py --quantize int8        bits per byte, to compare models and formats
  alula info                                           versions, instruction sets, threads, GPUs
  alula bench --help                                   times kernels and models against their peers

`alula COMMAND --help` lists the options of a command.
"""
_LONGEST_LINE = 500
_EXPECTED = (CommandError, ValueError, OSError, ImportError, RuntimeError, MemoryError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (`{self.prog} --help` lists what is accepted)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line with `argv` (default: that of the process) and return the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    code = _guarded(sys.argv[1:] if argv is None else argv)
    if argv is None and code == 130:
        # Where Ctrl-C interrupts an exec() (importing torch has many), CPython remembers it and dies of the signal at
        # exit, although it was handled. The code would be lost.
        os._exit(code)
    return code


def _guarded(argv: list[str]) -> int:
    """Run, and turn whatever goes wrong into one line and an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say("alula: stopped by Ctrl-C")
        return 130
    except BrokenPipeError:
        _abandon_output()
        return 141
    except _EXPECTED as error:
        if _comes_from_ctrl_c(error):
            _say("alula: stopped by Ctrl-C")
            return 130
        if os.environ.get("ALULA_LOG", "0") not in ("", "0"):
            traceback.print_exc()
        _say(f"alula: error: {_one_line(error)}")
        if isinstance(error, OSError):
            _abandon_output()
        return 2


def _run(argv: list[str]) -> int:
    if argv[:1] == ["bench"]:
        from alula.bench.run import main as bench

        return bench(argv[1:]) or 0
    parser = _make_parser()
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    return args.run(args)


def _make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="alula", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"alula {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module, summary in (
        ("generate", generate, "continue a text"),
        ("fill-mask", fill_mask, "say what may stand in place of [MASK]"),
        ("quantize", quantize, "write a copy of a model with int8, int4 or nf4 weights"),
        ("evaluate", evaluate, "say how well a model predicts a text"),
        ("info", info, "print versions, instruction sets, threads, CUDA build, GPUs"),
        ("plot-plan", plot_plan, "draw the blocks that a block-sparse attention sees"),
    ):
        sub = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=raw)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    commands.add_parser("bench", help="time kernels and models against their peers", add_help=False)
    return parser


def _abandon_output() -> None:
    """Give what is still buffered for standard output a place to go, as nobody takes it: the interpreter flushes it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _comes_from_ctrl_c(error: BaseException | None) -> bool:
    """Whether a library turned KeyboardInterrupt into another error, as NumPy does while it is imported."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _show_warning(message: Warning | str, *_: object) -> None:
    _say(f"alula: warning: {_one_line(message)}")


def _one_line(message: object) -> str:
    line = " ".join(str(message).split()) or type(message).__name__
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ... (ALULA_LOG=1 shows all of it)"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
