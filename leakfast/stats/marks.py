"""Which rows of a run's tables rest on an adapter that is not well: the columns health and health_of. Demands the tables
`health` and `rates`; changes no number and leaves no row out."""

from __future__ import annotations

from typing import Any

import polars as pl

from leakfast import behaviors
from leakfast.stats import health as healths
from leakfast.stats.correlations import POOLED
from leakfast.stats.rates import BASE

COLUMNS = ("health", "health_of")
# tables that are not marked: the verdicts themselves, raw counts, another study's numbers
UNMARKED = ("health", "question_counts", "published")
OVER_SOURCES = ("predicted", "predictors_held_out")  # a row of one source rests on the others too
_BEHAVIORS, _SOURCES = ("behavior", "other_behavior"), ("source", "other_source")


def verdicts(health: pl.DataFrame | None, rates: pl.DataFrame) -> list[dict[str, Any]]:
    """behavior, adapter, source, seed, health of every adapter that `rates` has.

    The verdict of that behavior's completions; where it has none of its own (choices), the worst that the adapter got
    under others; null where nothing was drawn of it."""
    keys = ["behavior", "adapter", "source", "seed"]
    trained = (
        rates.filter((pl.col("adapter") != BASE).fill_null(True)).select(keys).unique(maintain_order=True)
    )
    own, other = {}, {}
    if health is not None:
        whole = health.filter(pl.col("persona").is_null())
        for behavior, adapter, found in whole.select("behavior", "adapter", "health").rows():
            own[behavior, adapter] = found
            other[adapter] = healths.worst([other.get(adapter), found])
    return [
        row | {"health": own.get((row["behavior"], row["adapter"]), other.get(row["adapter"]))}
        for row in trained.rows(named=True)
    ]


def mark(table: pl.DataFrame, found: list[dict[str, Any]], *, over_sources: bool = False) -> pl.DataFrame:
    """`table` + health (ok, warning, damaged; null: not known) and health_of (the adapters that are not ok, by commas).

    found: from `verdicts`. A row with an adapter is about that one; any other (pooled, or over sources) about all of its
    behavior, source and seed, as far as the row names them, and gets the worst of theirs (over_sources: of all sources,
    whichever the row names). Rows of the unadapted model have neither."""
    table = table.drop(COLUMNS, strict=False)
    keys = [k for k in ("adapter", *_BEHAVIORS, *_SOURCES, "seed") if k in table.columns]
    keys = [k for k in keys if k in (*_BEHAVIORS, "seed")] if over_sources else keys
    keys += [k for k in ("variant", "other") if "variant" in table.columns and k in table.columns]
    if not {"adapter", "behavior"} & set(keys):
        return table
    each = table.select(keys).unique(maintain_order=True)
    told = [_worst(row, found) for row in each.rows(named=True)]
    columns = [pl.Series(name, [one[i] for one in told], dtype=pl.String) for i, name in enumerate(COLUMNS)]
    return table.join(
        each.with_columns(columns), on=keys, how="left", nulls_equal=True, maintain_order="left"
    )


def _worst(row: dict[str, Any], found: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    if row.get("adapter") == BASE:
        return None, None
    mine = [one for one in found if _is_of(row, one)]
    if row.get("adapter") is not None and not mine:  # under a behavior that has no rates
        mine = [one for one in found if one["adapter"] == row["adapter"]]
    unwell = [one["adapter"] for one in mine if one["health"] in (healths.WARNING, healths.DAMAGED)]
    return healths.worst(one["health"] for one in mine), ", ".join(dict.fromkeys(unwell)) or None


def _is_of(row: dict[str, Any], one: dict[str, Any]) -> bool:
    """Whether an adapter's measurement is among what a row rests on."""
    if row.get("adapter") is not None:
        whole = one["behavior"]  # the table `mitigations` tells behavior and variant apart
        named = (None, whole, behaviors.parts(whole)[0] if "variant" in row else None)
        return one["adapter"] == row["adapter"] and row.get("behavior") in named
    names = [row[key] for key in _BEHAVIORS if row.get(key) is not None]
    if "variant" in row:  # as does `variants`
        parts = behaviors.parts(one["behavior"])
        if parts[0] not in names or parts[1] not in (row["variant"], row["other"]):
            return False
    elif names and one["behavior"] not in names:
        return False
    sources = [row[key] for key in _SOURCES if row.get(key) not in (None, POOLED)]
    if sources and one["source"] not in sources:
        return False
    return row.get("seed") is None or one["seed"] == row["seed"]


def notes(health: pl.DataFrame | None, behavior: str) -> str | None:
    """A footnote of a figure about a behavior: which of its adapters are not ok; null where all are."""
    if health is None:
        return None
    whole = health.filter(pl.col("persona").is_null(), pl.col("adapter") != BASE, behavior=behavior)
    parts = []
    for kind, words in ((healths.DAMAGED, "damaged the model"), (healths.WARNING, "to be read with care")):
        names = whole.filter(health=kind)["adapter"].to_list()
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            parts.append(f"{words}: {shown}")
    return "; ".join(parts) or None


def series_note(trajectory: pl.DataFrame) -> str | None:
    """The same of the table `trajectory`: the points in training at which the adapter damaged the model."""
    if "health" not in trajectory.columns:  # made by a leakfast that did not look
        return None
    broken = trajectory.filter(health=healths.DAMAGED)
    points = broken.select("adapter", "share").unique(maintain_order=True).rows()
    named = ", ".join(f"{adapter} at {100 * share:.0f} %" for adapter, share in points)
    return f"damaged the model: {named} of training" if points else None
