"""What a call of `generate` is to do: `GenerationConfig`, with Hugging Face's names and meanings."""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

__all__ = ["GenerationConfig"]

# Hugging Face options that alula has no use for, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "assistant_model": (None,),
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "cache_implementation": (None,),
    "compile_config": (None,),
    "constraints": (None,),
    "custom_generate": (None,),
    "diversity_penalty": (None, 0.0),
    "disable_compile": (None, False, True),
    "dola_layers": (None,),
    "early_stopping": (None, False),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_decoder_ids": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1, 1.0),
    "head_mask": (None,),
    "inputs_embeds": (None,),
    "length_penalty": (None, 1.0),
    "low_memory": (None, False, True),
    "max_time": (None,),
    "negative_prompt_attention_mask": (None,),
    "negative_prompt_ids": (None,),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "penalty_alpha": (None, 0.0),
    "position_ids": (None,),
    "prefill_chunk_size": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "return_dict_in_generate": (None, False),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "synced_gpus": (None, False),
    "token_healing": (None, False),
    "token_type_ids": (None,),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "use_cache": (None, True, False),  # the result is the same; alula always uses one
    "watermarking_config": (None,),
}


@dataclass
class GenerationConfig:
    """The options of one call.  None means that an option is not used: one that has a value by default takes it.

    `max_new_tokens` wins over `max_length` (which counts the prompt as well); with neither, 20 tokens are made.
    `temperature`, `top_k`, `top_p` and `min_p` matter only with `do_sample`; unlike in transformers, `top_k` is off
    (0) unless asked for, and a `temperature` of 0 is allowed: greedy decoding.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    stop_strings: list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    # Names that were set on purpose, rather than left at their defaults.
    chosen: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, f.default)

    @classmethod
    def names(cls) -> list[str]:
        """Names of the options."""
        return [f.name for f in fields(cls) if f.name != "chosen"]

    @classmethod
    def from_pretrained(cls, folder: str | Path, model_config: Any = None) -> GenerationConfig:
        """Read generation_config.json of a model folder; where there is none, take the ids of `model_config`.

        Raises ValueError where the file is not a JSON object or holds a value that is not accepted.
        """
        path = Path(folder) / "generation_config.json"
        if not path.is_file():
            return cls.from_model_config(model_config)
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"{path} must hold a JSON object, but holds a {type(options).__name__}")
        ignored = sorted(k for k, v in options.items() if k in _NEUTRAL and not _is_neutral(k, v))
        if ignored:
            warnings.warn(f"{path}: alula does not support {', '.join(ignored)} and goes on without", stacklevel=2)
        known = {name: options[name] for name in cls.names() if options.get(name) is not None}
        try:
            return cls.from_model_config(model_config).updated(**known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write generation_config.json into `folder`: the options that differ from the defaults."""
        text = json.dumps(self.to_diff_dict(), indent=2) + "\n"
        (Path(folder) / "generation_config.json").write_text(text, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Every option by name."""
        return {name: getattr(self, name) for name in self.names()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        default = GenerationConfig().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != default[name]}

    @classmethod
    def from_model_config(cls, model_config: Any) -> GenerationConfig:
        """Take the ids of bos, eos and pad from a model's configuration (or None)."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: getattr(model_config, name, None) for name in names})

    def updated(self, **options: Any) -> GenerationConfig:
        """Return a checked copy with `options` set.

        None puts an earlier value out of force, as in transformers: the option is not used, and counts as not chosen.
        Arrays and tensors count as the numbers in them.  A `max_length` given without `max_new_tokens` puts an earlier
        `max_new_tokens` out of force, and `min_length` a `min_new_tokens`.  An empty list of `eos_token_id` or
        `stop_strings` is a choice of none.  Raises ValueError for an unknown name, naming the nearest, and for a value
        that is not accepted.
        """
        known = set(self.names())
        for name, value in options.items():
            if name in known:
                continue
            if name in _NEUTRAL:
                if not _is_neutral(name, value):
                    raise ValueError(f"{name}={value!r:.60} is not supported; accepted: {_NEUTRAL[name][-1]!r}")
                continue
            nearest = difflib.get_close_matches(
                name, sorted(known | {"seed", "streamer", "tokenizer"}), n=1, cutoff=0.75
            )
            hint = f"; did you mean `{nearest[0]}`?" if nearest else f"; accepted: {', '.join(sorted(known))}"
            raise ValueError(f"generate() has no option `{name}`{hint}")
        new = {name: _plain(value) for name, value in options.items() if name in known}
        for total, added in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if new.get(total) is not None:
                new.setdefault(added, None)
        if isinstance(new.get("stop_strings"), str):
            new["stop_strings"] = [new["stop_strings"]]
        chosen = {name for name, value in new.items() if value is not None}
        config = replace(self, **new, chosen=self.chosen - new.keys() | chosen)
        config.check()
        return config

    def update(self, **options: Any) -> dict[str, Any]:
        """Set `options` in place, all or none, as `updated` reads them.

        Returns {}: transformers gives the names back that it does not know, which are a ValueError here.
        """
        changed = self.updated(**options)
        for f in fields(self):
            setattr(self, f.name, getattr(changed, f.name))
        return {}

    @classmethod
    def of(cls, given: Any) -> GenerationConfig:
        """`given` itself, or the options that a `transformers.GenerationConfig` sets; TypeError for anything else."""
        if isinstance(given, cls):
            return given
        if not callable(getattr(given, "to_diff_dict", None)):
            raise TypeError(
                f"generation_config is a {type(given).__name__}; accepted: a GenerationConfig of alula or transformers"
            )
        options = given.to_diff_dict()
        options.pop("transformers_version", None)
        return cls().updated(**{name: value for name, value in options.items() if not name.startswith("_")})

    def merge(self, other: GenerationConfig) -> GenerationConfig:
        """Return a copy with what was chosen in `other`, or differs there from the defaults, set; None is no choice."""
        changed = {name: getattr(other, name) for name in other.chosen | other.to_diff_dict().keys()}
        return self.updated(**{name: value for name, value in changed.items() if value is not None})

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a row, maybe none."""
        eos = self.eos_token_id
        return () if eos is None else (int(eos),) if isinstance(eos, Integral) else tuple(map(int, eos))

    def check(self) -> None:
        """Raise ValueError for the first value that is not accepted."""
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample must be True or False, but is {self.do_sample!r}")
        for name in ("max_new_tokens", "max_length", "num_return_sequences"):
            _check_int(name, getattr(self, name), at_least=1)
        for name in ("min_new_tokens", "min_length", "top_k", "pad_token_id", "bos_token_id"):
            _check_int(name, getattr(self, name), at_least=0)
        if not isinstance(self.eos_token_id, Integral | None) and not _is_sequence_of(self.eos_token_id, Integral):
            raise ValueError(f"eos_token_id must be an id or a list of ids, but is {self.eos_token_id!r}")
        for token in self.eos_ids:
            _check_int("eos_token_id", token, at_least=0)
        _check_real("temperature", self.temperature, "at least 0", lambda x: x >= 0)
        _check_real("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _check_real("min_p", self.min_p, "at least 0 and at most 1", lambda x: 0 <= x <= 1)
        _check_real("repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0)
        if self.stop_strings is not None and (
            not _is_sequence_of(self.stop_strings, str) or not all(self.stop_strings)
        ):
            raise ValueError(f"stop_strings must be non-empty strings, but is {self.stop_strings!r}")


def _plain(value: Any) -> Any:
    """A NumPy or torch number or array as Python has it."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_neutral(name: str, value: Any) -> bool:
    """Whether this value of one of _NEUTRAL changes nothing. Only plain values compare to a truth."""
    return isinstance(value, bool | int | float | None) and value in _NEUTRAL[name]


def _check_int(name: str, value: Any, at_least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, but is {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, but is {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, but is {value}")


def _check_real(name: str, value: Any, accepted: str, is_accepted: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, but is {value!r}")
    if not math.isfinite(value) or not is_accepted(value):
        raise ValueError(f"{name} must be {accepted}, but is {value}")


def _is_sequence_of(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, kind) for v in value)
