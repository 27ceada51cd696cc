"""Lines that must outlive a crash: appended, fsynced, each with a checksum, so that a torn or damaged line is
noticed and read by nobody. Demands a path that may be written; leaves to the asker what a line says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leakfast.storage.disk import explained


def append(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Entries as lines at the end of `path`, on the disk when this returns. Raises StoreError."""
    lines = b"".join(_line(entry) for entry in entries)
    if not lines:
        return
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                lines = b"\n" + lines  # a crash tore the last line: keep these apart
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(entries whose checksum holds, in order; number of damaged lines)."""
    if not path.is_file():
        return [], 0
    good, damaged = [], 0
    for line in path.read_bytes().splitlines():
        if not line.strip():
            continue
        entry = _entry(line)
        if entry is None:
            damaged += 1
        else:
            good.append(entry)
    return good, damaged


def _line(entry: dict[str, Any]) -> bytes:
    body = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    return f"{_check(body)} {body}\n".encode("ascii")


def _entry(line: bytes) -> dict[str, Any] | None:
    check, _, body = line.decode("ascii", "replace").partition(" ")
    if _check(body) != check:
        return None
    try:
        entry = json.loads(body)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _check(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]
