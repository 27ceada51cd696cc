"""Steps of a run, each done once: a step whose inputs have not changed and whose files are intact is skipped. Demands a run
directory that is locked; leaves what a step does to others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.progress import Progress
from leakfast.storage.run import Run

if TYPE_CHECKING:
    from leakfast.stats import Stats

log = logging.getLogger("leakfast.run")

SHOWN = "tables, figures, report"  # the last step, as the journal calls it

Shown = Callable[[str], AbstractContextManager[Progress]]  # title → progress inside the block


@contextmanager
def silent(title: str) -> Iterator[Progress]:
    yield lambda done, total, what="": None


@dataclass
class Outcome:
    """What a run did. `stages`: name → seconds, null where it was done before."""

    run: Path
    stats: Stats
    report: Path
    stages: dict[str, float | None] = field(default_factory=dict)


class Steps:
    """took: name → seconds, None where it was done before."""

    def __init__(self, run: Run, progress: Shown = silent) -> None:
        self.run, self.progress = run, progress
        self.took: dict[str, float | None] = {}

    @contextmanager
    def timed(self, name: str, shown: Shown | None = None) -> Iterator[Progress]:
        """Progress under that title (shown: in another way), and its seconds in `took` and the journal."""
        began = time.monotonic()
        with (shown or self.progress)(name) as report:
            yield report
        self.took[name] = time.monotonic() - began
        self.run.log("took", step=name, seconds=round(time.monotonic() - began, 3))

    def do(
        self,
        key: str,
        inputs: str,
        work: Callable[[Progress], None],
        files: Sequence[str],
        *,
        again: bool = False,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """`work`, unless `key` is `done` with these inputs (a hash) and its files are intact; again: in any case. told: what else
        it follows from, kept with it."""
        told = told or {}
        if not again and self.done(key, inputs, told):
            self.took[key] = None
            log.info("%s: done before", key)
            return
        with self.timed(key) as report:
            work(report)
        self.run.mark_done(key, inputs, files=list(files), **told)
        log.info("%s: %.0f s", key, self.took[key])

    def done(self, key: str, inputs: str, told: Mapping[str, Any]) -> bool:
        """Whether the step was done with these inputs and what is told now. What earlier versions did not keep passes."""
        if not self.run.stage_done(key, inputs):
            return False
        kept = self.run.manifest["stages"][key]["outputs"]
        return all(kept.get(name) in (None, value) for name, value in told.items())
