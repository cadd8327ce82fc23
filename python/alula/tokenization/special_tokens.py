"""Special tokens by name: `bos_token` and `bos_token_id`, and six more; extra ones without a name; adding tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from alula.tokenization.backend import require_tokenizers
from alula.tokenization.lengths import SIDES

__all__ = ["SpecialTokens"]


def is_token(value: Any) -> bool:
    """Whether `value` is a string or a `tokenizers.AddedToken`."""
    return isinstance(value, (str, require_tokenizers().AddedToken))


class SpecialTokens:
    """What a tokenizer knows about its special tokens. `_tokenizer` is the `tokenizers.Tokenizer` behind it.

    Reading `eos_token` gives a string or None, `eos_token_id` its id; writing either sets the token. A name that is
    not in the vocabulary is not added by this (use `add_special_tokens`): its id is then the unknown token's.
    """

    SPECIAL_TOKENS_ATTRIBUTES: ClassVar[list[str]] = [
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    ]

    def _init_special_tokens(self, kwargs: dict[str, Any]) -> None:
        """Takes the special tokens out of the arguments of a tokenizer."""
        named = dict.fromkeys(self.SPECIAL_TOKENS_ATTRIBUTES)
        extra: list[Any] = []
        own = dict(kwargs.pop("model_specific_special_tokens", None) or {})
        given = kwargs.pop("extra_special_tokens", None)
        if isinstance(given, dict):
            own.update(given)
        elif isinstance(given, (list, tuple)):
            extra = list(given)
        elif given is not None:
            raise TypeError(f"extra_special_tokens must be a list of tokens or a dict of named ones, got {given!r}")
        for key in [key for key in kwargs if key.endswith("_token")]:
            if key in named:
                named[key] = kwargs.pop(key)
            elif is_token(kwargs[key]):
                own[key] = kwargs.pop(key)
        named.update(own)
        for key, value in named.items():
            if value is not None and not is_token(value):
                raise TypeError(f"{key} must be a string or an AddedToken, got {value!r}")
        for value in extra:
            if not is_token(value):
                raise TypeError(f"extra_special_tokens must hold strings and AddedTokens, got {value!r}")
        object.__setattr__(self, "_special_tokens_map", named)
        object.__setattr__(self, "_extra_special_tokens", extra)

    def __getattr__(self, key: str) -> Any:
        # Only for names that are not found otherwise. Both dicts may be missing while an object is being copied.
        name = key.removesuffix("_ids").removesuffix("_id")
        named = self.__dict__.get("_special_tokens_map", {})
        if name in named:
            value = named[name]
            if value is None:
                return None
            return str(value) if key == name else self.convert_tokens_to_ids(str(value))
        if name == "extra_special_tokens":
            tokens = [str(token) for token in self.__dict__.get("_extra_special_tokens", [])]
            return tokens if key == name else self.convert_tokens_to_ids(tokens)
        raise AttributeError(f"{type(self).__name__} has no attribute {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        name = key.removesuffix("_ids").removesuffix("_id")
        named = self.__dict__.get("_special_tokens_map", {})
        if name in named:
            if key != name and value is not None:
                index, value = value, self.convert_ids_to_tokens(value)
                if value is None:
                    raise ValueError(f"{key}={index} is no token; ids go from 0 to {len(self) - 1}")
            if value is not None and not is_token(value):
                raise ValueError(f"{name} must be a string, an AddedToken or None, got {value!r}")
            named[name] = value
        elif name == "extra_special_tokens":
            if value is not None and not isinstance(value, (list, tuple)):
                raise ValueError(f"{name} must be a list, got {value!r}")
            tokens = list(value or [])
            self.__dict__["_extra_special_tokens"] = tokens if key == name else self.convert_ids_to_tokens(tokens)
        else:
            if key in ("padding_side", "truncation_side") and value not in SIDES:
                raise ValueError(f"{key}={value!r} is unknown; accepted: {', '.join(SIDES)}")
            super().__setattr__(key, value)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """name -> token, for the named special tokens that are set."""
        return {name: str(token) for name, token in self._special_tokens_map.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once: the named ones, then the extra ones."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *map(str, self._extra_special_tokens)]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Sets special tokens by name and adds those that are not in the vocabulary; returns how many were added.

        Args:
            special_tokens_dict: name -> token; under "extra_special_tokens" (or "additional_special_tokens") a list.
            replace_extra_special_tokens: that list takes the place of the present one (whose tokens stay in the
                vocabulary), or is appended to it.

        The model's embedding must then have `len(tokenizer)` rows or more: `model.resize_token_embeddings`.
        """
        given = dict(special_tokens_dict)
        if "additional_special_tokens" in given and not given.get("extra_special_tokens"):
            given["extra_special_tokens"] = given.pop("additional_special_tokens")
        names = [*self._special_tokens_map, "extra_special_tokens"]
        for key, value in given.items():
            if key not in names:
                raise ValueError(f"{key!r} is no special token's name; accepted: {', '.join(names)}")
            is_list = key == "extra_special_tokens"
            if is_list and not (isinstance(value, (list, tuple)) and all(map(is_token, value))):
                raise ValueError(f"{key} must be a list of strings and AddedTokens, got {value!r}")
            if not is_list and not is_token(value):
                raise ValueError(f"{key} must be a string or an AddedToken, got {value!r}")
        new = []
        for key, value in given.items():
            if key == "extra_special_tokens":
                present = self.extra_special_tokens
                tokens = [_special(t) for t in value if replace_extra_special_tokens or str(t) not in present]
                if replace_extra_special_tokens and tokens:
                    self.extra_special_tokens = tokens
                else:
                    self.extra_special_tokens = [*self._extra_special_tokens, *tokens]
                new += tokens
            else:
                token = _special(value)
                setattr(self, key, token)
                new.append(token)
        return self.add_tokens(new, special_tokens=True)

    def add_tokens(self, new_tokens: Any | Sequence[Any], special_tokens: bool = False) -> int:
        """Adds tokens that are never split, at the end of the vocabulary; returns how many were not there before.

        Args:
            new_tokens: a string or `tokenizers.AddedToken`, or a list of them.
            special_tokens: whether they are special: left out by `decode(skip_special_tokens=True)`.
        """
        if not isinstance(new_tokens, (list, tuple)):
            new_tokens = [new_tokens] if new_tokens else []
        for token in new_tokens:
            if not is_token(token):
                raise ValueError(f"a new token must be a string or an AddedToken, got {token!r}")
        if not new_tokens:
            return 0
        add = self._tokenizer.add_special_tokens if special_tokens else self._tokenizer.add_tokens
        return add(list(new_tokens))


def _special(token: Any) -> Any:
    if not isinstance(token, str):
        return token
    return require_tokenizers().AddedToken(token, rstrip=False, lstrip=False, normalized=False, special=True)
