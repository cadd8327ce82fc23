"""A transformers model made faster by one line, on this instance only, reversibly.

    import alula.integrations.transformers as at
    report = at.accelerate(model)   # GPT-2, GPTBigCode, CodeGen, BigBird: any of their classes
    print(report)                   # what was replaced, what was left and why
    at.restore(model)               # bit for bit what it was

Importing this module also registers the attention implementation "alula" with transformers (GPT-2 and GPTBigCode:
``from_pretrained(path, attn_implementation="alula")``); nothing else about transformers changes.
"""

from __future__ import annotations

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "alula.integrations.transformers needs the transformers library: pip install 'alula[transformers]'"
    ) from error

from alula.integrations.transformers import attention, versions

versions.check()

from alula.integrations.transformers.accelerate import accelerate, accelerate_model, refresh, restore  # noqa: E402
from alula.integrations.transformers.cache import make_cache  # noqa: E402
from alula.integrations.transformers.report import Left, Replaced, Report  # noqa: E402

__all__ = [
    "Left",
    "Replaced",
    "Report",
    "accelerate",
    "accelerate_model",
    "make_cache",
    "refresh",
    "restore",
]

attention.register()
