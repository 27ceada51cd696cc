"""Who leaked from whom: persona × source as shades. Demands the table `matrix`."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from leakfast.figures.style import INK, STYLE, colour_bar, figure_of, quantity, settle, words

_DOT = {"markersize": 2.6, "markeredgewidth": 0.5, "markeredgecolor": "white"}
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
    people, kinds = _ordered(here, y)
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
    shades = {"cmap": "RdBu", "norm": TwoSlopeNorm(0.0, -largest, largest)}
    if y == "rate":
        shades = {"cmap": "Blues", "vmin": 0.0, "vmax": largest}
    titles = [words(source) + (f", {seed}" if several else "") for _, source, seed in adapters]
    with matplotlib.rc_context(STYLE):
        figure = figure_of((blocks * (1.5 + 0.16 * len(adapters)) + 0.6, 0.125 * rows + 1.1))
        axes = figure.subplots(1, blocks, squeeze=False)[0]
        for block, axis in enumerate(axes):
            inside = slice(block * rows, (block + 1) * rows)
            axis.set_facecolor("#eeeeee")
            image = axis.imshow(values[inside], aspect="auto", interpolation="nearest", **shades)
            for i, j in own:
                if inside.start <= i < inside.stop:
                    axis.plot(j, i - inside.start, "o", color=INK, **_DOT)
            _label(axis, people[inside], kinds[inside], titles)
            axis.set_ylim(rows - 0.5, -0.5)
        colour_bar(figure, image, axes.tolist(), quantity(behavior, y, unit), unit, aspect=30, labelsize=6)
        settle(figure)
    return figure


def _ordered(here: pl.DataFrame, y: str) -> tuple[list[str], list[str | None]]:
    """Personas by category, then by their mean as bystanders, and their categories."""
    others = here.filter(pl.col("role") != "source").group_by("persona").agg(mean=pl.col(y).mean())
    people = here.select("persona", "category").unique("persona", maintain_order=True)
    order = people.join(others, on="persona", how="left").sort(
        ["category", "mean", "persona"], descending=[False, y == "rate", False], nulls_last=True
    )
    return order["persona"].to_list(), order["category"].to_list()


def _label(axis: Axes, people: list[str], kinds: list[str | None], titles: list[str]) -> None:
    """Names at the rows, sources above the columns, a line between categories."""
    axis.set_yticks(range(len(people)), [words(name) for name in people], fontsize=5.2)
    axis.set_xticks(range(len(titles)), titles, rotation=90, fontsize=5.5)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, pad=2)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for i in range(1, len(people)):
        if kinds[i] != kinds[i - 1]:
            axis.axhline(i - 0.5, color="#777777", linewidth=0.5)
