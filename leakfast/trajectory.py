"""Accuracy on the way through training: the table `trajectory` of a run and its figure, from stored choice
scores. Demands a run with points of a series (leakfast.choices.evaluate); leaves scoring to others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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
    figure = draw(made)
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


def draw(trajectory: pl.DataFrame) -> Figure:
    """One panel an adapter and list: accuracy against the share of training, the source bold with its
    interval, the others thin; one legend for all panels."""
    key = ["adapter", "source", "items", "scoring"]
    panels = trajectory.select(key).unique(maintain_order=True).rows(named=True)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    people = trajectory["persona"].unique(maintain_order=True).sort().to_list()
    colours = {name: figures.SOURCE_COLOURS[i % len(figures.SOURCE_COLOURS)] for i, name in enumerate(people)}
    dashes = {name: ("-", "--", ":")[i // len(figures.SOURCE_COLOURS) % 3] for i, name in enumerate(people)}
    with matplotlib.rc_context(figures._STYLE):
        figure = figures._figure((2.4 * columns + 1.6, 2.2 * rows))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
        named = {}
        for axis, panel in zip(axes, panels, strict=False):
            mine = trajectory.filter(*(pl.col(name) == panel[name] for name in key))
            for persona in mine["persona"].unique(maintain_order=True):
                line = mine.filter(pl.col("persona") == persona).sort("share").drop_nulls("rate")
                own = persona == panel["source"]
                x, y = line["share"].to_list(), line["rate"].to_list()
                (drawn,) = axis.plot(
                    x, y, dashes[persona], color=colours[persona], linewidth=2.2 if own else 0.9, marker="o",
                    markersize=3.4 if own else 2.0, zorder=3 if own else 2, label=persona,
                )  # fmt: skip
                if own or persona not in named:
                    named[persona] = drawn
                if own:
                    low, high = line["ci_low"].to_list(), line["ci_high"].to_list()
                    axis.fill_between(x, low, high, color=colours[persona], alpha=0.12, linewidth=0)
            axis.set_title(f"{panel['source']}, {panel['items']}", loc="left", fontweight="bold")
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_ylim(-0.02, 1.02)
        for axis in axes[len(panels) :]:
            axis.remove()
        for place, axis in enumerate(axes[: len(panels)]):
            if place % columns == 0:
                axis.set_ylabel("accuracy")
            if place + columns >= len(panels):
                axis.set_xlabel("share of training steps")
        figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=6)
        figures._settle(figure)
    return figure
