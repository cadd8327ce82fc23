"""GPT-2's tokenizer."""

from __future__ import annotations

import codecs
from typing import Any

from alula.tokenization.byte_level import ByteLevelTokenizer

__all__ = ["GPT2Tokenizer"]


class GPT2Tokenizer(ByteLevelTokenizer):
    """GPT-2's byte-level BPE; GPTBigCode checkpoints with vocab.json and merges.txt use it too.

    Args:
        vocab: token -> id, or the path of a vocab.json.
        merges: pairs of tokens, best first, or the path of a merges.txt.
        errors: kept and saved. Bytes that are no UTF-8 become U+FFFD ("replace") whatever it says: transformers'
            page gives it a meaning that its class does not have.
        unk_token, bos_token, eos_token, pad_token: special tokens; those not in the vocabulary are added to it.
        add_prefix_space: a space goes in front of a text that does not begin with white space.
        kwargs: `add_bos_token` and everything else of :class:`TokenizersBackend`.
    """

    def __init__(
        self,
        vocab: Any = None,
        merges: Any = None,
        errors: str = "replace",
        unk_token: Any = "<|endoftext|>",
        bos_token: Any = "<|endoftext|>",
        eos_token: Any = "<|endoftext|>",
        pad_token: Any = None,
        add_prefix_space: bool = False,
        **kwargs: Any,
    ) -> None:
        try:
            codecs.lookup_error(errors)
        except (LookupError, TypeError):
            raise ValueError(f"errors={errors!r} is unknown; accepted: replace, strict, ignore ...") from None
        self.errors = errors
        self._build(vocab, merges, add_prefix_space, kwargs)
        super().__init__(
            errors=errors,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_prefix_space=add_prefix_space,
            **kwargs,
        )
        self._check_reachable()
