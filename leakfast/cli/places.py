"""Places on the command line: runs as arguments (a folder, or s3://bucket/prefix, which is fetched to the cache and read there),
and where a command is to write, looked at before it does anything. Demands nothing; leaves writing to the commands."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from leakfast.errors import InputError


class _Run(click.Path):
    """A folder's path; of an address the path of its copy."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from leakfast.storage.mirror import reading_copy
        from leakfast.storage.objects import address_of

        if address_of(value) is not None:
            return reading_copy(value)
        return super().convert(value, param, ctx)


class _Written(click.Path):
    """The path of a file, or of a folder, that is to be written."""

    def __init__(self, *, folder: bool) -> None:
        super().__init__(path_type=Path)
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from leakfast.storage.objects import address_of

        path, options = super().convert(value, param, ctx), getattr(param, "opts", ())
        if not self.folder or address_of(path) is None:  # which the run tells of
            check(
                path,
                f"{ctx.info_name if ctx else 'leakfast'}: {next(iter(options), 'the place')}",
                self.folder,
            )
        return path


def check(path: Path, named: str, folder: bool = False) -> Path:
    """`path`, where a file (folder: a folder) can be written; nothing is left behind. named: what the message begins with. Raises
    InputError."""
    if folder and path.exists() and not path.is_dir():
        raise InputError(
            f"{named} {path} is a file, but a folder is to be written there. Give a folder's name."
        )
    if not folder and path.is_dir():
        raise InputError(
            f"{named} {path} is a folder, but a file is to be written there. Give a file's name in it."
        )
    place = path if folder else path.parent
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        with tempfile.TemporaryFile(dir=place):
            return path
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # which is no mistake of typing, and may have an end
            return path
        raise InputError(
            f"{named} {path} cannot be written: {error.strerror or error}. Needed: a place in a folder that you may write to. "
            "Give another."
        ) from error


RUN = _Run(path_type=Path)
FILE_OUT = _Written(folder=False)
FOLDER_OUT = _Written(folder=True)
