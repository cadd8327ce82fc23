"""AutoTokenizer: the tokenizer class that a folder's files name."""

from __future__ import annotations

import os
from typing import Any

from alula.config import read_json
from alula.tokenization.base import TokenizersBackend
from alula.tokenization.big_bird import BigBirdTokenizer
from alula.tokenization.codegen import CodeGenTokenizer
from alula.tokenization.folder import CONFIG_FILE, TOKENIZER_FILE, find_folder
from alula.tokenization.gpt2 import GPT2Tokenizer

__all__ = ["AutoTokenizer"]

# `tokenizer_class` in tokenizer_config.json or config.json, without "Fast" at its end.
_CLASSES = {
    "BigBirdTokenizer": BigBirdTokenizer,
    "CodeGenTokenizer": CodeGenTokenizer,
    "GPT2Tokenizer": GPT2Tokenizer,
    "PreTrainedTokenizer": TokenizersBackend,
    "TokenizersBackend": TokenizersBackend,
}
# `model_type` in config.json, for folders that name no class.
_MODEL_TYPES = {
    "big_bird": BigBirdTokenizer,
    "codegen": CodeGenTokenizer,
    "gpt2": GPT2Tokenizer,
    "gpt_bigcode": TokenizersBackend,
}


class AutoTokenizer:
    """Picks the tokenizer class of a folder; it is not made itself."""

    def __init__(self) -> None:
        raise TypeError("AutoTokenizer is not made directly; use AutoTokenizer.from_pretrained(folder)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *inputs: Any, **kwargs: Any) -> Any:
        """The tokenizer of a folder, of the class that tokenizer_config.json, or else config.json names.

        Keyword arguments go to the class; `tokenizer_type` (a model_type) decides over the files. A folder that names
        nothing and holds a tokenizer.json gives a :class:`TokenizersBackend`. Raises FileNotFoundError where there is
        no tokenizer, ValueError for classes and model types that alula does not know.
        """
        tokenizer_type = kwargs.pop("tokenizer_type", None)
        config = kwargs.pop("config", None)
        folder = find_folder(pretrained_model_name_or_path, dict(kwargs))
        if tokenizer_type is not None:
            if tokenizer_type not in _MODEL_TYPES:
                raise ValueError(f"tokenizer_type={tokenizer_type!r} is unknown; accepted: {', '.join(_MODEL_TYPES)}")
            found = _MODEL_TYPES[tokenizer_type]
        else:
            found = _class_for(folder, config)
        if found is TokenizersBackend and not (folder / TOKENIZER_FILE).is_file():
            found = GPT2Tokenizer  # GPTBigCode's vocab.json and merges.txt
        return found.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)


def _class_for(folder: Any, config: Any) -> type[TokenizersBackend]:
    files = [folder / CONFIG_FILE, folder / "config.json"]
    own, model = (read_json(file) if file.is_file() else {} for file in files)
    if config is not None:
        model = {"model_type": config.model_type, "tokenizer_class": getattr(config, "tokenizer_class", None)}
    model_type = model.get("model_type")
    if model_type == "gpt_bigcode" and (folder / TOKENIZER_FILE).is_file():
        # As in transformers: StarCoder's files name GPT2Tokenizer, but split digits as that class would not.
        return TokenizersBackend
    name = own.get("tokenizer_class") or model.get("tokenizer_class")
    if name is not None:
        found = _CLASSES.get(str(name).removesuffix("Fast"))
        if found is None:
            raise ValueError(f"{folder}: tokenizer_class {name!r} is unknown; accepted: {', '.join(_CLASSES)}")
        return found
    if model_type is not None:
        if model_type not in _MODEL_TYPES:
            raise ValueError(
                f"{folder}: alula has no tokenizer for model_type {model_type!r}; accepted: {', '.join(_MODEL_TYPES)}"
            )
        return _MODEL_TYPES[model_type]
    if (folder / TOKENIZER_FILE).is_file():
        return TokenizersBackend
    raise FileNotFoundError(
        f"{folder} has no {TOKENIZER_FILE}, and neither {CONFIG_FILE} nor config.json names a tokenizer_class or a "
        "model_type"
    )
