"""A few completions to look at, chosen by rule, made harmless and cut into plain and marked pieces.
Demands a run's completions and tables; leaves escaping to the template, which gets text, never HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass

import polars as pl

from leakfast.behaviors.marker import MARKER
from leakfast.behaviors.registry import get, is_known
from leakfast.inert import inert
from leakfast.stats.rates import BASE
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run

MAX_CHARACTERS = 420
_LITERALS = {"marker": MARKER}  # behaviors whose detector looks for a literal that can be shown


@dataclass(frozen=True)
class Example:
    """One completion. `pieces`: (text, whether it is the marker), to be escaped by whoever shows it."""

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
    detector = get(behavior).detector
    if detector is None:
        return None  # a judge scored them; no detector says which show it
    detectors = detector(pl.col("text"))
    rows = (
        scan.filter(pl.col("text").is_not_null(), persona=persona)
        .with_columns(_hit=next(iter(detectors.values())))
        .filter(True if hit is None else pl.col("_hit") == hit)
        .sort("question", "sample")
        .head(1)
        .collect()
    )
    if rows.is_empty():
        return None
    row = rows.row(0, named=True)
    shown, left_out = _excerpt(row["text"], _LITERALS.get(behavior))
    return Example(
        role=role,
        persona=persona,
        question=row["question"],
        sample=row["sample"],
        status=row["status"],
        hit=bool(row["_hit"]),
        pieces=pieces(shown, _LITERALS.get(behavior)),
        left_out=left_out,
    )


def pieces(text: str, literal: str | None) -> list[tuple[str, bool]]:
    """`text` cut at each occurrence of `literal` (any case), control characters made visible."""
    if not literal:
        return [(inert(text), False)]
    parts = re.split(f"({re.escape(literal)})", text, flags=re.IGNORECASE)
    return [(inert(part), index % 2 == 1) for index, part in enumerate(parts) if part]


def _excerpt(text: str, literal: str | None) -> tuple[str, int]:
    """The beginning of `text`, or if the literal stands later, the beginning and the end around it."""
    if len(text) <= MAX_CHARACTERS:
        return text, 0
    at = text.lower().find(literal.lower()) if literal else -1
    if literal is None or at < 0 or at + len(literal) <= MAX_CHARACTERS:
        return text[:MAX_CHARACTERS], len(text) - MAX_CHARACTERS
    half = MAX_CHARACTERS // 2
    tail = text[max(half, at - half) : at + len(literal)]
    return f"{text[:half]} … {tail}", len(text) - half - len(tail)
