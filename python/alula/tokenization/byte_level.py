"""What GPT-2's and CodeGen's tokenizers share: a byte-level BPE that is rebuilt from its vocabulary and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from alula.config import read_json
from alula.tokenization.backend import byte_level_bpe, check_reachable, require_tokenizers
from alula.tokenization.base import TokenizersBackend
from alula.tokenization.folder import TOKENIZER_FILE

__all__ = ["ByteLevelTokenizer"]


class ByteLevelTokenizer(TokenizersBackend):
    """A byte-level BPE tokenizer from vocab.json and merges.txt, or from a tokenizer.json.

    As in transformers, a tokenizer.json gives its vocabulary, merges, added tokens and post-processor; how text is
    split and joined is the class's own. :class:`TokenizersBackend` takes such a file whole.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}

    def _build(self, vocab: Any, merges: Any, add_prefix_space: bool, kwargs: dict[str, Any]) -> None:
        vocab_file, merges_file = kwargs.pop("vocab_file", None), kwargs.pop("merges_file", None)
        vocab = vocab_file if vocab is None else vocab
        merges = merges_file if merges is None else merges
        self._tokenizer = byte_level_bpe(vocab, merges, add_prefix_space=add_prefix_space)
        self._vocab_names = (str(vocab), str(merges)) if isinstance(vocab, (str, Path)) else None

    def _check_reachable(self) -> None:
        """Once the added tokens are known."""
        if self._vocab_names is not None:
            exempt = {*self.added_tokens_encoder, *self.all_special_tokens}
            check_reachable(self._tokenizer, exempt, *self._vocab_names)

    @classmethod
    def read_files(cls, files: dict[str, Path]) -> dict[str, Any]:
        """The arguments that the folder's vocabulary files give."""
        if "tokenizer_file" not in files:
            return {"vocab": str(files["vocab_file"]), "merges": str(files["merges_file"])}
        file = files["tokenizer_file"]
        content = read_json(file)
        model = content.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if kind != "BPE" or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
            found = f"a {kind} model" if kind not in (None, "BPE") else "no model with vocab and merges"
            raise ValueError(f"{cls.__name__} needs a BPE; {file} holds {found}")
        shell = {**content, "model": {**model, "vocab": {}, "merges": []}, "added_tokens": []}
        try:
            rest = require_tokenizers().Tokenizer.from_str(json.dumps(shell))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{file} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        return {
            "vocab": model["vocab"],
            "merges": model["merges"],
            "post_processor": rest.post_processor,
            "tokenizer_padding": rest.padding,
            "tokenizer_truncation": rest.truncation,
        }

    @classmethod
    def find_files(cls, folder: Path) -> dict[str, Path]:
        """argument -> file, of the vocabulary files in a folder."""
        if (folder / TOKENIZER_FILE).is_file():
            return {"tokenizer_file": folder / TOKENIZER_FILE}
        files = {argument: folder / name for argument, name in cls.vocab_files_names.items()}
        missing = [file.name for file in files.values() if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} has no {TOKENIZER_FILE} and no {' and no '.join(missing)}; {cls.__name__} needs "
                f"{TOKENIZER_FILE}, or {' and '.join(cls.vocab_files_names.values())}"
            )
        return files
