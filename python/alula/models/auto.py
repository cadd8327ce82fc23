"""AutoModel classes: the model class that a checkpoint's ``model_type`` names."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from alula.config import AutoConfig, PretrainedConfig
from alula.models.base import PreTrainedModel
from alula.models.big_bird import BigBirdModel
from alula.models.big_bird_heads import (
    BigBirdForMultipleChoice,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
)
from alula.models.big_bird_lm import BigBirdForCausalLM, BigBirdForMaskedLM, BigBirdForPreTraining
from alula.models.codegen import CodeGenForCausalLM, CodeGenModel
from alula.models.gpt2 import (
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from alula.models.gpt_bigcode import (
    GPTBigCodeForCausalLM,
    GPTBigCodeForSequenceClassification,
    GPTBigCodeForTokenClassification,
    GPTBigCodeModel,
)

__all__ = [
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "class_of",
]


class _AutoClass:
    """``classes``: model_type -> class."""

    classes: ClassVar[dict[str, type[PreTrainedModel]]] = {}

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not made directly; use {name}.from_pretrained(path) or {name}.from_config(config)")

    @classmethod
    def _class_for(cls, config: PretrainedConfig) -> type[PreTrainedModel]:
        if config.model_type not in cls.classes:
            raise ValueError(
                f"{cls.__name__} has no class for model_type {config.model_type!r}; accepted: {', '.join(cls.classes)}"
            )
        return cls.classes[config.model_type]

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """A model with random weights; see :meth:`PreTrainedModel.from_config`."""
        return cls._class_for(config).from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
        """Loads a folder into the class of its ``model_type``; see :meth:`PreTrainedModel.from_pretrained`."""
        config = kwargs.get("config")
        return cls._class_for(config or AutoConfig.from_pretrained(path)).from_pretrained(path, **kwargs)


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved from, by its ``architectures``; else its language model."""
    from alula import models

    for name in config.architectures or ():
        cls = getattr(models, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and issubclass(cls.config_class, type(config)):
            return cls
    auto = AutoModelForMaskedLM if config.model_type in AutoModelForMaskedLM.classes else AutoModelForCausalLM
    return auto._class_for(config)


class AutoModel(_AutoClass):
    """Base models."""

    classes: ClassVar = {
        "gpt_bigcode": GPTBigCodeModel,
        "gpt2": GPT2Model,
        "codegen": CodeGenModel,
        "big_bird": BigBirdModel,
    }


class AutoModelForCausalLM(_AutoClass):
    """Language models."""

    classes: ClassVar = {
        "gpt_bigcode": GPTBigCodeForCausalLM,
        "gpt2": GPT2LMHeadModel,
        "codegen": CodeGenForCausalLM,
        "big_bird": BigBirdForCausalLM,
    }


class AutoModelForMaskedLM(_AutoClass):
    """Fillers of masked tokens."""

    classes: ClassVar = {"big_bird": BigBirdForMaskedLM}


class AutoModelForMultipleChoice(_AutoClass):
    """Choosers among texts."""

    classes: ClassVar = {"big_bird": BigBirdForMultipleChoice}


class AutoModelForPreTraining(_AutoClass):
    """Models with all heads that they were pre-trained with."""

    classes: ClassVar = {
        "gpt_bigcode": GPTBigCodeForCausalLM,
        "gpt2": GPT2LMHeadModel,
        "big_bird": BigBirdForPreTraining,
    }


class AutoModelForQuestionAnswering(_AutoClass):
    """Finders of answers in a text."""

    classes: ClassVar = {"gpt2": GPT2ForQuestionAnswering, "big_bird": BigBirdForQuestionAnswering}


class AutoModelForSequenceClassification(_AutoClass):
    """Classifiers of whole sequences."""

    classes: ClassVar = {
        "gpt_bigcode": GPTBigCodeForSequenceClassification,
        "gpt2": GPT2ForSequenceClassification,
        "big_bird": BigBirdForSequenceClassification,
    }


class AutoModelForTokenClassification(_AutoClass):
    """Classifiers of tokens."""

    classes: ClassVar = {
        "gpt_bigcode": GPTBigCodeForTokenClassification,
        "gpt2": GPT2ForTokenClassification,
        "big_bird": BigBirdForTokenClassification,
    }
