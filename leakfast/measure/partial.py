"""A journal beside every shard that is not whole yet, with its finished completions, so that a resumed run draws none
of them again. Demands the run's lock; leaves whole shards to the store, and which backend needs this to others."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from leakfast.generation.contract import Completion
from leakfast.storage import journal
from leakfast.storage.disk import explained

if TYPE_CHECKING:
    from leakfast.measure.shards import Job, Shard
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.evaluate")

SUFFIX = ".open"
_EVERY_S = 3.0  # between writes: what a kill costs beside what was in the engine


class Partial:
    """The open shards of a run's completions. As a context: what is not written yet is when the block ends.

    A line is {shard: its request's hash, at: [request, sample], token_ids, finish_reason}; lines of another request and
    damaged ones are not read, and their completions are drawn again. Raises StoreError."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._new: dict[Path, list[dict]] = {}
        self._written = time.monotonic()

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._write()

    def of(self, shard: Shard) -> list[Completion]:
        """Completions of a shard that an earlier run left, each (request, sample) once."""
        path = self._path(shard)
        entries, damaged = journal.read(path)
        mine = [entry for entry in entries if entry["shard"] in (shard.request, shard.older)]
        if damaged:
            log.warning("%s: %d damaged lines; what they told of is drawn again", path, damaged)
        if len(mine) < len(entries):
            log.warning("%s: %d completions by another request; drawn again", path, len(entries) - len(mine))
        found = {tuple(e["at"]): Completion(*e["at"], e["token_ids"], e["finish_reason"]) for e in mine}
        if entries and not mine:
            self.forget(shard)
        return list(found.values())

    def add(self, shard: Shard, completions: Sequence[Completion]) -> None:
        """Note completions; they are on the disk with the next that come a few seconds later."""
        self._new.setdefault(self._path(shard), []).extend(
            {
                "shard": shard.request,
                "at": [c.request, c.sample],
                "token_ids": c.token_ids,
                "finish_reason": c.finish_reason,
            }
            for c in completions
        )
        if time.monotonic() - self._written >= _EVERY_S:
            self._write()

    def forget(self, shard: Shard) -> None:
        """The shard is whole and in the manifest."""
        path = self._path(shard)
        self._new.pop(path, None)
        with explained(path):
            path.unlink(missing_ok=True)

    def _write(self) -> None:
        for path in list(self._new):
            journal.append(path, self._new[path])
            del self._new[path]
        self._written = time.monotonic()

    def _path(self, shard: Shard) -> Path:
        return _path(self.run, shard)


def tidy(run: Run, job: Job) -> None:
    """Remove lines that belong to no missing shard of the job."""
    missing = {_path(run, shard) for shard in job.missing}
    for path in (run.path / job.folder).glob(f"*{SUFFIX}"):
        if path not in missing:
            with explained(path):
                path.unlink(missing_ok=True)


def _path(run: Run, shard: Shard) -> Path:
    return run.path / f"{shard.relpath}{SUFFIX}"
