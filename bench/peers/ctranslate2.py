"""CTranslate2: the weights converted to fp32, the only floating-point type that it computes in on every CPU, or to
int8."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import ctranslate2
import numpy as np

from .base import Missing, Peer, Setup


class CTranslate2(Peer):
    """It has no call for one step: a step is the difference of generating many tokens and generating one."""

    def __init__(self, setup: Setup) -> None:
        """Convert the folder if that is not done yet, and load it."""
        self.setup = setup
        if setup.dtype in ("int4", "nf4"):
            raise Missing(f"it has no {setup.dtype} weights on a CPU")
        kind = "int8" if setup.dtype == "int8" else "float32"
        self._weights = "int8" if setup.dtype == "int8" else "fp32"
        path = Path(setup.work) / f"ctranslate2-{self._weights}"
        if not path.exists():
            converter = ctranslate2.converters.TransformersConverter(str(setup.folder))
            try:
                unfinished = path.with_suffix(".unfinished")
                converter.convert(str(unfinished), quantization=kind, force=True)
                unfinished.rename(path)
            except (ImportError, ValueError) as error:
                raise Missing(f"the conversion failed: {error}") from error
        self._generator = ctranslate2.Generator(
            str(path), device="cpu", compute_type=kind, intra_threads=setup.threads, inter_threads=1
        )

    @property
    def versions(self) -> dict[str, str]:
        """ctranslate2."""
        return {"ctranslate2": ctranslate2.__version__}

    @property
    def weights(self) -> str:
        """int8 where that is asked for, else fp32."""
        return self._weights

    def greedy(self, prompts: list[list[int]], steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens by its own search; logits of these tokens by one pass over each whole row."""
        rows = self._generate(prompts, steps + 1)
        logits = []
        for prompt, new in zip(prompts, rows, strict=True):
            out = self._generator.forward_batch([prompt + new[:-1]])
            logits.append(np.asarray(out)[0, len(prompt) - 1 :].astype(np.float32))
        return np.stack(logits, axis=1), np.array(rows).T

    def time_prefill(self, prompts: list[list[int]]) -> float:
        """Seconds to generate one token."""
        start = time.perf_counter()
        self._generate(prompts, 1)
        return time.perf_counter() - start

    def time_decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """One sample: the mean of `steps` steps. RuntimeError if they take too little to be told from the prompt."""
        one = statistics.median(self.time_prefill(prompts) for _ in range(3))
        start = time.perf_counter()
        self._generate(prompts, steps + 1)
        mean = (time.perf_counter() - start - one) / steps
        if mean <= 0:
            raise RuntimeError(f"{steps} steps take too little to be told from reading the prompt")
        return [mean]

    def _generate(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        results = self._generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            max_length=count,
            min_length=count,
            beam_size=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]
