"""TokenizersBackend: text to ids and back with a `tokenizers.Tokenizer`, with Hugging Face's names and meanings."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from alula.tokenization.backend import load_backend, require_tokenizers
from alula.tokenization.call import TextCalls, Turn
from alula.tokenization.folder import TOKENIZER_FILE, read_folder, save_folder
from alula.tokenization.lengths import UNLIMITED
from alula.tokenization.special_tokens import SpecialTokens
from alula.tokenization.streaming import Decoder, incremental_decoder

__all__ = ["TokenizersBackend"]

_CLEAN_UP_ANYWAY = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class TokenizersBackend(TextCalls, SpecialTokens):
    """A tokenizer exactly as its tokenizer.json says; the classes of model families derive from it.

    Args:
        tokenizer_object: a `tokenizers.Tokenizer`, which is copied; or
        tokenizer_file: the path of a tokenizer.json.
        model_max_length: the longest row that the model takes; what padding and truncation go by without `max_length`.
        padding_side, truncation_side: "right" or "left".
        add_bos_token, add_eos_token: put these tokens around every text; given at all, they replace the
            post-processor of the tokenizer.json.
        split_special_tokens: special tokens in a text are split like any other text.
        model_input_names: what a call returns unless told otherwise.
        clean_up_tokenization_spaces: taken, and ignored for BPE, where it would harm the text.
        bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token, extra_special_tokens: special
            tokens; those not in the vocabulary are added to it.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"tokenizer_file": "tokenizer.json"}
    model_input_names: list[str] = ["input_ids", "attention_mask"]  # noqa: RUF012  instances have their own
    padding_side: str = "right"
    truncation_side: str = "right"
    _tokenizer: Any = None

    def __init__(self, *, tokenizer_object: Any = None, tokenizer_file: Any = None, **kwargs: Any) -> None:
        library = require_tokenizers()
        if tokenizer_object is not None:
            self._tokenizer = copy.deepcopy(tokenizer_object)
        elif self._tokenizer is None and tokenizer_file is not None:
            self._tokenizer = load_backend(tokenizer_file)
        if not isinstance(self._tokenizer, library.Tokenizer):
            raise ValueError(
                f"{type(self).__name__} needs a tokenizer: from_pretrained(folder), tokenizer_object=<tokenizers."
                "Tokenizer> or tokenizer_file=<path of a tokenizer.json>"
            )
        self._take_file_defaults(kwargs)
        self._should_update_post_processor = "add_bos_token" in kwargs or "add_eos_token" in kwargs
        self._add_bos_token = bool(kwargs.get("add_bos_token", False))
        self._add_eos_token = bool(kwargs.get("add_eos_token", False))
        if (post_processor := kwargs.pop("post_processor", None)) is not None:
            self._tokenizer.post_processor = post_processor
        self._should_update_post_processor |= self._tokenizer.post_processor is None
        if "additional_special_tokens" in kwargs and "extra_special_tokens" not in kwargs:
            kwargs["extra_special_tokens"] = kwargs.pop("additional_special_tokens")
        kwargs.setdefault("backend", "tokenizers")
        self.init_kwargs = copy.deepcopy(kwargs)
        self._init_special_tokens(kwargs)
        self.name_or_path = kwargs.pop("name_or_path", "")
        self.pad_token_type_id = 0
        self.chat_template = kwargs.pop("chat_template", None)
        self.model_max_length = _model_max_length(kwargs.pop("model_max_length", None))
        self.padding_side = kwargs.pop("padding_side", self.padding_side)
        self.truncation_side = kwargs.pop("truncation_side", self.truncation_side)
        self.model_input_names = list(kwargs.pop("model_input_names", self.model_input_names))
        self.clean_up_tokenization_spaces = kwargs.pop("clean_up_tokenization_spaces", False)
        setattr(self, _CLEAN_UP_ANYWAY, kwargs.pop(_CLEAN_UP_ANYWAY, False))
        self.split_special_tokens = bool(kwargs.pop("split_special_tokens", False))
        self.add_prefix_space = kwargs.get("add_prefix_space", False)
        self._add_missing_tokens(kwargs.get("added_tokens_decoder") or {})
        self._warned: set[str] = set()
        self._turn = Turn()
        if self._should_update_post_processor:
            self.update_post_processor()

    def _take_file_defaults(self, kwargs: dict[str, Any]) -> None:
        """Padding and truncation in a tokenizer.json set defaults, and nothing more: every call sets its own."""
        if truncation := kwargs.pop("tokenizer_truncation", None) or self._tokenizer.truncation:
            for key, source in (("max_length",) * 2, ("truncation_side", "direction"), ("stride",) * 2):
                kwargs.setdefault(key, truncation[source])
            kwargs.setdefault("truncation_strategy", truncation["strategy"])
        if padding := kwargs.pop("tokenizer_padding", None) or self._tokenizer.padding:
            for key, source in (("pad_token",) * 2, ("padding_side", "direction"), ("max_length", "length")):
                kwargs.setdefault(key, padding[source])
            kwargs.setdefault("pad_to_multiple_of", padding["pad_to_multiple_of"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _add_missing_tokens(self, added_tokens_decoder: dict[int, Any]) -> None:
        """Adds the tokens of the files by rising id, then special tokens that are not among the added ones."""
        library = require_tokenizers()
        tokens = [token for _, token in sorted(added_tokens_decoder.items())]
        known = {*self.added_tokens_encoder, *map(str, tokens)}
        named = [token for token in self._special_tokens_map.values() if token is not None]
        new: list[Any] = []
        for token in [*named, *self._extra_special_tokens]:
            # One of a known name that differs (in the spaces it takes in) is added once more: the last one counts.
            if str(token) not in known and not any(type(t) is type(token) and t == token for t in new):
                new.append(token)
        tokens += [library.AddedToken(token, special=True) if isinstance(token, str) else token for token in new]
        names = set(map(str, named))
        for token in tokens:
            token.special = token.special or str(token) in names
        self.add_tokens(tokens)
        for index, token in added_tokens_decoder.items():
            found = self._tokenizer.token_to_id(str(token))
            if found != index:
                raise ValueError(
                    f"the files give the added token {str(token)!r} id {index}, but after the {self.vocab_size} tokens "
                    f"of the vocabulary it is {found}; vocabulary and added tokens are not of one tokenizer"
                )

    @classmethod
    def find_files(cls, folder: Path) -> dict[str, Path]:
        """argument -> file, of the vocabulary files in a folder. FileNotFoundError names those that are missing."""
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {TOKENIZER_FILE}; put the one of the checkpoint there (transformers writes it with "
                "`tokenizer.save_pretrained`)"
            )
        return {"tokenizer_file": file}

    @classmethod
    def read_files(cls, files: dict[str, Path]) -> dict[str, Any]:
        """The arguments of the class that its vocabulary files give."""
        return {argument: str(file) for argument, file in files.items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *init_inputs: Any, **kwargs: Any) -> Any:
        """Loads the tokenizer of a folder. Keyword arguments win over what the files say.

        Read are tokenizer.json, or else the class's own files, with tokenizer_config.json, special_tokens_map.json
        and added_tokens.json. Raises FileNotFoundError for files that are missing, ValueError for files that are
        malformed or contradict each other.
        """
        return cls(*init_inputs, **read_folder(cls, pretrained_model_name_or_path, kwargs))

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes tokenizer_config.json, tokenizer.json (and a chat_template.jinja, if any); returns the paths."""
        return save_folder(self, save_directory, filename_prefix)

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the vocabulary alone, for BPE as vocab.json and merges.txt; returns the paths.

        Added tokens are not in it. (transformers 5 copies the file a tokenizer was loaded from, under a name that no
        BPE tokenizer reads; this is what its older versions do.)
        """
        if not os.path.isdir(save_directory):
            raise ValueError(f"{save_directory} is not a folder; save_vocabulary writes into one that exists")
        return tuple(self._tokenizer.model.save(str(save_directory), filename_prefix))

    # --- the vocabulary -------------------------------------------------------------------------------------------

    @property
    def is_fast(self) -> bool:
        """True: the `tokenizers` library does the work."""
        return True

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """token -> id, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """`get_vocab()`."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """id -> `tokenizers.AddedToken` of every added token."""
        return self._tokenizer.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """token -> id of every added token, by rising id."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        """`added_tokens_encoder`."""
        return self.added_tokens_encoder

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int | None] | None:
        """The id of a token, or the list of ids of several; the unknown token's for one not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._tokenizer.token_to_id(tokens)
        unknown = self._special_tokens_map.get("unk_token")
        return self._tokenizer.token_to_id(str(unknown)) if index is None and unknown is not None else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the list of tokens of several (None beyond the vocabulary)."""
        ids = _to_python(ids)
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(_check_ids([ids])[0])
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._tokenizer.id_to_token(index) for index in _check_ids(ids) if index not in skipped]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for special tokens, 0 for others, of ids that have them already."""
        if token_ids_1 is not None or not already_has_special_tokens:
            raise ValueError(
                "get_special_tokens_mask takes one row of ids with its special tokens in place and "
                "already_has_special_tokens=True; for text, call the tokenizer with return_special_tokens_mask=True"
            )
        special = set(self.all_special_ids)
        return [int(index in special) for index in _to_python(token_ids_0)]

    # --- special tokens around a text -----------------------------------------------------------------------------

    @property
    def add_bos_token(self) -> bool:
        """Whether `bos_token` goes in front of every text. Setting it replaces the post-processor."""
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = bool(value)
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether `eos_token` goes after every text. Setting it replaces the post-processor."""
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = bool(value)
        self.update_post_processor()

    def update_post_processor(self) -> None:
        """Rebuilds the post-processor from `add_bos_token`, `add_eos_token` and the present tokens."""
        self._add_bos_token &= self.bos_token is not None
        self._add_eos_token &= self.eos_token is not None
        front = [self.bos_token] if self._add_bos_token else []
        back = [self.eos_token] if self._add_eos_token else []

        def around(name: str, type_id: int) -> list[str]:
            return [*(f"{t}:{type_id}" for t in front), f"{name}:{type_id}", *(f"{t}:{type_id}" for t in back)]

        self._tokenizer.post_processor = require_tokenizers().processors.TemplateProcessing(
            single=" ".join(around("$A", 0)),
            pair=" ".join(around("$A", 0) + around("$B", 1)),
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in [*front, *back]],
        )

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Number of special tokens put around a text, or a pair of texts."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    # --- ids to text ----------------------------------------------------------------------------------------------

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str | list[str]:
        """The text of ids: an id, a list, a 1-D array or tensor; a list of texts for a batch of them.

        Ids beyond the vocabulary stand for nothing, bytes that are no UTF-8 for U+FFFD.
        """
        ids = _to_python(token_ids)
        if isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        ids = _check_ids([ids] if isinstance(ids, int) else ids)
        text = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            if type(self._tokenizer.model).__name__ != "BPE" or getattr(self, _CLEAN_UP_ANYWAY):
                return clean_up_tokenization(text)
            if "clean_up" not in self._warned:
                self._warned.add("clean_up")
                warnings.warn(
                    "clean_up_tokenization_spaces=True is ignored: it strips spaces that belong to a BPE's text "
                    f"({_CLEAN_UP_ANYWAY}=True does it all the same)",
                    stacklevel=2,
                )
        return text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """The texts of a batch of ids, as a list; keyword arguments as for `decode`."""
        texts = self.decode(sequences, skip_special_tokens, **kwargs)
        return [texts] if isinstance(texts, str) else texts

    def decoder(self, skip_special_tokens: bool = True) -> Decoder:
        """A new incremental decoder: the pieces it gives, joined, are what `decode` returns for all the ids."""
        return incremental_decoder(self._tokenizer, skip_special_tokens)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map}, "
            f"added_tokens_decoder={self.added_tokens_decoder})"
        )


def clean_up_tokenization(text: str) -> str:
    """Takes away the spaces in front of English punctuation and contractions."""
    for ending in (".", "?", "!", ","):
        text = text.replace(f" {ending}", ending)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text


def _model_max_length(value: Any) -> int | float:
    if value is None:
        return UNLIMITED
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"model_max_length must be a number of tokens, or None for no limit; got {value!r}")
    return value


def _to_python(ids: Any) -> Any:
    """Arrays and tensors, also inside lists, as Python integers and lists of them."""
    if isinstance(ids, (torch.Tensor, np.ndarray, np.generic)):
        return ids.tolist()
    if isinstance(ids, Mapping):
        return _to_python(ids["input_ids"])
    if isinstance(ids, (list, tuple)) and any(not isinstance(item, int) for item in ids):
        return [_to_python(item) for item in ids]
    return ids


def _check_ids(ids: Any) -> list[int]:
    ids = list(ids)
    for index in ids:
        if not isinstance(index, int) or not 0 <= index < 2**32:
            raise ValueError(f"an id must be an integer of at least 0, got {index!r}")
    return ids
