"""Steps of a run, each done once: a step whose inputs have not changed and whose files are intact is skipped. Demands a run
directory that is locked; leaves what a step does to others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from leakfast.progress import Progress
from leakfast.storage.run import Run

log = logging.getLogger("leakfast.run")

Shown = Callable[[str], AbstractContextManager[Progress]]  # title → progress inside the block


@contextmanager
def silent(title: str) -> Iterator[Progress]:
    yield lambda done, total, what="": None


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
    ) -> None:
        """`work`, unless `key` is done with these inputs (a hash) and its files are intact; again: in any case."""
        if not again and self.run.stage_done(key, inputs):
            self.took[key] = None
            log.info("%s: done before", key)
            return
        with self.timed(key) as report:
            work(report)
        self.run.mark_done(key, inputs, files=list(files))
        log.info("%s: %.0f s", key, self.took[key])
