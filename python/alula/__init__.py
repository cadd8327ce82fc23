"""alula: GPTBigCode, GPT-2, CodeGen and BigBird on hand-written kernels, from their Hugging Face checkpoints."""

from alula._version import __version__

__all__ = ["__version__"]
