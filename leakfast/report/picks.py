"""What the report says of a layer that was picked after looking: each row's largest |ρ|, and intervals that pay for the pick; and
which rows are told by their adapter's name, because their source is not theirs alone.
Demands a run's tables; computes nothing that is not in them."""

from __future__ import annotations

from typing import Any

import polars as pl

from leakfast.stats import specificity, summary
from leakfast.stats.correlations import POOLED
from leakfast.stats.tables import Stats


def interval(stats: Stats, headline: list[dict], layer: int | None) -> dict[str, Any] | None:
    """low, high and how of the 95 % interval of the ρ that the opening sentence gives: with the pick of the layer paid for
    where that is known, else over personas and questions, else over personas."""
    row = next((row for row in headline if row["source"] == POOLED), next(iter(headline), None))
    return None if row is None or row["layer"] not in (None, layer) else ends(stats, row)


def ends(stats: Stats, row: dict[str, Any]) -> dict[str, Any] | None:
    """The same of a row of the summary, at its layer; None where it has no ρ, or no interval of it is known."""
    if row["spearman"] is None:
        return None
    key = (row["source"], row["adapter"], row["seed"], row["layer"])
    picked = _paid(stats, row["behavior"], row["y"]).get(key)
    known = {
        "with the pick of the layer paid for": picked or (None, None),
        "over personas and questions": (row["spearman_both_low"], row["spearman_both_high"]),
        "over personas": (row["spearman_ci_low"], row["spearman_ci_high"]),
    }
    for how, (low, high) in known.items():
        if low is not None and high is not None:
            return {"low": low, "high": high, "how": how}
    return None


def families(stats: Stats, behavior: str) -> list[dict]:
    """For each source and pooled the layer with its largest |ρ|, and the p that has paid for picking it."""
    if "layers" not in stats.more:
        return []
    paid = _paid(stats, behavior, stats.outcome(behavior))
    found = (
        specificity.beside(stats.more["layers"], stats.more.get("specificity"))
        .filter(
            pl.col("best"),
            pl.col("layers_tested") > 1,
            behavior=behavior,
            cosine="centered",
            y=stats.outcome(behavior),
        )
        .unique(["seed", "source", "adapter"], keep="first", maintain_order=True)
    )
    out = []
    for row in found.rows(named=True):
        key = (row["source"], row["adapter"], row["seed"], row["layer"])
        low, high = paid.get(key, (None, None))
        out.append({**row, "paid_low": low, "paid_high": high})
    return twins(out)


def twins(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one behavior, each with twin (`summary.twins`)."""
    return [{**row, "twin": twin} for row, twin in zip(rows, summary.twins(rows), strict=True)]


def _paid(stats: Stats, behavior: str, y: str) -> dict[tuple, tuple[float | None, float | None]]:
    """(source, adapter, seed, layer) → the ends of the interval that pays for the pick of the layer."""
    table = stats.more.get("picked")
    if table is None or not {"picked_low", "picked_high"} <= set(table.columns):
        return {}
    mine = table.filter(behavior=behavior, y=y, cosine="centered")
    keys = ("source", "adapter", "seed", "layer")
    return {
        tuple(row[key] for key in keys): (row["picked_low"], row["picked_high"])
        for row in mine.rows(named=True)
    }
