"""What a run shows of what it measured: points of training, tables, report, pictures, each made where what it follows from has
changed. Demands a run whose stages are done; draws nothing itself, and loads nothing that draws where all is there."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.pipeline.steps import SHOWN, Outcome, Steps
from leakfast.stats import tables
from leakfast.storage import layout
from leakfast.storage.disk import file_hash, hash_of
from leakfast.storage.documents import find_shipped
from leakfast.version import source_hash

if TYPE_CHECKING:
    from leakfast.storage.run import Run
    from leakfast.study.config import Study

log = logging.getLogger("leakfast.run")

_DRAWN_BY = ("numpy", "polars", "matplotlib")
_TOLD = ("scipy", "jinja2", "torch", "transformers", "peft", "vllm")  # which the report names as well
_POINTS = layout.table("trajectory")
_SHOWN = (f"{layout.TABLES}/", f"{layout.FIGURES}/", layout.REPORT, layout.REPORT_AGAINST)


def show(run: Run, study: Study, steps: Steps) -> Outcome:
    """Tables, report and pictures of what is there, as the outcome of a run."""
    if is_shown(run, study):
        steps.took[SHOWN] = None
        log.info("%s: done before", SHOWN)
        return Outcome(run.path, tables.read(run), run.path / layout.REPORT, steps.took)
    from leakfast.figures.files import write_all
    from leakfast.report import report, trajectory

    with steps.timed(SHOWN) as shown:
        if not _points_are_there(run):
            trajectory.write(run, _points_hash(run))
        stats = tables.current(run)
        page, made_of = run.path / layout.REPORT, _page_hash(run, study)
        if _made_of(run, layout.REPORT) != made_of:
            report(run, stats, shown, made_of=made_of)
        drawn_of = _pictures_hash(run)
        files = write_all(run, stats, drawn_of=drawn_of)
        _set_aside(run, {str(file.relative_to(run.path)) for file in files})
        run.mark_done(layout.FIGURES, drawn_of, files=[str(file.relative_to(run.path)) for file in files])
    return Outcome(run.path, stats, page, steps.took)


def is_shown(run: Run, study: Study) -> bool:
    """Whether all of it is there, intact, and made of what the run holds now, by this very leakfast."""
    return (
        _points_are_there(run)
        and tables.is_current(run)
        and _made_of(run, layout.REPORT) == _page_hash(run, study)
        and _pictures_are_there(run)
    )


def _set_aside(run: Run, drawn: set[str]) -> None:
    """Move pictures to quarantine/ that an earlier call drew and that the run no longer has, as of a behavior that its study
    dropped. What `leakfast plot` drew stays."""
    there = [path for path in run.shards(layout.FIGURES) if path not in drawn]
    for path in there:
        if run.manifest["shards"][path].get("drawn_of") is not None:
            run.retire(path, "the run has no such picture any more")


def contents(run: Run) -> dict[str, str]:
    """What was measured and trained: path → SHA-256 of every intact file that is not shown, cards of adapters from elsewhere
    included."""
    found = {path: _sha(run, path) for path in run.shards() if not path.startswith(_SHOWN)}
    cards = run.path.glob(f"{layout.ADAPTERS}/*/{layout.CARD}")
    return found | {card.relative_to(run.path).as_posix(): file_hash(card) for card in cards}


def named_files(study: Study) -> dict[str, str]:
    """Path → SHA-256 of every file that a value of the study names."""
    files = (_file_of(text) for text in _texts(study.model_dump(mode="json")))
    return {str(path): file_hash(path) for path in files if path is not None}


def versions(*packages: str) -> dict[str, str | None]:
    """Of those packages that are installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _points_are_there(run: Run) -> bool:
    """The table of points of training, where the run has any."""
    roots = (f"{layout.SERIES}/", f"{layout.POINTS}/")
    return not any(path.startswith(roots) for path in run.manifest["shards"]) or (
        _made_of(run, _POINTS) == _points_hash(run)
    )


def _points_hash(run: Run) -> str:
    return hash_of(source_hash(), contents(run), run.manifest.get("study"))


def _page_hash(run: Run, study: Study) -> str:
    """Of the report, which tells of the tables, of completions, of the study and the files it names, and of who made them."""
    entries, stats = run.manifest["shards"], run.manifest["stages"].get("stats", {})
    made = {path: entries[path]["sha256"] for path in run.shards(layout.TABLES)}
    with_what = versions(*_DRAWN_BY, *_TOLD) | {"Python": platform.python_version()}
    about = [
        run.path.resolve().name,
        run.manifest.get("study"),
        run.manifest.get("made"),
        stats.get("outputs"),
    ]
    return hash_of(source_hash(), with_what, contents(run), made, about, named_files(study))


def _pictures_hash(run: Run) -> str:
    """Of all pictures: every table, the centroids and who the personas are; the fonts come with matplotlib."""
    paths = [*run.shards(layout.TABLES), *run.shards(layout.CENTROIDS), *run.shards(layout.PERSONAS)]
    made_of = {path: _sha(run, path) for path in paths}
    return hash_of(source_hash(), versions(*_DRAWN_BY), made_of)


def _pictures_are_there(run: Run) -> bool:
    """All that the run has; one that was drawn otherwise since, by `leakfast plot`, has other bytes under the same name."""
    drawn_of, entries = _pictures_hash(run), run.manifest["shards"]
    if not run.stage_done(layout.FIGURES, drawn_of):
        return False
    files = run.manifest["stages"][layout.FIGURES]["outputs"]["files"]
    return all(entries[path].get("drawn_of") == drawn_of for path in files)


def _made_of(run: Run, relpath: str) -> str | None:
    """What a file that is there and intact says it was made of."""
    return run.manifest["shards"][relpath].get("made_of") if run.has(relpath) else None


def _sha(run: Run, relpath: str) -> str:
    return str(run.manifest["shards"][relpath]["sha256"])


def _texts(value: Any) -> list[str]:
    """Every text in a value of JSON."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [text for one in inner for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def _file_of(text: str) -> Path | None:
    """The file that a text names, with or without a set in it behind a colon; None where it names none."""
    for name in (text, text.rpartition(":")[0]):
        try:
            if name and (path := find_shipped(name)).is_file():
                return path
        except (OSError, ValueError):  # a text that no file can be called
            return None
    return None
