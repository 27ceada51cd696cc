"""Pictures of a run as files, one name for each. Demands what `of_run` drew; leaves saying what was written to callers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leakfast.figures.of_run import Drawn, pictures
from leakfast.figures.style import pdf, png, svg
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.disk import atomic_write
from leakfast.storage.run import Run

WRITERS = {"png": png, "pdf": pdf, "svg": svg}


def write(
    run: Run,
    one: Drawn,
    formats: Sequence[str],
    width: str = "page",
    out: Path | None = None,
    drawn_of: str | None = None,
) -> list[Path]:
    """A picture in each of `formats`, as <kind>-<behavior>-<width>.<format> in RUN/figures or `out`; none where there is no
    picture. drawn_of: hash of what it is drawn of, kept in the run's manifest. Raises StoreError where it cannot be written."""
    if one.figure is None:
        return []
    files, about = [], {} if drawn_of is None else {"drawn_of": drawn_of}
    for kind in formats:
        data, name = WRITERS[kind](one.figure), _name(one.kind, one.behavior, width, kind)
        if out is None:
            files.append(run.add_file(f"{layout.FIGURES}/{name}", data, **about))
        else:
            files.append(out / name)
            atomic_write(files[-1], data)
    return files


def write_all(
    run: Run, stats: Stats, formats: Sequence[str] = ("png", "pdf"), drawn_of: str | None = None
) -> list[Path]:
    """Every picture that the run has, as wide as a page; those that are there, intact and drawn of what `drawn_of` is the hash
    of, are not drawn again."""
    files = []
    for picture in pictures(run, stats):
        there = [f"{layout.FIGURES}/{_name(picture.kind, picture.behavior, 'page', f)}" for f in formats]
        if drawn_of is not None and all(run.has(path) and _drawn_of(run, path) == drawn_of for path in there):
            files += [run.path / path for path in there]
        else:
            files += write(run, picture.draw(), formats, drawn_of=drawn_of)
    return files


def _name(kind: str, behavior: str | None, width: str, form: str) -> str:
    return f"{'-'.join(filter(None, (kind, behavior, width)))}.{form}"


def _drawn_of(run: Run, relpath: str) -> str | None:
    found: str | None = run.manifest["shards"][relpath].get("drawn_of")
    return found
