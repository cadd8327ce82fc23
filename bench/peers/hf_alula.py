"""transformers models that alula.integrations.transformers has accelerated, through transformers' own interface."""

from __future__ import annotations

from typing import Any

from .base import Missing, Setup
from .encoders import HFEncoder
from .hf import HFEager


def _accelerated(model: Any) -> Any:
    try:
        from alula.integrations.transformers import accelerate_model
    except ImportError as error:
        raise Missing(str(error)) from error
    return accelerate_model(model)


def _versions(host: dict[str, str]) -> dict[str, str]:
    import alula

    return {"alula": alula.__version__, **host}


class HFAlula(HFEager):
    """AutoModelForCausalLM from the folder, accelerated."""

    def load(self, setup: Setup) -> Any:
        """The model of transformers with alula's forward methods on it."""
        return _accelerated(super().load(setup))

    @property
    def versions(self) -> dict[str, str]:
        """alula, transformers and torch."""
        return _versions(super().versions)


class HFAlulaEncoder(HFEncoder):
    """AutoModel from the folder, accelerated."""

    def load(self, setup: Setup) -> Any:
        """The model of transformers with alula's forward methods on it."""
        return _accelerated(super().load(setup))

    @property
    def versions(self) -> dict[str, str]:
        """alula, transformers and torch."""
        return _versions(super().versions)
