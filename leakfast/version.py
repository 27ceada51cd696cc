"""The version of this package, which pyproject.toml and the files that a run leaves take from here, and the commit it is at
where it runs from its repository."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.1.0"
_SOURCES = (".py", ".html", ".js", ".css", ".toml", ".json", ".jsonl")


def commit() -> str | None:
    """The commit of the repository that this package lies in, " with changes" after it where files of it differ from that
    commit; None for an installed package or where git is not there."""
    root = Path(__file__).resolve().parent.parent
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    at = _said(git, root, "rev-parse", "HEAD")
    changes = _said(git, root, "status", "--porcelain", "--untracked-files=no")
    if at is None or changes is None:
        return None
    return f"{at} with changes" if changes else at


@cache
def maker() -> tuple[str, str | None]:
    """Version and `commit()` of the leakfast that runs, as they were when it was first asked."""
    return __version__, commit()


@cache
def source_hash() -> str:
    """SHA-256 (hex) over the names and bytes of what this package is written in, and of the settings and pages it ships: what it
    makes of the same input may be another where that differs."""
    package, digest = Path(__file__).resolve().parent, hashlib.sha256()
    roots = [package] if (package / "_configs").is_dir() else [package, package.parent / "configs"]
    for root in roots:
        for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCES):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root.parent)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _said(git: str, root: Path, *words: str) -> str | None:
    """What git says of the repository; None where it refuses or takes 10 s."""
    try:
        done = subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
