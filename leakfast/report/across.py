"""Behaviors × sources of a run that has several behaviors: what the source shows, what its bystanders show more of, and ρ.
Demands a run's tables; computes nothing that is not in them, and rounds nothing."""

from __future__ import annotations

from typing import Any

import polars as pl

from leakfast.behaviors.registry import sign_of
from leakfast.report import picks
from leakfast.stats.correlations import POOLED
from leakfast.stats.tables import Stats

_MEAN = {"delta": "mean_delta", "rate": "mean_bystander"}


def across(stats: Stats) -> list[dict[str, Any]]:
    """A row per behavior and adapter, and per behavior (and training seed) one of all its sources (`pooled`, without a rate of
    a source), at the behavior's best layer; empty where a run has one behavior.

    behavior, unit, sign, adapter, source, seed, health, health_of; taught: what the adapter was trained for, where that is
    known and another behavior; twin: as `picks.twins`; source_rate with low and high; y: `delta`, the change
    against the unadapted model, or `rate` where that was not measured; mean: of y over the bystanders, with mean_low and
    mean_high (95 %, over personas and questions; null where they are not known, and of all sources); layer, spearman,
    interval (`picks.ends`) and reason."""
    behaviors = stats.behaviors()
    if len(behaviors) < 2:
        return []
    summary = stats.summary()
    more = stats.more.get("bystanders")
    known = {} if more is None else {(r["behavior"], r["adapter"]): r for r in more.rows(named=True)}
    taught = _taught(stats.rates)
    found = []
    for behavior in behaviors:
        rows = [
            {
                **_row(stats, behavior, row, known.get((behavior, row["adapter"]), {})),
                "taught": taught.get((behavior, row["adapter"])),
            }
            for row in _at_best(summary.filter(behavior=behavior), stats.best_layer(behavior))
        ]
        found += picks.twins(rows)
    return found


def _taught(rates: pl.DataFrame) -> dict[tuple[str, str], str]:
    """(behavior, adapter) → another behavior, which the adapter was trained for."""
    if "taught" not in rates.columns:
        return {}
    others = rates.filter(pl.col("taught") != pl.col("behavior"))
    return {
        (behavior, name): what
        for behavior, name, what in others.select("behavior", "adapter", "taught").rows()
    }


def _at_best(rows: pl.DataFrame, layer: int | None) -> list[dict[str, Any]]:
    """The rows at the best layer; where ρ is defined at none, those of the first."""
    at = layer if layer is not None else rows["layer"].min()
    return rows.filter(pl.col("layer").is_null() | (pl.col("layer") == (-1 if at is None else at))).rows(
        named=True
    )


def _row(stats: Stats, behavior: str, row: dict[str, Any], means: dict[str, Any]) -> dict[str, Any]:
    y = "delta" if row["mean_delta"] is not None else "rate"
    mean = _MEAN[y]
    return {
        "behavior": behavior,
        "unit": stats.unit(behavior),
        "sign": sign_of(behavior),
        **{name: row.get(name) for name in ("adapter", "source", "seed", "health", "health_of")},
        "source_rate": row["source_rate"],
        "source_low": row["source_ci_low"],
        "source_high": row["source_ci_high"],
        "y": y,
        "mean": row[mean],
        "mean_low": means.get(f"{mean}_low"),
        "mean_high": means.get(f"{mean}_high"),
        "layer": row["layer"],
        "spearman": row["spearman"],
        "interval": picks.ends(stats, row),
        "reason": row["reason"],
    }


def most(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row whose bystanders show most more of a behavior, on average: one for each scale and y, since points are not
    compared with shares, nor changes with rates. `apart`: whether its interval lies above those of all others of its kind;
    None where an interval is not known, or nothing is to be compared."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["source"] != POOLED and row["mean"] is not None:
            kinds.setdefault((row["unit"], row["y"]), []).append(row)
    found = []
    for some in kinds.values():
        top = max(some, key=lambda row: row["sign"] * row["mean"])
        found.append({**top, "apart": _apart(top, [row for row in some if row is not top])})
    return found


def _apart(top: dict[str, Any], others: list[dict[str, Any]]) -> bool | None:
    ends = [_ends(row) for row in others]
    mine = _ends(top)
    if mine is None or not ends or None in ends:
        return None
    return all(mine[0] > end[1] for end in ends if end is not None)


def _ends(row: dict[str, Any]) -> tuple[float, float] | None:
    """The interval of the mean with more of the behavior upward."""
    low, high = row["mean_low"], row["mean_high"]
    if low is None or high is None:
        return None
    return (low, high) if row["sign"] > 0 else (-high, -low)


def grid(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows as a matrix: `sources`, columns as (source, seed); `behaviors`, each with its `cells`, lists of rows in the
    order of the columns, and `pooled`, its rows of all sources; several: whether there are several training seeds;
    rates: whether some mean is of rates; most: `most`."""
    own = [row for row in rows if row["source"] != POOLED]
    columns = list(dict.fromkeys((row["source"], row["seed"]) for row in own))
    lines = []
    for behavior in dict.fromkeys(row["behavior"] for row in rows):
        mine = [row for row in rows if row["behavior"] == behavior]
        cells = [[row for row in mine if (row["source"], row["seed"]) == column] for column in columns]
        pooled = [row for row in mine if row["source"] == POOLED]
        lines.append({"behavior": behavior, "unit": mine[0]["unit"], "cells": cells, "pooled": pooled})
    rates = any(row["y"] == "rate" for row in own)
    several = len({seed for _, seed in columns}) > 1
    return {"sources": columns, "behaviors": lines, "several": several, "most": most(rows), "rates": rates}
