"""The subcommands of the command line, one module each: `add_arguments(parser)` and `run(args) -> exit code`.

Importing them is cheap: torch and the models are imported by `run`.
"""

__all__ = ["CommandError"]


class CommandError(Exception):
    """Something the user can put right; its message says how, in one line."""
