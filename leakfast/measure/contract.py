"""What every measurer takes and gives: the parts of a measurement, what came of each, and the count of what there is.
A further kind of measurement is one more class that does what `Measurer` says. Demands nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from leakfast.progress import Progress

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure.request import Asked, Target
    from leakfast.measure.shards import Job
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run


@dataclass
class Part:
    """One behavior's part of a measurement: a job a target, in order; what came of it."""

    asked: Asked
    jobs: list[Job]
    made: int = 0
    engine: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        return sum(shard.rows for job in self.jobs for shard in job.shards)

    @property
    def done(self) -> int:
        return sum(shard.rows for job in self.jobs for shard in job.shards if shard.done)

    @property
    def waiting(self) -> list[Path | None]:
        """Adapters (None: the base) with shards that are not there yet."""
        return [job.target.path for job in self.jobs if job.missing]


class Measurer(Protocol):
    """A kind of measurement: made of a loaded model, a request, a drawing and at what (see `measure`), when everything is
    checked that can be before anything is written."""

    made: str  # what is done to a shard, for messages: drawn, scored
    targets: list[Target]

    def parts(self, run: Run) -> list[Part]:
        """Every asked behavior's shards, there or missing."""

    def carry_out(self, run: Run, parts: list[Part], counter: Counter) -> None:
        """Make the missing shards, each written as soon as it is whole."""

    @staticmethod
    def rates(run: Run, measured: Measured, personas: Sequence[Persona], by: str) -> pl.DataFrame:
        """Schema `rates` of what was measured."""


@dataclass(frozen=True)
class Measured:
    """What measuring one behavior came to. questions: name of the set or list; folders: of every target, in order; made,
    kept: completions (of choices: prompts) measured now, and found intact from before or under another behavior; engine:
    backend, version and effective settings of the engine that drew completions, None where nothing was drawn."""

    behavior: str
    questions: str
    targets: tuple[Target, ...]
    folders: tuple[str, ...]
    made: int
    kept: int
    engine: dict[str, Any] | None = None

    @property
    def origins(self) -> dict[str, tuple[str | None, int | None]]:
        """Adapter → (source, seed)."""
        return {t.name: (t.source, t.seed) for t in self.targets if t.path is not None}


@dataclass
class Counter:
    """How much there is, out of all."""

    done: int
    total: int
    progress: Progress | None

    def add(self, n: int, what: str) -> None:
        self.done += n
        self.show(what)

    def show(self, what: str, inside: float = 0.0) -> None:
        """inside: measured of what is under way."""
        if self.progress is not None:
            self.progress(self.done + int(inside), self.total, what)
