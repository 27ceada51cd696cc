"""What a check of a run tells: how much was looked at, what cannot be trusted, what could not be looked at. Demands nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Check:
    """One thing that was looked at. name; checked, unit: how many of what; wrong: a sentence for each thing that cannot be
    trusted; notes: what was left out, and why."""

    name: str
    unit: str
    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verified:
    """The checks of a run, in order."""

    run: Path
    checks: tuple[Check, ...]

    @property
    def wrong(self) -> list[str]:
        """Everything that cannot be trusted."""
        return [sentence for check in self.checks for sentence in check.wrong]
