"""Variants of a behavior under each other: what bystanders show, how many are inside the radius, the radius, all at equal
strength on the source where that was measured. Demands the table `mitigations`."""

from __future__ import annotations

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leakfast.figures.style import (
    FAINT,
    INK,
    PAGE_IN,
    STYLE,
    colour_of,
    figure_of,
    in_percent,
    settle,
    source_words,
    wrapped,
)

_PANELS = (
    ("mean_bystander", "mean bystander"),
    ("share_inside", "bystanders inside the radius"),
    ("radius", "radius, cosine to the source"),
)


def mitigations(table: pl.DataFrame, *, behavior: str, width: float = PAGE_IN) -> Figure | None:
    """A line a variant (of each source and seed), the plain one first: its mean bystander, the share inside the radius and the
    radius, each with its interval. Filled where the variant is as strong on the source as wanted, open where it is not. None
    where the behavior has no variants."""
    mine = table.filter(behavior=behavior)
    if mine.is_empty():
        return None
    rows = mine.rows(named=True)
    several = mine.select("source", "seed").unique().height > 1
    seeds = mine["seed"].n_unique() > 1
    names = [
        (row["variant"] or "plain")
        + (f", {source_words(row['source'], row['seed'], seeds)}" if several else "")
        for row in rows
    ]
    page = width == PAGE_IN
    with matplotlib.rc_context(STYLE):
        height = 0.24 * len(rows) + 0.7
        figure = figure_of((width, height if page else 3 * height))
        axes = figure.subplots(*((1, 3) if page else (3, 1)), sharey=True, squeeze=False).ravel()
        for axis, (name, label) in zip(axes, _PANELS, strict=True):
            _points(axis, rows, name)
            axis.set_xlabel(wrapped(label, width / (3 if page else 1) - 0.4, 7.5))
            if name != "radius":
                axis.set_xlim(-0.03, 1.03)
                in_percent(axis.xaxis, "share")
            axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
        for axis in axes[:1] if page else axes:
            axis.set_yticks(range(len(rows)), names)
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        settle(figure)
    return figure


def _points(axis: Axes, rows: list[dict], name: str) -> None:
    for place, row in enumerate(rows):
        axis.axhline(place, color=FAINT, linewidth=0.4, zorder=0)
        if row[name] is None:
            said = row["status"] if name == "radius" else None
            if said:
                axis.annotate(
                    said,
                    (0.02, place),
                    xycoords=("axes fraction", "data"),
                    fontsize=7,
                    va="center",
                    color=INK,
                )
            continue
        colour = INK if row["variant"] == "" else colour_of(0)
        ends = [end for end in (row[f"{name}_low"], row[f"{name}_high"]) if end is not None]
        if len(ends) == 2:
            axis.plot(ends, [place, place], color=colour, linewidth=1.2)
        face = colour if row["matched"] else "white"
        axis.plot(row[name], place, "o", color=colour, markerfacecolor=face, markersize=4)
