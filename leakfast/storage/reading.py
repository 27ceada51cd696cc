"""A run directory as it was at one moment, for a reader beside the process that fills it. Demands a run; writes
nothing into it, takes no lock, moves no damaged file away: that is left to `Run`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leakfast.errors import StoreError
from leakfast.storage import layout
from leakfast.storage.disk import stamp_of
from leakfast.storage.run import Run, parse_manifest


class Reading(Run):
    """The run that the manifest told of when this object was first asked; shards that come later are not in it, and one
    whose bytes are others by now counts as absent. Whatever would write raises StoreError.

    before: an earlier reading of the same run, whose checked files are not hashed again where they did not change."""

    def __init__(self, path: str | Path, before: Reading | None = None):
        super().__init__(path)
        if before is not None:
            self._verified = dict(before._verified)
        self.version = version(path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[Run]:
        """Raises StoreError, for a reading has nothing to write."""
        raise self._refusal()
        yield self

    def log(self, event: str, **fields: Any) -> None:
        """Raises StoreError, for a reading has nothing to write."""
        raise self._refusal()

    def retire(self, relpath: str, reason: str) -> None:
        """Raises StoreError, for a reading has nothing to write."""
        raise self._refusal()

    def _refusal(self) -> StoreError:
        return StoreError(
            f"{self.path}: was opened to be read, and is not written. Open it with Run to write into it."
        )

    def _strike_out(self, relpath: str, found: str) -> None:
        """It is in no answer of this reading; who writes the run finds it out for itself."""

    def _load(self) -> dict[str, Any]:
        if self._manifest is None:
            path = self.path / layout.MANIFEST
            told = parse_manifest(path.read_bytes()) if path.is_file() else None
            self._manifest = told or self._from_log()
        return self._manifest


def version(path: str | Path) -> str:
    """16 hex digits that change when the run's manifest does; made from its inode, size and time, so it costs nothing."""
    try:
        stamp = stamp_of(Path(path) / layout.MANIFEST)
    except FileNotFoundError:
        stamp = (0, 0, 0)
    return hashlib.sha256(repr(stamp).encode()).hexdigest()[:16]
