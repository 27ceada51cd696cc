"""Archives on their way to a folder, on every Python that the project takes."""

from __future__ import annotations

import tarfile
from pathlib import Path


def extracted(archive: tarfile.TarFile, to: Path) -> None:
    """What the archive holds, in the folder. 3.10.12 and 3.11.4 were the first that know filters."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(to, filter="data")
    else:
        archive.extractall(to)
