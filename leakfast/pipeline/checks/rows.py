"""Rows of a run's measurements against what its study asks for: none missing, none twice, none that nobody asked. Demands a run
that is only read; without a study the rows are set against each other. Knows nothing of rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import polars as pl

from leakfast.pipeline import asks
from leakfast.pipeline.checks.contract import Check
from leakfast.prompts.personas import load_personas
from leakfast.storage import layout
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.measure.request import Asked
    from leakfast.storage.reading import ReadOnlyRun
    from leakfast.study.config import Study

_DRAW = ("persona", "question", "sample")
_SCORE = ("persona", "item", "label")
SHOWN = 3  # of rows that are missing, by name


@dataclass(frozen=True)
class Wanted:
    """What a folder is to hold: every persona with every question (of choices: item) and sample. questions_sha256: of the
    questions' texts."""

    folder: str
    personas: Sequence[str]
    questions: Sequence[int] | Sequence[str]
    samples: int
    questions_sha256: str | None = None

    @property
    def rows(self) -> int:
        return len(self.personas) * len(self.questions) * self.samples

    def cells(self, keys: Sequence[str]) -> pl.DataFrame:
        frame = pl.DataFrame({keys[0]: list(self.personas)}).join(
            pl.DataFrame({keys[1]: list(self.questions)}), how="cross"
        )
        return frame.join(pl.DataFrame({keys[2]: list(range(self.samples))}), how="cross")


def check(run: ReadOnlyRun, study: Study | None) -> Check:
    """Completions per (persona, question, sample), choice scores per (persona, item, label), of every adapter."""
    told = Check("rows", "rows")
    _heights(run, told)
    wanted = {} if study is None else {one.folder: one for one in _wanted(study, told)}
    there = _folders(run)
    for folder in wanted:
        if folder not in there:
            told.wrong.append(f"{folder}: {wanted[folder].rows} rows asked, none there")
    spare = [folder for folder in there if wanted and folder not in wanted]
    if spare:
        some = ", ".join(spare[:SHOWN])
        told.notes.append(
            f"{len(spare)} folders are beside what the study asks ({some}); looked at for themselves"
        )
    for folder, paths in there.items():
        _look(run, folder, paths, wanted.get(folder), told)
    return told


def _heights(run: ReadOnlyRun, told: Check) -> None:
    """The rows that the manifest says a shard has."""
    for relpath in run.shards():
        entry = run.manifest["shards"][relpath]
        if not relpath.endswith(".parquet") or "rows" not in entry:
            continue
        try:
            n = pl.scan_parquet(run.path / relpath, glob=False).select(pl.len()).collect().item()
        except (pl.exceptions.PolarsError, OSError) as error:
            told.wrong.append(f"{relpath}: is no table that can be read ({type(error).__name__})")
            continue
        if n != entry["rows"]:
            told.wrong.append(f"{relpath}: holds {n} rows, {entry['rows']} in the manifest")


def _folders(run: ReadOnlyRun) -> dict[str, list[str]]:
    """Folder → intact shards, of completions (main and further questions) and choices of adapters as they are."""
    found: dict[str, list[str]] = {}
    for root in (layout.COMPLETIONS, layout.SETS, layout.CHOICES):
        for relpath in run.shards(root):
            if relpath.endswith(".parquet"):
                found.setdefault(str(PurePosixPath(relpath).parent), []).append(relpath)
    return found


def _wanted(study: Study, told: Check) -> Iterator[Wanted]:
    people = [p.name for p in load_personas(study.personas)]
    for behavior in study.behaviors:
        adapters = [
            layout.adapter_name(of, source, seed)
            for of in asks.measured_on(study, behavior)
            for seed in study.seeds
            for source in study.sources
        ]
        for one in asks.asked(study, behavior):
            if not one.by_choices and one.config.measure == "probability":
                told.notes.append(f"{behavior}: measured by probability; its rows are not counted")
                continue
            yield from (_of(one, adapter, people) for adapter in [*adapters, BASE])


def _of(one: Asked, adapter: str, people: Sequence[str]) -> Wanted:
    if one.by_choices:
        folder = layout.choices(adapter, one.questions.name, one.config.scoring)  # type: ignore[union-attr]
        return Wanted(folder, people, [item.id for item in one.questions], 1)  # type: ignore[union-attr]
    return Wanted(one.folder(adapter), people, range(len(one.texts)), one.config.samples, one.texts_hash)


def _look(run: ReadOnlyRun, folder: str, paths: Sequence[str], wanted: Wanted | None, told: Check) -> None:
    """One folder's rows against `wanted`, or, without it, against the grid of what is there."""
    keys = _SCORE if folder.split("/")[0] == layout.CHOICES else _DRAW
    try:
        parts = [pl.read_parquet(run.path / path, columns=list(keys), glob=False) for path in paths]
        frame = pl.concat(parts)
    except (pl.exceptions.PolarsError, OSError) as error:
        told.wrong.append(f"{folder}: has not the columns {', '.join(keys)} ({type(error).__name__})")
        return
    told.checked += frame.height
    twice = frame.height - frame.n_unique()
    if twice:
        told.wrong.append(f"{folder}: {twice} rows are there twice")
    cells = frame.select(keys).unique()
    if keys is _SCORE:
        cells = cells.select("persona", "item").unique().with_columns(pl.lit(0, pl.Int64).alias("label"))
    else:
        cells = cells.with_columns(pl.col("question", "sample").cast(pl.Int64))
    if wanted is None:
        grid = [cells[name].n_unique() for name in keys]
        gap = grid[0] * grid[1] * grid[2] - cells.height
        if gap:
            told.wrong.append(f"{folder}: {gap} rows of its personas, questions and samples are missing")
        return
    hashes = {run.manifest["shards"][path].get("questions_sha256") for path in paths} - {None}
    if wanted.questions_sha256 and hashes - {wanted.questions_sha256}:
        told.wrong.append(f"{folder}: other questions were asked than the study names")
    asked = wanted.cells(keys)
    missing = asked.join(cells, on=list(keys), how="anti")
    if missing.height:
        some = _named(missing, keys)
        told.wrong.append(f"{folder}: {missing.height} of {wanted.rows} rows asked are missing ({some})")
    more = cells.join(asked, on=list(keys), how="anti").height
    if more:
        told.wrong.append(f"{folder}: {more} rows are there that the study does not ask for")


def _named(missing: pl.DataFrame, keys: Sequence[str]) -> str:
    some = [f"{row[0]}, {keys[1]} {row[1]}, {keys[2]} {row[2]}" for row in missing.rows()[:SHOWN]]
    return "; ".join(some) + ("; …" if missing.height > SHOWN else "")
