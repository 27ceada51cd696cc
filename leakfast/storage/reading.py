"""A run that is only looked at, as it is or as it was at one moment, beside a process that may be writing it: no lock is
taken and no byte is changed. Demands a run directory; leaves setting damaged files aside to `storage.run`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from leakfast.errors import StoreError
from leakfast.storage import layout
from leakfast.storage.disk import lives, stamp_of
from leakfast.storage.run import Run

log = logging.getLogger("leakfast.store")

_LOCKS = Path("/proc/locks")  # of this machine, where the system tells them


class ReadOnlyRun(Run):
    """A run whose every change is a StoreError. A file whose bytes do not match the manifest is left where it is and
    counts as absent; `set_aside` names them. A damaged manifest is read from log.jsonl, in memory alone."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.set_aside: dict[str, str] = {}  # relative path → why it does not count

    @contextlib.contextmanager
    def lock(self) -> Iterator[Run]:
        raise self._refusal()
        yield self

    def log(self, event: str, **fields: Any) -> None:
        raise self._refusal()

    def retire(self, relpath: str, reason: str) -> None:
        raise self._refusal()

    def _refusal(self) -> StoreError:
        return StoreError(
            f"{self.path}: was opened to be read, and is not written. Open it with Run to write into it."
        )

    def _strike_out(self, relpath: str, found: str) -> None:
        if relpath not in self.set_aside:
            log.warning("%s: %s: %s; it is left out", self.path, relpath, found)
        self.set_aside[relpath] = found

    def _rebuild(self, path: Path) -> dict[str, Any]:
        if self._manifest is None:
            log.warning("%s: damaged; read from %s", path, layout.JOURNAL)
        self._manifest = self._from_log()
        return self._manifest


class Part(Run):
    """A run as it looks without some of its files: neither its manifest nor what reads it knows them. All else, its writing and
    what becomes of damaged files too, is `run`'s own."""

    def __init__(self, run: Run, left_out: Collection[str]):
        super().__init__(run.path)
        self._whole, self._left_out = run, frozenset(left_out)
        self._verified, self._mutex = run._verified, run._mutex  # threads write by both one at a time
        self._told: tuple[dict[str, Any], dict[str, Any]] | None = (
            None  # the whole manifest, and this part of it
        )

    @property
    def manifest(self) -> dict[str, Any]:
        whole = self._whole.manifest
        if self._told is None or self._told[0] is not whole:
            kept = {path: entry for path, entry in whole["shards"].items() if path not in self._left_out}
            self._told = whole, {**whole, "shards": kept}
        return self._told[1]

    @contextlib.contextmanager
    def lock(self) -> Iterator[Run]:
        with self._whole.lock():
            yield self

    def _load(self) -> dict[str, Any]:
        return self._whole._load()

    def _strike_out(self, relpath: str, found: str) -> None:
        self._whole._strike_out(relpath, found)


class Reading(ReadOnlyRun):
    """The run that the manifest told of when this object was first asked; shards that come later are not in it, and one
    whose bytes are others by now counts as absent.

    before: an earlier reading of the same run, whose checked files are not hashed again where they did not change."""

    def __init__(self, path: str | Path, before: Reading | None = None):
        super().__init__(path)
        if before is not None:
            self._verified = dict(before._verified)
        self.version = version(path)

    def _load(self) -> dict[str, Any]:
        return super()._load() if self._manifest is None else self._manifest


def version(path: str | Path) -> str:
    """16 hex digits that change when the run's manifest does; made from its inode, size and time, so it costs nothing."""
    try:
        stamp = stamp_of(Path(path) / layout.MANIFEST)
    except FileNotFoundError:
        stamp = (0, 0, 0)
    return hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]


def writer(run: Run) -> int | None:
    """The process that holds the run's lock, None where none does; found without touching the lock.

    Linux lists locks in /proc/locks; elsewhere, and where that says nothing, it is the process that .lock names, if it
    lives (a process that ended and whose number another has taken is then mistaken for it)."""
    path = run.path / ".lock"
    try:
        holder, inode = (
            int(path.read_text(encoding="ascii", errors="replace").strip() or 0),
            path.stat().st_ino,
        )
    except (OSError, ValueError):
        return None
    if holder <= 0:
        return None
    try:
        held = [line.split() for line in _LOCKS.read_text(encoding="ascii").splitlines()]
    except OSError:
        return holder if lives(holder) else None
    return holder if any(_is_of(words, inode) for words in held) else None


def _is_of(words: list[str], inode: int) -> bool:
    """Whether a line of /proc/locks is a lock of flock(2) on the file of that inode."""
    return "FLOCK" in words and any(
        word.rpartition(":")[2] == str(inode) for word in words if word.count(":") == 2
    )
