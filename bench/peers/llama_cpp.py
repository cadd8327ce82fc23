"""llama.cpp through llama-cpp-python: the weights as GGUF in the dtype asked for, batch 1."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np

from .base import Missing, Peer, Setup, argmax_rows
from .gguf_writer import write_gguf


class LlamaCpp(Peer):
    """`Llama.eval`: the prompt in one batch, then one token at a time on the filled cache (fp16, its default)."""

    flash_attention = False

    def __init__(self, setup: Setup) -> None:
        """Write the GGUF file if it is not there, and load it."""
        if setup.batch != 1:
            raise Missing("only batch 1 is measured with it")
        if setup.dtype == "nf4":
            raise Missing("it has no nf4 weights")
        self.setup = setup
        path = Path(setup.work) / f"weights-{setup.dtype}.gguf"
        if not path.exists():
            write_gguf(setup.folder, path, setup.dtype)
        self._llama = llama_cpp.Llama(
            str(path),
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            n_ctx=setup.max_tokens,
            flash_attn=self.flash_attention,
            verbose=False,
        )

    @property
    def versions(self) -> dict[str, str]:
        """llama-cpp-python, and what llama.cpp says it was built for."""
        return {
            "llama-cpp-python": llama_cpp.__version__,
            "llama.cpp": llama_cpp.llama_print_system_info().decode().strip(),
        }

    @property
    def weights(self) -> str:
        """The dtype asked for; vectors and positions are fp32."""
        return self.setup.dtype

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Start at position 0."""
        self._llama.n_tokens = 0
        return self.step(prompts[0])

    def step(self, tokens: list[int]) -> list[int]:
        """Evaluate the tokens at the end of what is cached."""
        self._llama.eval(tokens)
        return argmax_rows(self._row())

    def logits(self) -> np.ndarray:
        """Logits of the last token."""
        return self._row().copy()

    def _row(self) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(1, self._llama.n_vocab()))


class LlamaCppFlashAttention(LlamaCpp):
    """The same with its flash attention switched on."""

    flash_attention = True
