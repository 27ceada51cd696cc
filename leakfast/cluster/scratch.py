"""Folders of workers, outside every run. Demands a temporary folder; clears away those whose process was killed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from leakfast.storage.disk import lives

_PREFIX = "leakfast-workers-"


def folder() -> Path:
    """A new empty folder of this process."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_PREFIX}*"):
        owner = re.match(rf"{_PREFIX}(\d+)-", left.name)
        if owner and not lives(int(owner[1])):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
