"""Files written whole or not at all, their hashes, and the system's refusals put into words.
Demands nothing but a folder; leaves what is written to the run store and the stages."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import StoreError

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger("leakfast.store")

_LEFT = re.compile(r"\..+\.(\d+)\.(?:tmp|old)(?:\..+)?")  # a name, a process, what it is, a suffix
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust spells the system's refusals


def atomic_write(path: str | Path, content: bytes | Callable[[Path], Any]) -> None:
    """Write `path` whole or not at all: temporary file beside it, fsync, rename, fsync of the folder.

    content: the bytes, or a function that writes the file whose path it is given (same suffix).
    Folders on the way are made. Raises StoreError naming the path and the remedy."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                content(temporary)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def remove_left(folder: Path) -> None:
    """Remove what writers that were killed, or were not let, left half-written under `folder`, however large: temporary files
    and folders of processes that are gone."""
    found = ((path, _LEFT.fullmatch(path.name)) for path in folder.rglob(".*"))
    left = [path for path, of in found if of and not lives(int(of[1]))]
    for path in left:
        with contextlib.suppress(OSError):  # it counts for nothing where it lies
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if left:
        log.info("%s: %d files and folders that were left half-written are removed", folder, len(left))


def lives(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def sync_file(path: Path) -> None:
    """Return when a file and its name are on the disk. Raises StoreError."""
    with explained(path):
        _sync(path)
        _sync(path.parent)


def write_parquet(path: str | Path, frame: pl.DataFrame) -> None:
    """`frame` as zstd Parquet at `path`, atomically. Raises StoreError."""
    atomic_write(path, parquet_bytes(frame))


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(*parts: object) -> str:
    """SHA-256 of the parts as JSON, as hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def parquet_bytes(frame: pl.DataFrame) -> bytes:
    """`frame` as the bytes of a zstd Parquet file."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()


def stamp_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file does: inode, size in bytes, time of change in ns."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def free_name(path: Path) -> Path:
    """`path`, or `path.2`, `path.3`, … if it is taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into StoreErrors, those that safetensors tells of too."""
    try:
        yield
    except _refusals() as error:
        if (refusal := _of_system(error)) is None:
            raise
        raise store_error(path, refusal) from error


def _refusals() -> tuple[type[BaseException], ...]:
    """OSError, and the error of safetensors, which is none; where that is not loaded it has written nothing."""
    library = sys.modules.get("safetensors")
    return (OSError,) if library is None else (OSError, library.SafetensorError)


def _of_system(error: BaseException) -> OSError | None:
    """The system's refusal that an error tells of; None where it is about something else."""
    if isinstance(error, OSError):
        return error
    code = _OS_ERROR.search(str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def store_error(path: Path, error: OSError) -> StoreError:
    """The StoreError for `error` while writing `path`, with what to do about it."""
    remedy = {
        errno.ENOSPC: "Free some space and run the same command again: what is written stays.",
        errno.EDQUOT: "Free some of your quota and run the same command again: what is written stays.",
        errno.EROFS: "Give a run directory on a file system that can be written (LEAKFAST_RUNS=FOLDER).",
        errno.ENOTDIR: "A file stands where a folder is needed: move it, or give another run directory.",
    }.get(
        error.errno or 0,
        f"Make {path.parent} writable for you, or set LEAKFAST_RUNS=FOLDER to keep runs elsewhere.",
    )
    return StoreError(f"{path}: cannot be written: {error.strerror or error}. {remedy}")
