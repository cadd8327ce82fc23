"""A tokenizer's folder: which files are read, what wins where they disagree, and what is written back."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from alula.config import read_json, without_downloading
from alula.tokenization.backend import require_tokenizers

__all__ = ["CONFIG_FILE", "TOKENIZER_FILE", "find_folder", "read_folder", "save_folder"]

CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
_SPECIAL_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_CHAT_FILE = "chat_template.jinja"
# What a tokenizer_config.json may hold and must not decide: files and objects are the caller's to choose.
_NOT_FROM_FILES = {
    "auto_map",
    "files_loaded",
    "init_inputs",
    "is_local",
    "local_files_only",
    "merges",
    "merges_file",
    "name_or_path",
    "post_processor",
    "special_tokens_map_file",
    "tokenizer_class",
    "tokenizer_file",
    "tokenizer_object",
    "tokenizer_padding",
    "tokenizer_truncation",
    "vocab",
    "vocab_file",
}


def find_folder(path: str | os.PathLike, kwargs: dict[str, Any]) -> Path:
    """The folder that `from_pretrained` was asked for; takes the arguments about finding it out of `kwargs`."""
    without_effect = {"use_fast"} | (kwargs.keys() - without_downloading(kwargs).keys())
    for name in without_effect & kwargs.keys():
        del kwargs[name]
    folder = Path(path) / (kwargs.pop("subfolder", None) or "")
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; give the folder that holds {TOKENIZER_FILE}, or vocab.json and merges.txt"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; alula downloads nothing: give the folder of a tokenizer")
    return folder


def read_folder(cls: type, path: str | os.PathLike, overrides: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that make a tokenizer of class `cls` from a folder.

    Later wins: tokenizer_config.json, `overrides`; then, for the special tokens and only where tokenizer_config.json
    lists no added tokens (`added_tokens_decoder`), special_tokens_map.json, added_tokens.json, tokenizer.json.
    """
    overrides = dict(overrides)
    folder = find_folder(path, overrides)
    config_file = folder / CONFIG_FILE
    kwargs = read_json(config_file) if config_file.is_file() else {}
    kwargs = {key: value for key, value in kwargs.items() if key not in _NOT_FROM_FILES}
    files = cls.find_files(folder)
    if TOKENIZER_FILE in {file.name for file in files.values()}:
        # Whether these tokens are put around a text is then said by the file's post-processor.
        kwargs.pop("add_bos_token", None)
        kwargs.pop("add_eos_token", None)
    if (folder / _CHAT_FILE).is_file():
        kwargs["chat_template"] = (folder / _CHAT_FILE).read_text(encoding="utf-8")
    kwargs |= overrides
    _use_new_name(kwargs)
    own = {key for key in kwargs if key.endswith("_token") and isinstance(kwargs[key], str)}
    named = {key: kwargs.pop(key) for key in kwargs.copy() if key in own.difference(cls.SPECIAL_TOKENS_ATTRIBUTES)}
    if isinstance(kwargs.get("extra_special_tokens"), dict):
        named |= kwargs.pop("extra_special_tokens")
    if named:
        kwargs["model_specific_special_tokens"] = {**(kwargs.get("model_specific_special_tokens") or {}), **named}
    added = _read_added_tokens(cls, folder, kwargs, overrides)
    kwargs = _revive(kwargs, config_file)
    for name in {*cls.SPECIAL_TOKENS_ATTRIBUTES, "extra_special_tokens"} & kwargs.keys():
        kwargs[name] = _revive_special(kwargs[name], config_file)
    kwargs["added_tokens_decoder"] = added
    by_name = {str(token): token for token in added.values()}
    for name in cls.SPECIAL_TOKENS_ATTRIBUTES:
        if kwargs.get(name) is not None:
            kwargs[name] = by_name.get(str(kwargs[name]), kwargs[name])
    kwargs["name_or_path"] = str(path)
    return kwargs | cls.read_files(files)


def _use_new_name(kwargs: dict[str, Any]) -> None:
    """`extra_special_tokens` was `additional_special_tokens` once."""
    if "additional_special_tokens" in kwargs:
        old = kwargs.pop("additional_special_tokens")
        if not kwargs.get("extra_special_tokens"):
            kwargs["extra_special_tokens"] = old


def _read_added_tokens(cls: type, folder: Path, kwargs: dict[str, Any], overrides: dict[str, Any]) -> dict[int, Any]:
    """id -> AddedToken; where tokenizer_config.json has none, also merges special_tokens_map.json into `kwargs`."""
    library = require_tokenizers()
    if "added_tokens_decoder" in kwargs:
        return _token_map(kwargs.pop("added_tokens_decoder"), folder / CONFIG_FILE)
    special_file, added_file, tokenizer_file = (folder / name for name in (_SPECIAL_FILE, _ADDED_FILE, TOKENIZER_FILE))
    if special_file.is_file():
        special = read_json(special_file)
        _use_new_name(special)
        for key, value in special.items():
            if overrides.get(key):
                continue
            value = _revive_special(value, special_file)
            if key == "extra_special_tokens" and isinstance(value, list):
                present = kwargs.get(key)
                present = list(present) if isinstance(present, (list, tuple)) else []
                value = [*present, *(token for token in value if token not in present)]
            kwargs[key] = value
    added: dict[int, Any] = {}
    if added_file.is_file():
        names = {str(kwargs[name]) for name in cls.SPECIAL_TOKENS_ATTRIBUTES if kwargs.get(name)}
        names.update(map(str, kwargs.get("extra_special_tokens") or []))
        for token, index in read_json(added_file).items():
            if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                raise ValueError(f"{added_file} must map tokens to ids, but has {token!r}: {index!r}")
            if index in added:
                raise ValueError(f"{added_file} gives id {index} to two tokens, {str(added[index])!r} and {token!r}")
            is_special = token in names
            added[index] = library.AddedToken(token, normalized=not is_special, special=is_special)
    if tokenizer_file.is_file():
        tokens = read_json(tokenizer_file).get("added_tokens", [])
        if not isinstance(tokens, list) or not all(isinstance(token, dict) and "id" in token for token in tokens):
            raise ValueError(f"{tokenizer_file}: added_tokens must be a list of objects with an id")
        added |= _token_map({token["id"]: token for token in tokens}, tokenizer_file)
    return added


def _token_map(tokens: Any, source: Path) -> dict[int, Any]:
    library = require_tokenizers()
    added = {}
    try:
        for index, token in tokens.items():
            if not isinstance(token, library.AddedToken):
                token = library.AddedToken(
                    **{key: value for key, value in token.items() if key not in ("id", "__type")}
                )
            if not token.content:
                raise ValueError(f"the one with id {index} has none")
            added[int(index)] = token
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: the added tokens must map ids to objects with a content ({error})") from None
    return added


def _revive_special(value: Any, source: Path) -> Any:
    if isinstance(value, list):
        return [_revive_special(item, source) for item in value]
    return (
        next(iter(_token_map({0: {**value, "special": True}}, source).values())) if isinstance(value, dict) else value
    )


def _revive(value: Any, source: Path) -> Any:
    """Makes AddedTokens of the objects that say they are some."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return next(iter(_token_map({0: value}, source).values()))
        return {key: _revive(item, source) for key, item in value.items()}
    return [_revive(item, source) for item in value] if isinstance(value, (list, tuple)) else value


def save_folder(tokenizer: Any, folder: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
    """Writes tokenizer_config.json and tokenizer.json, as transformers does; returns their paths."""
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; save_pretrained writes into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{filename_prefix}-" if filename_prefix else ""
    left_out = {"add_bos_token", "add_eos_token", "added_tokens_decoder", "chat_template", *_NOT_FROM_FILES}
    config = {key: copy.deepcopy(value) for key, value in tokenizer.init_kwargs.items() if key not in left_out}
    config |= {key: getattr(tokenizer, key) for key in config if hasattr(tokenizer, key)}
    config["model_max_length"] = tokenizer.model_max_length
    config |= tokenizer.special_tokens_map
    if tokenizer.extra_special_tokens:
        config["extra_special_tokens"] = tokenizer.extra_special_tokens
    config["tokenizer_class"] = type(tokenizer).__name__
    files = [folder / f"{prefix}{CONFIG_FILE}"]
    if isinstance(tokenizer.chat_template, str):
        files.append(folder / f"{prefix}{_CHAT_FILE}")
        files[-1].write_text(tokenizer.chat_template, encoding="utf-8")
    elif tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, default=_plain_token)
    files[0].write_text(text + "\n", encoding="utf-8")
    files.append(folder / f"{prefix}{TOKENIZER_FILE}")
    tokenizer.backend_tokenizer.save(str(files[-1]))
    return tuple(map(str, files))


def _plain_token(value: Any) -> dict[str, Any]:
    if isinstance(value, require_tokenizers().AddedToken):
        return {**value.__getstate__(), "__type": "AddedToken"}
    raise TypeError(f"{value!r} cannot be saved in {CONFIG_FILE}")
