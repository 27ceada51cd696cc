"""The completions that a report carries, chosen by a rule that looks at nothing but their order and whether they show the
behavior. Demands a run's completions; the whole set stays in its Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import polars as pl

from leakfast.behaviors.phrases import spans, utf16
from leakfast.behaviors.registry import get, is_known
from leakfast.stats import judged
from leakfast.stats.collect import completion_folders
from leakfast.stats.people import read_people
from leakfast.stats.rates import COUNTED
from leakfast.storage import layout
from leakfast.storage.run import Run

CHARACTERS = 24_000_000  # of completions in a report: about 9 MB of page
CUT = 4_000  # characters shown of one completion
_STEPS = (None, 100, 40, 20, 10, 6, 4, 2)  # completions an adapter and persona; None: all
_DRAW = ["persona", "question", "sample"]
RULE = (
    "Of each adapter and persona the first {half} completions that show the behavior and the first {half} that do not, in "
    "order of question and sample: {shown:,} of {total:,}. The others are in the run's completions/*.parquet."
)
WHOLE = "All {total:,} completions of the run."


def sample(
    run: Run, adapters: list[dict[str, Any]], place: dict[str, int], limit: int = CHARACTERS
) -> dict[str, Any]:
    """Columns adapter, persona (places), question, sample, hit, score, finish, tokens, text, marked, and `rule` in words.

    hit: what the behavior's detector finds, null without one; score: a judge's, null without one; finish: how it ended;
    marked: where in the whole text stands what was counted (`marks`).
    At most `limit` characters as long as the smallest sample allows: one completion of either kind a persona."""
    number = {(a["behavior"], a["adapter"]): at for at, a in enumerate(adapters)}
    folders = [folder for folder in completion_folders(run) if folder in number]
    sizes, total = _sizes(run, folders)
    half = _half(sizes, limit)
    judges = read_people(run)[0].judges
    parts = []
    for folder, frame in _read(run, folders):
        kept = _kept(frame, half)
        marked = marks(folder[0], kept["text"], kept["hit"])
        kept = kept.with_columns(marked, text=pl.col("text").str.slice(0, CUT))
        score = scores(run, *folder, kept, judges.get(folder[0], (None, 0))[0])
        named = {"adapter": pl.lit(number[folder]), "persona": _places(place)}
        parts.append(kept.with_columns(score=score, **named).select(_COLUMNS))
    table = pl.concat(parts) if parts else pl.DataFrame(schema=dict.fromkeys(_COLUMNS, pl.Null))
    rule = RULE.format(half=half, shown=table.height, total=total) if half else WHOLE.format(total=total)
    return {
        "rule": rule,
        "whole": half is None,
        "total": total,
        **{name: table[name].to_list() for name in _COLUMNS},
    }


_COLUMNS = (
    "adapter",
    "persona",
    "question",
    "sample",
    "hit",
    "score",
    "finish",
    "tokens",
    "text",
    "left_out",
    "marked",
)


def marks(behavior: str, texts: Iterable[str], hits: Iterable[bool | None]) -> pl.Series:
    """Of each completion the spans that made it count, as `utf16` gives them: Int32 lists, empty where it shows nothing."""
    found = [utf16(text, spans(text, behavior)) if hit else [] for text, hit in zip(texts, hits, strict=True)]
    return pl.Series("marked", found, dtype=pl.List(pl.Int32))


def _places(place: dict[str, int]) -> pl.Expr:
    return pl.col("persona").replace_strict(place, default=None, return_dtype=pl.Int32)


def _read(run: Run, folders: Iterable[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], pl.DataFrame]]:
    """Each folder's completions with hit and finish, in order; one folder in memory at a time."""
    for behavior, adapter in folders:
        folder = layout.completions(behavior, adapter)
        columns = [*_DRAW, "text", "n_tokens", "finish_reason", "status"]
        frame = run.scan(folder).select(columns).collect()
        yield (behavior, adapter), frame.with_columns(**facts(behavior)).sort(*_DRAW, maintain_order=True)


def facts(behavior: str) -> dict[str, pl.Expr]:
    """hit (null where the completion does not count), finish and tokens of completions of the behavior, as expressions
    over their columns."""
    counted = pl.when(pl.col("status").is_in(COUNTED))
    detector = get(behavior).detector if is_known(behavior) else None
    return {
        "hit": counted.then(next(iter(detector(pl.col("text")).values())))
        if detector
        else pl.lit(None, pl.Boolean),
        "finish": pl.when(status="ok").then("finish_reason").otherwise("status"),
        "tokens": pl.col("n_tokens"),
    }


def scores(run: Run, behavior: str, adapter: str, frame: pl.DataFrame, judge: str | None) -> pl.Series:
    """A judge's aligned score of each completion, null without one of its very text. frame: persona, question, sample."""
    made = judged.of_judge(run, layout.judgements(behavior, adapter), judge)
    if made is None:
        return pl.Series("score", [None] * frame.height, dtype=pl.Float64)
    texts = run.scan(layout.completions(behavior, adapter)).select(*_DRAW, "text").collect()
    valid = made.join(judged.keyed(texts), on=[*_DRAW, "text_sha256"], how="semi")
    joined = frame.select(_DRAW).join(
        valid.select(*_DRAW, "aligned"), on=_DRAW, how="left", maintain_order="left"
    )
    return joined["aligned"].cast(pl.Float64).rename("score")


def _sizes(run: Run, folders: Iterable[tuple[str, str]]) -> tuple[dict[int | None, int], int]:
    """Characters that each step of _STEPS keeps, and completions in all."""
    sizes, total = dict.fromkeys(_STEPS, 0), 0
    for _, frame in _read(run, folders):
        length = pl.col("text").str.len_chars().fill_null(0).clip(upper_bound=CUT)
        ranked = frame.select("persona", length=length, rank=_rank())
        total += frame.height
        for step in _STEPS:
            kept = ranked if step is None else ranked.filter(pl.col("rank") <= step // 2)
            sizes[step] += int(kept["length"].sum())
    return sizes, total


def _half(sizes: dict[int | None, int], limit: int) -> int | None:
    """How many of either kind; None for all."""
    step = next((step for step in _STEPS if sizes[step] <= limit), _STEPS[-1])
    return None if step is None else step // 2


def _rank() -> pl.Expr:
    """The place among those of the same persona that show the behavior, or that do not; from 1."""
    return pl.int_range(1, pl.len() + 1).over("persona", "hit")


def _kept(frame: pl.DataFrame, half: int | None) -> pl.DataFrame:
    if half is not None:
        frame = frame.filter(_rank() <= half)
    long = pl.col("text").str.len_chars().fill_null(0).cast(pl.Int64)  # counts have no sign, and would wrap
    return frame.with_columns(text=pl.col("text").fill_null(""), left_out=(long - CUT).clip(lower_bound=0))
