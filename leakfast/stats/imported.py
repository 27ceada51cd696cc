"""Counts of a run that another study's results were imported into. Demands its tables; leaves rates to rates.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from leakfast.storage.run import Run

IMPORTED = "imported"  # folder of tables that came from elsewhere: rates, pairs, published


def as_imported(counts: pl.DataFrame, stored: pl.DataFrame, name: str) -> tuple[pl.DataFrame, list[str]]:
    """Counts per question under the detector whose sums are the stored ones, else none and a sentence."""
    wanted = stored.select("persona", "hits", "total")
    for column in [c for c in counts.columns if c == "hits" or c.startswith("hits_")]:
        sums = counts.group_by("persona", maintain_order=True).agg(
            pl.col(column).sum().alias("mine"), pl.col("total").sum()
        )
        joined = wanted.join(sums, on="persona", how="full", suffix="_mine")
        same = pl.col("hits").eq_missing(pl.col("mine")) & pl.col("total").eq_missing(pl.col("total_mine"))
        if joined.select(same.all()).item():
            return counts.with_columns(hits=pl.col(column)), []
    return counts.clear(), [
        f"{name}: no detector finds the stored counts in the completions; no question counts"
    ]


def read_imported(run: Run, name: str) -> pl.DataFrame | None:
    path = f"{IMPORTED}/{name}.parquet"
    return run.read(path) if run.has(path) else None
