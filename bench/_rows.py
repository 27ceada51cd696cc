"""The file of a GPU run's rows, one line of JSON each: on disk before anybody is told of it, and whole lines only,
whoever is killed when. Demands a POSIX system (locks); leaves the running of parts to _running.py."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

ROWS, PART = "LEAKFAST_ROWS", "LEAKFAST_PART"  # in the environment of a part: the file, and the part's name
MOST_CHARACTERS = 300  # of an error's words in a row


class Lost:
    """A context that keeps an error to itself: `why` is None, or the kind and the first line of what went wrong, so
    that one row that fails loses itself only. Leaves KeyboardInterrupt and SystemExit alone."""

    why: str | None = None

    def __enter__(self) -> Lost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        words = (str(error).splitlines() or [""])[0][:MOST_CHARACTERS]
        self.why = f"{type(error).__name__}: {words}"
        return True


def line_of(record: dict[str, Any]) -> str:
    """The record as one line of strict JSON: a number that is not finite is null, and `not_finite` names its place."""
    places: list[str] = []
    plain = _finite(record, "", places)
    if places:
        plain["not_finite"] = places
    return json.dumps(plain, sort_keys=True, allow_nan=False)


def told(line: str) -> str:
    """The line with the part that this process is (PART), added to the file of rows (ROWS) where the environment
    names one. Returns it as it stands in the file."""
    if not (place := os.environ.get(ROWS)):
        return line
    line = line_of({"part": os.environ.get(PART, ""), **json.loads(line)})
    append(Path(place), line)
    return line


def append(path: Path, line: str) -> None:
    """Adds a line. The file is written anew beside itself, synced and put in its own place, under a lock of its
    folder: readers, and whoever kills the writer, find the lines as they were before or after, never half of one."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        new = path.with_name(f".{path.name}.new")
        with new.open("wb") as file:
            file.write((path.read_bytes() if path.exists() else b"") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        os.fsync(folder)
    finally:
        os.close(folder)  # and with it the lock


def rows_in(path: Path) -> list[dict[str, Any]]:
    """What stands in the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_in(line: str) -> dict[str, Any] | None:
    """The record of a line of JSON that somebody printed; None for any other line, and for half of one."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _finite(value: Any, place: str, places: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _finite(inner, f"{place}.{key}" if place else str(key), places)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_finite(inner, f"{place}.{at}", places) for at, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place)
        return None
    return value
