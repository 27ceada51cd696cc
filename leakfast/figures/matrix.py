"""Who leaked from whom: persona × source as shades. Demands the table `matrix`."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from leakfast.figures.style import INK, STYLE, figure_of, quantity, settle, words

BLOCK_ROWS = 38  # personas in a column of the figure; three columns hold the 111


def matrix(table: pl.DataFrame, *, behavior: str, y: str = "rate", unit: str = "share") -> Figure | None:
    """Shades of `y` (rate or delta) for each persona (rows, by category, then by their mean) and source.

    A dot marks the source itself, a hatched cell was not measured. Rates run from white to blue, deltas
    from red (less) over white to blue (more). None where nothing is known."""
    here = table.filter(pl.col(y).is_not_null(), behavior=behavior)
    if here.is_empty():
        return None
    several = here["seed"].n_unique() > 1
    adapters = here.select("adapter", "source", "seed").unique(maintain_order=True).rows()
    others = here.filter(pl.col("role") != "source")
    order = (
        here.select("persona", "category")
        .unique("persona", maintain_order=True)
        .join(others.group_by("persona").agg(mean=pl.col(y).mean()), on="persona", how="left")
        .sort(["category", "mean", "persona"], descending=[False, y == "rate", False], nulls_last=True)
    )
    people, kinds = order["persona"].to_list(), order["category"].to_list()
    place = {name: i for i, name in enumerate(people)}
    column = {adapter: j for j, (adapter, *_) in enumerate(adapters)}
    values = np.full((len(people), len(adapters)), np.nan)
    own = []
    for name, adapter, role, value in here.select("persona", "adapter", "role", y).rows():
        values[place[name], column[adapter]] = value
        if role == "source":
            own.append((place[name], column[adapter]))
    blocks = math.ceil(len(people) / BLOCK_ROWS)
    rows = math.ceil(len(people) / blocks)
    largest = float(np.nanmax(np.abs(values))) or 1.0
    shades = (
        {"cmap": "Blues", "vmin": 0.0, "vmax": largest}
        if y == "rate"
        else {"cmap": "RdBu", "norm": TwoSlopeNorm(0.0, -largest, largest)}
    )
    with matplotlib.rc_context(STYLE):
        figure = figure_of((blocks * (1.5 + 0.16 * len(adapters)) + 0.6, 0.125 * rows + 1.1))
        axes = figure.subplots(1, blocks, squeeze=False)[0]
        for block, axis in enumerate(axes):
            first = block * rows
            part = values[first : first + rows]
            axis.set_facecolor("#eeeeee")
            image = axis.imshow(part, aspect="auto", interpolation="nearest", **shades)
            for i, j in own:
                if first <= i < first + rows:
                    axis.plot(
                        j,
                        i - first,
                        "o",
                        color=INK,
                        markersize=2.6,
                        markeredgewidth=0.5,
                        markeredgecolor="white",
                    )
            names = [words(name) for name in people[first : first + rows]]
            axis.set_yticks(range(len(names)), names, fontsize=5.2)
            titles = [words(source) + (f", {seed}" if several else "") for _, source, seed in adapters]
            axis.set_xticks(range(len(adapters)), titles, rotation=90, fontsize=5.5)
            axis.xaxis.tick_top()
            axis.tick_params(length=0, pad=2)
            for spine in axis.spines.values():
                spine.set_visible(False)
            for i in range(1, len(names)):
                if kinds[first + i] != kinds[first + i - 1]:
                    axis.axhline(i - 0.5, color="#777777", linewidth=0.5)
            axis.set_ylim(rows - 0.5, -0.5)
        bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.5, aspect=30, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=6)
        if unit == "share":
            bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol="", decimals=None))
        bar.set_label(quantity(behavior, y, unit), fontsize=6.5)
        settle(figure)
    return figure
