"""A run that is only looked at, beside a process that may be writing it: no lock is taken and no byte is changed. Demands a
run directory; leaves setting damaged files aside to `storage.run`, and what is in them to the readers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leakfast.storage import layout
from leakfast.storage.run import Run

log = logging.getLogger("leakfast.store")

_LOCKS = Path("/proc/locks")  # of this machine, where the system tells them


class ReadOnlyRun(Run):
    """A run whose every change is a ValueError. A file whose bytes do not match the manifest is left where it is and
    counts as absent; `set_aside` names them. A damaged manifest is read from log.jsonl, in memory alone."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.set_aside: dict[str, str] = {}  # relative path → why it does not count

    @contextlib.contextmanager
    def lock(self) -> Iterator[Run]:
        raise ValueError(f"{self.path}: this run is only read; lock() belongs to those that write")
        yield self

    def log(self, event: str, **fields: Any) -> None:
        raise ValueError(f"{self.path}: this run is only read; {event} cannot be logged")

    def _strike_out(self, relpath: str, found: str) -> None:
        if relpath not in self.set_aside:
            log.warning("%s: %s: %s; it is left out", self.path, relpath, found)
        self.set_aside[relpath] = found

    def _rebuild(self, path: Path) -> dict[str, Any]:
        if self._manifest is None:
            log.warning("%s: damaged; read from %s", path, layout.JOURNAL)
        self._manifest = self._from_log()
        return self._manifest


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
        return holder if _lives(holder) else None
    return holder if any(_is_of(words, inode) for words in held) else None


def _is_of(words: list[str], inode: int) -> bool:
    """Whether a line of /proc/locks is a lock of flock(2) on the file of that inode."""
    return "FLOCK" in words and any(
        word.rpartition(":")[2] == str(inode) for word in words if word.count(":") == 2
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
