"""A behavior on the way through training, source and bystanders. Demands the table `trajectory`."""

from __future__ import annotations

import matplotlib
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from leakfast.figures.house import SOURCE_COLOURS, STYLE, figure_of, settle


def trajectory(table: pl.DataFrame) -> Figure:
    """One panel an adapter and list: accuracy against the share of training, the source bold with its
    interval, the others thin; one legend for all panels."""
    key = ["adapter", "source", "items", "scoring"]
    panels = table.select(key).unique(maintain_order=True).rows(named=True)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    people = table["persona"].unique(maintain_order=True).sort().to_list()
    colours = {name: SOURCE_COLOURS[i % len(SOURCE_COLOURS)] for i, name in enumerate(people)}
    dashes = {name: ("-", "--", ":")[i // len(SOURCE_COLOURS) % 3] for i, name in enumerate(people)}
    with matplotlib.rc_context(STYLE):
        figure = figure_of((2.4 * columns + 1.6, 2.2 * rows))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
        named = {}
        for axis, panel in zip(axes, panels, strict=False):
            mine = table.filter(*(pl.col(name) == panel[name] for name in key))
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
        settle(figure)
    return figure
