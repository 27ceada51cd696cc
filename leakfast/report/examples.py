"""A few completions to look at, chosen by rule, made harmless and cut into plain and marked pieces.
Demands a run's completions and tables; leaves escaping to the template, which gets text, never HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from leakfast.behaviors.phrases import Span, spans
from leakfast.behaviors.registry import get, is_known
from leakfast.inert import inert
from leakfast.report.sample import facts
from leakfast.stats.rates import BASE
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run

MAX_CHARACTERS = 420


@dataclass(frozen=True)
class Example:
    """One completion. `pieces`: (text, whether it was counted), to be escaped by whoever shows it."""

    role: str  # the source | highest bystander | … : why this one is shown
    persona: str
    question: int
    sample: int
    status: str
    hit: bool
    pieces: list[tuple[str, bool]]
    left_out: int  # characters not shown


def choose(run: Run, stats: Stats, behavior: str, adapter: str, layer: int | None) -> list[Example]:
    """The source with the behavior, the bystander with the highest rate, the one of the farthest cosine
    without it, and the unadapted model as the source: each the first in order of question and sample."""
    if not is_known(behavior):  # nothing that finds it in a text
        return []
    mine = stats.rates.filter(behavior=behavior, adapter=adapter)
    source = mine["source"][0]
    bystanders = mine.filter(pl.col("rate").is_not_null(), role="bystander")
    top = bystanders.sort(["rate", "persona"], descending=[True, False]).head(1)
    far = stats.pairs.filter(
        pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)),
        pl.col("cosine_centered").is_not_null(),
        behavior=behavior,
        source=source,
    ).sort(["cosine_centered", "persona"])
    wanted = [("the source", adapter, source, True)]
    if top.height and top["rate"][0] > 0:
        wanted.append(("the bystander with the highest rate", adapter, top["persona"][0], True))
    if far.height:
        wanted.append(("the bystander farthest away", adapter, far["persona"][0], False))
    wanted.append(("the source, before training", BASE, source, None))
    found = (_first(run, behavior, *rest, role) for role, *rest in wanted)
    return [example for example in found if example is not None]


def _first(
    run: Run, behavior: str, adapter: str, persona: str, hit: bool | None, role: str
) -> Example | None:
    scan = run.scan(layout.completions(behavior, adapter))
    if not scan.collect_schema().names():
        return None
    if get(behavior).detector is None:
        return None  # a judge scored them; no detector says which show it
    rows = (
        scan.filter(pl.col("text").is_not_null(), persona=persona)
        .with_columns(_hit=facts(behavior)["hit"])  # null of one that does not count
        .filter(True if hit is None else pl.col("_hit") == hit)
        .sort("question", "sample")
        .head(1)
        .collect()
    )
    if rows.is_empty():
        return None
    row = rows.row(0, named=True)
    cut, left_out = excerpt(row["text"], spans(row["text"], behavior) if row["_hit"] else [])
    return Example(
        role=role,
        persona=persona,
        question=row["question"],
        sample=row["sample"],
        status=row["status"],
        hit=bool(row["_hit"]),
        pieces=cut,
        left_out=left_out,
    )


def pieces(text: str, counted: Iterable[Span]) -> list[tuple[str, bool]]:
    """`text` cut at the spans that were counted, control characters made visible."""
    out, at = [], 0
    for low, high in counted:
        out += [(text[at:low], False), (text[low:high], True)]
        at = high
    return [(inert(part), marked) for part, marked in (*out, (text[at:], False)) if part]


def excerpt(text: str, counted: list[Span]) -> tuple[list[tuple[str, bool]], int]:
    """The beginning of `text`, or if what was counted first ends later, a shorter one and what stands up to that end; and how
    many characters are left out."""
    if len(text) <= MAX_CHARACTERS:
        return pieces(text, counted), 0
    if not counted or counted[0][1] <= MAX_CHARACTERS:
        ends = [(low, min(high, MAX_CHARACTERS)) for low, high in counted if low < MAX_CHARACTERS]
        return pieces(text[:MAX_CHARACTERS], ends), len(text) - MAX_CHARACTERS
    half = MAX_CHARACTERS // 2
    low, high = counted[0]
    begin = max(half, min(low, high - half))
    tail = pieces(text[begin:high], [(max(low, begin) - begin, high - begin)])
    return [*pieces(text[:half], []), (" … ", False), *tail], len(text) - half - (high - begin)
