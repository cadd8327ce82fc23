"""What was replaced in a model, what was left, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Left", "Replaced", "Report"]


@dataclass(frozen=True)
class Replaced:
    """``count`` modules of a kind below ``where`` that alula now computes; ``nbytes`` of packed copies."""

    where: str
    what: str
    count: int
    by: str
    nbytes: int


@dataclass(frozen=True)
class Left:
    """Modules that stay as transformers made them."""

    where: str
    what: str
    why: str


@dataclass
class Report:
    """The outcome of ``accelerate``; ``print(report)`` says it in words.

    Attributes:
        model: class of the model. versions: library -> version. replaced, left: see there. released_bytes: of the
            model's own matrices that were given up (``keep_weights=False``).
    """

    model: str
    versions: dict[str, str]
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    states: list[Any] = field(default_factory=list, repr=False)
    released_bytes: int = 0

    @property
    def fast_calls(self) -> int:
        """Passes of the decoders (or encoders) that ran on alula so far; passes of compiled code are not counted."""
        return sum(state.fast for state in self.states if hasattr(state, "plain"))

    @property
    def plain_calls(self) -> dict[str, int]:
        """Why -> passes that ran on transformers' own blocks so far."""
        return dict(sum((state.plain for state in self.states if hasattr(state, "plain")), Counter()))

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed copies, beside the model's own parameters."""
        return sum(item.nbytes for item in self.replaced)

    def __str__(self) -> str:
        libraries = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"alula accelerates this {self.model} ({libraries})"]
        for item in self.replaced:
            where = f" in {item.where}" if item.where else ""
            lines.append(f"  replaced  {item.count:>4} x {item.what}{where} -> {item.by}, {item.nbytes / 1e6:.1f} MB")
        for item in self.left:
            lines.append(f"  left      {item.what} {item.where}: {item.why}")
        if self.released_bytes:
            lines.append(
                f"  given up  {self.released_bytes / 1e6:.1f} MB of the model's own matrices; restore makes them again"
            )
        lines.append(f"  calls     {self.fast_calls} on alula, {sum(self.plain_calls.values())} on transformers")
        lines += [f"              {count} of those: {why}" for why, count in self.plain_calls.items()]
        return "\n".join(lines)
