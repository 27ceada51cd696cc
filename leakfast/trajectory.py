"""Accuracy on the way through training: the table `trajectory` of a run and its figure, from stored choice
scores. Demands a run with points of a series (leakfast.choices.evaluate); leaves scoring to others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from leakfast import figures, schema
from leakfast.adapters import read_card
from leakfast.choices import table as tables

if TYPE_CHECKING:
    from leakfast.store import Run

SERIES = "trajectory"
_TABLE, _FIGURE = "tables/trajectory.parquet", "figures/trajectory"


def write(run: Run) -> pl.DataFrame | None:
    """Make the table and the figure of what the run holds and store both; None where it holds no series."""
    made = table(run)
    if made is None:
        return None
    run.add_shard(_TABLE, made)
    figure = figures.trajectory(made)
    run.add_file(f"{_FIGURE}.png", figures.png(figure))
    run.add_file(f"{_FIGURE}.pdf", figures.pdf(figure))
    return made


def table(run: Run) -> pl.DataFrame | None:
    """Schema `trajectory`: per adapter, list, scoring, share of training and persona the accuracy with its
    95 % Wilson interval, and delta against share 0 (null where that was not scored)."""
    from leakfast.stats.rates import wilson

    scores = run.read(SERIES)
    if scores.is_empty():
        return None
    made = tables.counts(scores, keys=["items", "scoring", "share"])
    sources = scores.select("adapter", "source").unique(maintain_order=True)
    made = made.join(sources, on="adapter", how="left", maintain_order="left")
    seeds = {
        name: card.seed
        for name in made["adapter"].unique()
        if (card := read_card(run.path / "adapters" / name))
    }
    counted = made["total"].to_numpy() > 0
    low, high = wilson(made["hits"].to_numpy() * counted, made["total"].to_numpy() + ~counted)
    made = made.with_columns(
        pl.col("adapter").replace_strict(seeds, default=None, return_dtype=pl.Int64).alias("seed"),
        pl.when(pl.col("total") > 0).then(pl.col("hits") / pl.col("total")).alias("rate"),
        pl.Series("ci_low", low).set(pl.Series(~counted), None),
        pl.Series("ci_high", high).set(pl.Series(~counted), None),
        pl.when(pl.col("persona") == pl.col("source"))
        .then(pl.lit("source"))
        .otherwise(pl.lit("bystander"))
        .alias("role"),
    )
    key = ["adapter", "items", "scoring", "persona"]
    start = made.filter(pl.col("share") == 0).select(*key, pl.col("rate").alias("_start"))
    made = made.join(start, on=key, how="left", maintain_order="left")
    made = made.with_columns((pl.col("rate") - pl.col("_start")).alias("delta")).drop("_start")
    names = list(schema.columns("trajectory"))
    made = made.select(*names, *[c for c in made.columns if c not in names])
    return schema.check(made.sort("adapter", "items", "scoring", "share", maintain_order=True), "trajectory")
