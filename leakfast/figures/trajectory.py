"""A behavior on the way through training, source and bystanders. Demands the table `trajectory`."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from leakfast.figures.style import SOURCE_COLOURS, STYLE, colour_of, figure_of, settle, source_words


def trajectory(table: pl.DataFrame, unit: Callable[[str], str]) -> Figure:
    """The rate against the share of training, the source bold with its interval, the others thin; one legend for all
    panels. A row of panels is what was measured under what training, on one axis, a column a source (and seed); where
    there is one row, it wraps. unit: behavior → share or points."""
    key = ["behavior", "adapter", "source", "seed", "items", "scoring"]
    panels = table.select(key).unique(maintain_order=True).rows(named=True)
    for panel in panels:
        panel["trained"] = panel["adapter"].partition(f"-{panel['source']}")[0]
    if len({_row(panel) + _column(panel) for panel in panels}) < len(panels):  # several trainings of a kind
        for panel in panels:
            panel["trained"] = panel["adapter"]
    kinds = list(dict.fromkeys(map(_row, panels)))
    sources = list(dict.fromkeys(map(_column, panels)))
    grid_of = len(kinds) > 1
    columns = len(sources) if grid_of else min(3, len(panels))
    rows = len(kinds) if grid_of else -(-len(panels) // columns)
    people = table["persona"].unique(maintain_order=True).sort().to_list()
    styles = {
        name: {"color": colour_of(i), "linestyle": ("-", "--", ":")[i // len(SOURCE_COLOURS) % 3]}
        for i, name in enumerate(people)
    }
    with matplotlib.rc_context(STYLE):
        figure = figure_of(((1.5 if columns > 3 else 2.4) * columns + 1.6, (1.5 if rows > 2 else 2.2) * rows))
        grid = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
        places = list(grid.reshape(-1))
        axes = places[: len(panels)]
        if grid_of:
            axes = [grid[kinds.index(_row(panel)), sources.index(_column(panel))] for panel in panels]
        named: dict[str, Line2D] = {}
        for axis, panel in zip(axes, panels, strict=True):
            mine = table.filter(*(pl.col(name).eq_missing(pl.lit(panel[name])) for name in key))
            _lines(axis, mine, panel["source"], styles, named)
            top = 1.0 if unit(panel["behavior"]) == "share" else 100.0
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
            axis.yaxis.set_major_formatter(PercentFormatter(top, symbol="%" if top == 1 else ""))
            axis.set_ylim(-0.02 * top, 1.02 * top)
        for axis in [axis for axis in places if axis not in axes]:
            axis.remove()
        several = len({panel["seed"] for panel in panels}) > 1
        for axis, panel in zip(axes, panels, strict=True):
            place = places.index(axis)
            above, below = places[place % columns : place : columns], places[place + columns :: columns]
            if not grid_of or not any(other in axes for other in above):
                title = source_words(panel["source"], panel["seed"], several)
                axis.set_title(title, loc="left", fontweight="bold")
            if place % columns == 0:
                axis.set_ylabel(f"{panel['behavior']},\n{panel['trained']} taught")
            if not any(other in axes for other in below):
                axis.set_xlabel("share of training")
        figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=6)
        settle(figure)
    return figure


def _lines(
    axis: Axes, rows: pl.DataFrame, source: str, styles: dict[str, dict], named: dict[str, Line2D]
) -> None:
    """A line a persona. named: persona → the line that the legend shows, its bold one where there is one."""
    for persona in rows["persona"].unique(maintain_order=True):
        line = rows.filter(persona=persona).sort("share").drop_nulls("rate")
        own = persona == source
        width, size, above = (2.2, 3.4, 3) if own else (0.9, 2.0, 2)
        shape = {"linewidth": width, "marker": "o", "markersize": size, "zorder": above}
        x, y = line["share"].to_list(), line["rate"].to_list()
        (drawn,) = axis.plot(x, y, label=persona, **styles[persona], **shape)
        if own or persona not in named:
            named[persona] = drawn
        if own:
            low, high = line["ci_low"].to_list(), line["ci_high"].to_list()
            axis.fill_between(x, low, high, color=styles[persona]["color"], alpha=0.12, linewidth=0)


def _row(panel: dict) -> tuple:
    return panel["trained"], panel["behavior"], panel["items"], panel["scoring"]


def _column(panel: dict) -> tuple:
    return panel["source"], panel["seed"]
