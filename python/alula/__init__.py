"""alula: GPTBigCode, GPT-2, CodeGen and BigBird on hand-written kernels, from their Hugging Face checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from alula._version import __version__

if TYPE_CHECKING:  # what editors see
    from alula import ops
    from alula.block_plan import BlockPlan
    from alula.cache import *
    from alula.config import *
    from alula.generation_config import *
    from alula.models import *
    from alula.tokenization import *

# Where each public name lives. Modules are imported when a name of theirs is first used: `import alula` costs nothing.
_EXPORTS = {
    "alula": ["ops"],
    "alula.block_plan": ["BlockPlan"],
    "alula.cache": ["KVCache"],
    "alula.config": ["AutoConfig", "BigBirdConfig", "CodeGenConfig", "GPT2Config", "GPTBigCodeConfig"],
    "alula.generation_config": ["GenerationConfig"],
    "alula.models": [
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "BigBirdForCausalLM",
        "BigBirdForMaskedLM",
        "BigBirdForMultipleChoice",
        "BigBirdForPreTraining",
        "BigBirdForQuestionAnswering",
        "BigBirdForSequenceClassification",
        "BigBirdForTokenClassification",
        "BigBirdModel",
        "CodeGenForCausalLM",
        "CodeGenModel",
        "GPT2DoubleHeadsModel",
        "GPT2ForQuestionAnswering",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2LMHeadModel",
        "GPT2Model",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeForSequenceClassification",
        "GPTBigCodeForTokenClassification",
        "GPTBigCodeModel",
    ],
    "alula.tokenization": ["AutoTokenizer", "BigBirdTokenizer", "CodeGenTokenizer", "GPT2Tokenizer"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'alula' has no attribute {name!r}")
    value = (
        importlib.import_module(f"alula.{name}")
        if module == "alula"
        else getattr(importlib.import_module(module), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
