"""A behavior on the way through training, source and bystanders. Demands the table `trajectory`."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from leakfast.figures.style import (
    PAGE_IN,
    SOURCE_COLOURS,
    STYLE,
    colour_of,
    figure_of,
    panels_in,
    settle,
    source_words,
    words,
    wrapped,
)


def trajectory(table: pl.DataFrame, unit: Callable[[str], str], width: float = PAGE_IN) -> Figure:
    """The rate against the share of training, the source bold with its interval, the others thin; one legend for all
    panels. A row of panels is what was measured under what training, on one axis, a column a source (and seed); where
    there is one row, or the columns are too many for `width` inches, panels follow one another. unit: behavior → share
    or points."""
    key = ["behavior", "adapter", "source", "seed", "items", "scoring"]
    panels = table.select(key).unique(maintain_order=True).rows(named=True)
    for panel in panels:
        panel["trained"] = panel["adapter"].partition(f"-{panel['source']}")[0]
    if len({_row(panel) + _column(panel) for panel in panels}) < len(panels):  # several trainings of a kind
        for panel in panels:
            panel["trained"] = panel["adapter"]
    kinds = list(dict.fromkeys(map(_row, panels)))
    sources = list(dict.fromkeys(map(_column, panels)))
    narrow = width < 5
    room = width if narrow else width - 1.5
    grid_of = len(kinds) > 1 and room / len(sources) >= 1.05
    columns = len(sources) if grid_of else panels_in(room, len(panels), 1.6, 3)
    panel_in = min(2.4, room / columns)
    rows = len(kinds) if grid_of else -(-len(panels) // columns)
    people = table["persona"].unique(maintain_order=True).sort().to_list()
    styles = {
        name: {"color": colour_of(i), "linestyle": ("-", "--", ":")[i // len(SOURCE_COLOURS) % 3]}
        for i, name in enumerate(people)
    }
    with matplotlib.rc_context(STYLE):
        figure = figure_of(
            (width if narrow else panel_in * columns + 1.5, _height(panel_in, rows, narrow * len(people)))
        )
        grid = figure.subplots(rows, columns, sharex=True, sharey="row" if grid_of else False, squeeze=False)
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
            axis.xaxis.set_major_locator(MaxNLocator(nbins=3))
        for axis in [axis for axis in places if axis not in axes]:
            axis.remove()
        _tell(axes, panels, places, columns, (grid_of, panel_in))
        place, across = ("outside lower center", 2) if narrow else ("outside right upper", 1)
        names = [words(name) for name in named]
        figure.legend(named.values(), names, loc=place, ncols=across, columnspacing=1)
        settle(figure)
    return figure


def _tell(
    axes: list[Axes], panels: list[dict], places: list[Axes], columns: int, shape: tuple[bool, float]
) -> None:
    """Sources above the panels, what is shown beside them, the share of training below."""
    grid_of, panel_in = shape
    several = len({panel["seed"] for panel in panels}) > 1
    for axis, panel in zip(axes, panels, strict=True):
        place = places.index(axis)
        above, below = places[place % columns : place : columns], places[place + columns :: columns]
        if not grid_of or not any(other in axes for other in above):
            title = source_words(panel["source"], panel["seed"], several)
            axis.set_title(
                wrapped(title, panel_in - (0.2 if grid_of else 0.75), 8.5), loc="left", fontweight="bold"
            )
        if place % columns == 0 or not grid_of:
            told = wrapped(f"{words(panel['behavior'])}, {words(panel['trained'])} taught", 1.4, 7.5)
            axis.set_ylabel(told)
        last = not any(other in axes for other in below)
        axis.tick_params(labelbottom=last)
        if last:
            axis.set_xlabel(wrapped("share of training", panel_in - 0.3, 7.5))


def _height(panel_in: float, rows: int, below: int) -> float:
    """Of the figure, in inches; below: names that the legend under the panels holds."""
    return (
        rows * (min(panel_in, 1.9 if rows < 3 else 1.5 if rows < 5 else 1.15) + 0.3)
        + 0.3
        + 0.16 * -(-below // 2)
    )


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
