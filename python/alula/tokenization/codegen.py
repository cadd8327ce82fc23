"""CodeGen's tokenizer: GPT-2's, and `decode` can cut a completion where it stops being the function asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from alula.tokenization.backend import require_tokenizers
from alula.tokenization.byte_level import ByteLevelTokenizer

__all__ = ["CodeGenTokenizer", "truncate_before"]


class CodeGenTokenizer(ByteLevelTokenizer):
    """CodeGen's byte-level BPE.

    Args:
        vocab: token -> id, or the path of a vocab.json.
        merges: pairs of tokens, best first, or the path of a merges.txt.
        unk_token, bos_token, eos_token, pad_token: special tokens; those not in the vocabulary are added to it.
        add_prefix_space: a space goes in front of a text that does not begin with white space.
        return_token_type_ids: a call returns `token_type_ids` unless told otherwise.
        kwargs: `add_bos_token` and everything else of :class:`TokenizersBackend`.
    """

    def __init__(
        self,
        vocab: Any = None,
        merges: Any = None,
        unk_token: Any = "<|endoftext|>",
        bos_token: Any = "<|endoftext|>",
        eos_token: Any = "<|endoftext|>",
        pad_token: Any = None,
        add_prefix_space: bool = False,
        return_token_type_ids: bool = False,
        **kwargs: Any,
    ) -> None:
        self.return_token_type_ids = bool(return_token_type_ids)
        self._build(vocab, merges, add_prefix_space, kwargs)
        self._tokenizer.post_processor = require_tokenizers().processors.ByteLevel(
            add_prefix_space=True, use_regex=True, trim_offsets=False
        )
        if return_token_type_ids:
            # For this object alone: in transformers one such tokenizer changes all that are made after it.
            names = list(kwargs.get("model_input_names", self.model_input_names))
            kwargs["model_input_names"] = names + ["token_type_ids"] * ("token_type_ids" not in names)
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_prefix_space=add_prefix_space,
            return_token_type_ids=return_token_type_ids,
            **kwargs,
        )
        self._check_reachable()

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        truncate_before_pattern: Sequence[str] | None = None,
    ) -> str | list[str]:
        r"""The text of ids, as :meth:`TokenizersBackend.decode`; with patterns, cut by :func:`truncate_before`.

        Args:
            truncate_before_pattern: regular expressions, for example `["^#", "^'''", "\n\n\n"]`.
        """
        text = super().decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)
        if not truncate_before_pattern:
            return text
        if isinstance(text, list):
            return [truncate_before(row, truncate_before_pattern) for row in text]
        return truncate_before(text, truncate_before_pattern)

    def truncate(self, completion: str, truncate_before_pattern: Sequence[str]) -> str:
        """:func:`truncate_before`."""
        return truncate_before(completion, truncate_before_pattern)


def truncate_before(completion: str, patterns: Sequence[str]) -> str:
    """The completion up to its second line that begins with `print`, then to its second with `def`, then to the first
    match of any pattern (`^` and `$` match at every line). ValueError for a pattern that is no regular expression.
    """
    if isinstance(patterns, str):
        raise ValueError(f"truncate_before_pattern must be a list of regular expressions, got the text {patterns!r}")
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern, re.MULTILINE))
        except (re.error, TypeError) as error:
            raise ValueError(f"truncate_before_pattern: {pattern!r} is no regular expression: {error}") from None
    for word in ("^print", "^def"):
        starts = [match.start() for match in re.finditer(word, completion, re.MULTILINE)]
        if len(starts) > 1:
            completion = completion[: starts[1]]
    found = [match.start() for match in (pattern.search(completion) for pattern in compiled) if match]
    return completion[: min(found)] if found else completion
