"""A system that refuses to write: files that may not grow, disks that are small, permissions that root has to keep as well.
Demands Linux or another Unix; holds no tests."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_VERSION_3 = 0x20080522  # of capget(2)
_PASS_OVER = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses what would make a file larger (EFBIG) while the block lasts; Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def as_any_user() -> Iterator[None]:
    """Root, to whom no folder is closed, gives up the rights to pass over permissions while the block lasts, in this thread."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head, rights = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, rights) == 0
    effective = rights[0]
    rights[0] &= ~_PASS_OVER
    assert libc.capset(head, rights) == 0
    try:
        yield
    finally:
        rights[0] = effective
        assert libc.capset(head, rights) == 0


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[Path]:
    """A file system of that size while the block lasts; skips where none may be mounted."""
    folder.mkdir()
    if not _mount("-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)):
        pytest.skip("a file system of limited size cannot be mounted here (needs the right to mount)")
    try:
        yield folder
    finally:
        subprocess.run([shutil.which("umount") or "umount", str(folder)], check=True)


def grow(disk: Path, n_bytes: int) -> None:
    assert _mount("-o", f"remount,size={n_bytes}", str(disk))


def _mount(*words: str) -> bool:
    mount = shutil.which("mount")
    return (
        mount is not None
        and subprocess.run([mount, *words], capture_output=True, check=False).returncode == 0
    )
