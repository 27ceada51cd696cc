"""A run's completions as somebody reads them: chosen by persona, adapter, question and hit, in one stated order. Demands a
run with completions; shortens and escapes nothing, which those who show them do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from leakfast.behaviors.phrases import Span, spans
from leakfast.behaviors.registry import get, is_known
from leakfast.errors import InputError
from leakfast.report.sample import facts
from leakfast.stats.collect import completion_folders
from leakfast.stats.judged import keyed
from leakfast.storage import layout
from leakfast.storage.documents import did_you_mean
from leakfast.storage.run import Run

ORDER = "in order of question, sample, adapter and persona"
_SHOWN = [
    "behavior",
    "adapter",
    "persona",
    "question",
    "sample",
    "text",
    "n_tokens",
    "finish_reason",
    "status",
]


@dataclass(frozen=True)
class Chosen:
    """Which completions are asked for; None: all of a kind. hit: those that show the behavior, or those that count and
    do not; source: those under adapters whose rows name it."""

    behavior: str | None = None
    adapter: str | None = None
    source: str | None = None
    persona: str | None = None
    question: int | None = None
    hit: bool | None = None


@dataclass(frozen=True)
class Completion:
    """One completion. hit: whether the detector finds the behavior; None where no detector reads it, or it does not
    count. marked: spans of `text` that the detector looks for; judged: each judge's scores."""

    behavior: str
    adapter: str
    persona: str
    question: int
    sample: int
    text: str
    n_tokens: int | None
    finish_reason: str | None
    status: str
    hit: bool | None
    marked: list[Span]
    judged: list[dict[str, Any]]


def completions(run: Run, chosen: Chosen, n: int) -> tuple[list[Completion], int]:
    """The first `n` completions that are asked for (ORDER), and how many there are.

    Raises InputError where the run has no completions of that behavior, adapter or persona, and for a hit asked of
    a behavior that no detector reads."""
    folders = _folders(run, chosen)
    found = [_of_folder(run, behavior, adapter, chosen) for behavior, adapter in folders]
    whole = pl.concat(found, how="diagonal_relaxed")
    if whole.is_empty():
        _refuse_unknown(run, folders, chosen)
    order = {name: place for place, (_, name) in enumerate(folders)}
    first = (
        whole.with_columns(pl.col("adapter").replace_strict(order, return_dtype=pl.Int64).alias("_place"))
        .sort("question", "sample", "behavior", "_place", "persona")
        .head(n)
    )
    rows = first.select(*_SHOWN, "hit").rows(named=True)
    return [
        Completion(**row, marked=spans(row["text"], row["behavior"]), judged=_judged(run, row))
        for row in rows
    ], whole.height


def _folders(run: Run, chosen: Chosen) -> list[tuple[str, str]]:
    """(behavior, adapter) of the completions that are asked for, the base last."""
    there = completion_folders(run)
    if not there:
        raise InputError(f"{run.path}: holds no completions. Make some with `leakfast eval`, or another run.")
    for place, (what, name) in enumerate((("behavior", chosen.behavior), ("adapter", chosen.adapter))):
        known = list(dict.fromkeys(key[place] for key in there))
        if name is not None and name not in known:
            raise InputError(
                f"show: {run.path} has no completions of the {what} {name!r}.{did_you_mean(name, known)} It has: "
                f"{', '.join(known)}. Name one of them."
            )
    there = [
        (behavior, adapter)
        for behavior, adapter in there
        if chosen.behavior in (None, behavior) and chosen.adapter in (None, adapter)
    ]
    if chosen.source is None:
        return there
    sources = {folder: _source_of(run, *folder) for folder in there}
    if chosen.source not in sources.values():
        known = sorted({name for name in sources.values() if name is not None})
        raise InputError(
            f"show: no completion is under an adapter of the source {chosen.source!r}.{did_you_mean(chosen.source, known)} "
            f"There are: {', '.join(known) or 'none'}. Name one of them, or leave --source out."
        )
    return [folder for folder in there if sources[folder] == chosen.source]


def _source_of(run: Run, behavior: str, adapter: str) -> str | None:
    """The source that an adapter's rows name."""
    rows = run.scan(layout.completions(behavior, adapter))
    if "source" not in rows.collect_schema().names():
        return None
    return next(iter(rows.select("source").head(1).collect()["source"]), None)


def _of_folder(run: Run, behavior: str, adapter: str, chosen: Chosen) -> pl.DataFrame:
    """The rows of one folder that are asked for, with hit."""
    if chosen.hit is not None and not (is_known(behavior) and get(behavior).detector):
        raise InputError(
            f"show: --hit or --no-hit given, but no detector reads {behavior}: a judge scores it. Leave that out, or "
            "name another --behavior."
        )
    rows = run.scan(layout.completions(behavior, adapter)).select(_SHOWN)
    if chosen.persona is not None:
        rows = rows.filter(persona=chosen.persona)
    if chosen.question is not None:
        rows = rows.filter(question=chosen.question)
    rows = rows.with_columns(hit=facts(behavior)["hit"], text=pl.col("text").fill_null(""))
    if chosen.hit is not None:
        rows = rows.filter(pl.col("hit") == chosen.hit)
    return rows.collect()


def _refuse_unknown(run: Run, folders: Sequence[tuple[str, str]], chosen: Chosen) -> None:
    """Raises InputError for a persona, or a question, that no completion is of."""
    for column, asked in (("persona", chosen.persona), ("question", chosen.question)):
        if asked is None:
            continue
        scans = [run.scan(layout.completions(*folder)).select(column) for folder in folders]
        known = pl.concat(scans).unique().collect()[column].sort().to_list()
        if asked not in known:
            said = did_you_mean(asked, known) if column == "persona" else f" It has {known[0]}–{known[-1]}."
            raise InputError(
                f"show: no completion of {run.path} is of the {column} {asked!r}.{said} Name another --{column}, or "
                "leave it out."
            )


def _judged(run: Run, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What judges said of a completion, of its very text: judge, aligned, coherent, status."""
    rows = run.scan(layout.judgements(row["behavior"], row["adapter"]))
    if "judge" not in rows.collect_schema().names():
        return []
    draw = ["persona", "question", "sample"]
    mine = keyed(pl.DataFrame([row]).select(*draw, "text")).drop("text").row(0, named=True)
    return rows.filter(**mine).select("judge", "aligned", "coherent", "status").collect().rows(named=True)


def questions(run: Run, behavior: str) -> tuple[str, ...]:
    """The texts of the questions that a behavior was asked; none where the study does not tell them, or completions were
    drawn on others (by the hash that is kept with them)."""
    from leakfast.prompts.personas import load_questions
    from leakfast.prompts.questions import texts_hash
    from leakfast.study.config import settings_in

    path = run.path / layout.STUDY
    if not path.is_file():
        return ()
    try:
        study = settings_in(path)
        texts = load_questions(study.behaviors[behavior].eval.questions).questions
    except (InputError, KeyError):  # the study's own files are gone, or it is another's
        return ()
    shards = run.manifest["shards"]
    drawn = {shards[path].get("questions_sha256") for path in run.shards(layout.completions(behavior))}
    return texts if drawn - {None} <= {texts_hash(texts)} else ()
