"""`verify`: what of a finished run can be trusted, by looking at it again. Demands a run directory; changes nothing in it.
Leaves setting aside and making again to the stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.errors import InputError
from leakfast.pipeline.checks import again, files, rows, tables
from leakfast.pipeline.checks.contract import Check, Verified
from leakfast.progress import Progress
from leakfast.storage import layout
from leakfast.storage.reading import ReadOnlyRun
from leakfast.study.config import load_study

if TYPE_CHECKING:
    from leakfast.storage.run import Run
    from leakfast.study.config import Study

__all__ = ["Check", "Verified", "verify"]


def verify(
    path: str | Path, *, study: str | Path | None = None, sample: int = 0, progress: Progress | None = None
) -> Verified:
    """Look again at everything that a run's numbers rest on, and change nothing.

    Bytes against the hashes of the manifest, journal lines against their checks, study.toml, centroids and adapters against
    their own hashes, rows against what the study asks for (none missing, none twice), rates and cosines against what the
    measurements give now. sample: so many shards, drawn by lot, are measured again and compared (needs the model). study: the
    study's own file, where it names files beside it; the settings must be the run's. Raises InputError for a path that is no
    run, and for a study of another hash."""
    run = ReadOnlyRun(path)
    run.open()
    asked, why = _study(run, study)
    made = []
    for number, check in enumerate(_checks(run, asked, why, sample), 1):
        made.append(check)
        if progress is not None:
            progress(number, 7, check.name)
    return Verified(run.path, tuple(made))


def _checks(run: ReadOnlyRun, study: Study | None, why: str, sample: int) -> Iterator[Check]:
    yield files.bytes_of(run)
    yield files.journal(run)
    yield files.study(run, why)
    yield files.adapters(run)
    yield rows.check(run, study)
    yield tables.check(run)
    yield again.check(run, study, sample)


def _study(run: Run, given: str | Path | None) -> tuple[Study | None, str]:
    """The run's study, and why it cannot be read as it lies there."""
    kept = run.path / layout.STUDY
    if given is not None:
        study = load_study(given)
        if kept.is_file() and study.raw_text != kept.read_text(encoding="utf-8", errors="replace"):
            raise InputError(
                f"verify: --study {given} given, but its settings are not those of {kept}. Give the file that the run was "
                "made with, or leave --study out."
            )
        return study, ""
    if not kept.is_file():
        return None, "the run was made without a study"
    try:
        return load_study(kept), ""
    except InputError as error:
        return None, " ".join(error.message.split())
