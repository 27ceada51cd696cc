"""Runs as arguments: a folder, or s3://bucket/prefix, which is fetched to the cache and read there. Demands nothing; leaves
writing to an object store to `leakfast run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class _Run(click.Path):
    """A folder's path; of an address the path of its copy."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from leakfast.storage.mirror import reading_copy
        from leakfast.storage.objects import address_of

        if address_of(value) is not None:
            return reading_copy(value)
        return super().convert(value, param, ctx)


RUN = _Run(path_type=Path)
