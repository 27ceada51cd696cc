"""Pictures of a run as files, one name for each. Demands what `of_run` drew; leaves saying what was written to callers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leakfast.figures.of_run import Choices, Drawn, draw
from leakfast.figures.style import pdf, png, svg
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.disk import atomic_write
from leakfast.storage.run import Run

WRITERS = {"png": png, "pdf": pdf, "svg": svg}


def write(
    run: Run, one: Drawn, formats: Sequence[str], width: str = "page", out: Path | None = None
) -> list[Path]:
    """A picture in each of `formats`, as <kind>-<behavior>-<width>.<format> in RUN/figures or `out`; none where there is no
    picture. Raises StoreError where it cannot be written."""
    if one.figure is None:
        return []
    name = "-".join(filter(None, (one.kind, one.behavior, width)))
    files = []
    for kind in formats:
        data = WRITERS[kind](one.figure)
        if out is None:
            files.append(run.add_file(f"{layout.FIGURES}/{name}.{kind}", data))
        else:
            files.append(out / f"{name}.{kind}")
            atomic_write(files[-1], data)
    return files


def write_all(run: Run, stats: Stats, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Every picture that the run has, as wide as a page."""
    return [path for one in draw(run, stats, choices=Choices()) for path in write(run, one, formats)]
