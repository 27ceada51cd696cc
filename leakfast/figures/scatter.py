"""Cosine against rate, one panel a source: who leaked, and how near they are. Demands the tables of rates,
pairs and correlations."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from leakfast.figures.names import name_points
from leakfast.figures.style import (
    CATEGORY_STYLES,
    PAGE_IN,
    STAR,
    STYLE,
    adapter_words,
    figure_of,
    headed,
    in_percent,
    p_words,
    panels_in,
    quantity,
    settle,
    words,
    wrapped,
)
from leakfast.stats.summary import rate_interval
from leakfast.stats.summary import unit as unit_of

NAMED = 4  # personas named in a panel


def scatter(
    rates: pl.DataFrame,
    pairs: pl.DataFrame,
    correlations: pl.DataFrame,
    *,
    behavior: str,
    layer: int,
    cosine: str = "centered",
    y: str = "rate",
    width: float = PAGE_IN,
) -> Figure:
    """One panel per adapter: a bystander's cosine to the source against its rate.

    Colour and shape give the category, the star is the source itself (cosine 1, not part of ρ), the
    NAMED personas with the highest rates are named. Axes are shared between panels. Shares
    are shown in percent. width: of the figure, in inches. Raises ValueError where the tables hold no pair at this
    behavior and layer."""
    at = pairs.filter(
        pl.col(f"cosine_{cosine}").is_not_null(), pl.col(y).is_not_null(), behavior=behavior, layer=layer
    )
    if at.is_empty():
        raise ValueError(f"no pair of {behavior} at layer {layer} has a {cosine} cosine and a {y}")
    unit = unit_of(rates, behavior)
    panels = at.select("adapter", "source", "seed").unique(maintain_order=True).rows(named=True)
    styles = styles_of(at["category"])
    columns = panels_in(width, len(panels), 1.7, 3)
    panel_in = width / columns
    height = math.ceil(len(panels) / columns)
    free = columns * height - len(panels)  # a free cell takes the legend, else a row of its own
    free = free if 0.16 * (len(styles) + 2) < panel_in else 0
    across = max(1, int(width / 1.4))
    legend_in = 0 if free else 0.15 + 0.155 * math.ceil((len(styles) + 1) / across)
    ratios = [min(panel_in, 2.1) + 0.25] * height + ([legend_in] if legend_in else [])
    with matplotlib.rc_context(STYLE):
        figure = figure_of((width, sum(ratios)))
        grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
        first = figure.add_subplot(grid[0, 0])
        axes = [first]
        for place in range(1, len(panels)):
            axes.append(figure.add_subplot(grid[divmod(place, columns)], sharex=first, sharey=first))
        names = adapter_words(panels, len({panel["seed"] for panel in panels}) > 1)
        stars = stars_of(rates, behavior, y)
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            mine = at.filter(adapter=panel["adapter"])
            _dots(axis, mine, styles, cosine, y)
            draw_star(axis, stars.get(panel["adapter"]), y)
            told = {"behavior": behavior, "adapter": panel["adapter"], "layer": layer, "cosine": cosine}
            found = correlations.filter(pl.col("category").is_null(), y=y, **told)
            headed(axis, wrapped(names[place], panel_in - 0.1, 8), [result(found, narrow=panel_in < 2.1)])
            left, lowest = place % columns == 0, place + columns >= len(panels)
            axis.tick_params(labelleft=left, labelbottom=lowest)
            if left:
                axis.set_ylabel(wrapped(quantity(behavior, y, unit), min(panel_in, 2.1) - 0.3, 7.5))
            if lowest:
                axis.set_xlabel(wrapped(f"{cosine} cosine, layer {layer}", panel_in - 0.25))
        limits(first, at, cosine, y, [row[y] for row in stars.values()])
        in_percent(first.yaxis, unit)
        _legend(figure.add_subplot(grid[-1, -1] if free else grid[-1, :]), styles, 1 if free else across)
        settle(figure)
        for axis, panel in zip(axes, panels, strict=True):
            _name_highest(axis, at.filter(adapter=panel["adapter"]), cosine, y, stars.get(panel["adapter"]))
    return figure


def styles_of(categories: pl.Series) -> dict[str | None, tuple[str, str]]:
    """Category → its colour and shape, `original` first, no category last."""
    names: list[str | None] = sorted(categories.drop_nulls().unique().to_list())
    if "original" in names:
        names.remove("original")
        names.insert(0, "original")
    if categories.has_nulls():
        names.append(None)
    return {name: CATEGORY_STYLES[i % len(CATEGORY_STYLES)] for i, name in enumerate(names)}


def stars_of(rates: pl.DataFrame, behavior: str, y: str) -> dict[str, dict]:
    """Adapter → the row of `rates` about its own source, with the ends of the interval that is shown (shown_low,
    shown_high)."""
    own = rates.filter(behavior=behavior, role="source")
    own = own.with_columns(side.alias(f"shown_{end}") for end, side in rate_interval(own).items())
    return {row["adapter"]: row for row in own.rows(named=True) if row[y] is not None}


def draw_star(axis: Axes, star: dict | None, y: str) -> None:
    """The source at cosine 1, with the interval of its rate; nothing where it was not measured."""
    if star is None:
        return
    if y == "rate":
        axis.plot([1, 1], [star["shown_low"], star["shown_high"]], color=STAR, linewidth=0.9, zorder=3)
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
    axis.plot([1], [star[y]], "*", color=STAR, markersize=9, clip_on=False, zorder=4, **edge)


def _dots(axis: Axes, mine: pl.DataFrame, styles: dict, cosine: str, y: str) -> None:
    for category, (colour, shape) in styles.items():
        some = mine.filter(pl.col("category").eq_missing(pl.lit(category, pl.String)))
        style = {"s": 15, "linewidths": 0.35, "edgecolors": "white", "alpha": 0.9, "zorder": 2}
        axis.scatter(some[f"cosine_{cosine}"].to_list(), some[y].to_list(), c=colour, marker=shape, **style)


def limits(axis: Axes, at: pl.DataFrame, cosine: str, y: str, own: list[float]) -> None:
    """Both axes wide enough for the pairs, for the sources' own values and for 0 and cosine 1."""
    x, values = at[f"cosine_{cosine}"], [*at[y].to_list(), *own]
    left, room = x.min(), 1.0 - x.min()
    axis.set_xlim(left - 0.06 * room, 1 + 0.06 * room)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
    low, high = min(0.0, *values), max(0.0, *values)
    room = (high - low) or 1.0
    axis.set_ylim(low - 0.04 * room, high + 0.06 * room)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5))


def result(rows: pl.DataFrame, *, narrow: bool = False, p: str = "perm") -> str:
    """ρ, its p and N of one row of `correlations`; empty without a row. p: `perm` (by shuffling personas, where
    that was done) or `t` (what takes the pairs as independent); narrow: in two lines."""
    found = rows.row(0, named=True) if rows.height else {}
    if found.get("spearman") is None:
        return "ρ is not defined" if found else ""
    shuffled = found["spearman_p_perm"] if p == "perm" else None
    if shuffled is None:
        told = f"p = {p_words(found['spearman_p_t'])} (t)"
    else:  # the smallest p that so many shuffles can give is a bound
        least = shuffled * (found["permutations"] + 1) < 1.5
        told = f"p {'≤' if least else '='} {p_words(shuffled)} (perm.)"
    rho = f"ρ = {found['spearman']:.2f}".replace("-", "−")
    count = f"N = {found['n']}"
    return f"{rho}, {count}\n{told}" if narrow else f"{rho}, {told}, {count}"


def mark(colour: str, shape: str, size: float, **edge) -> Line2D:
    """A point as a legend shows it."""
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.4} | edge
    return Line2D([], [], linestyle="", marker=shape, color=colour, markersize=size, **edge)


def _legend(axis: Axes, styles: dict, columns: int) -> None:
    handles = [mark(STAR, "*", 8)] + [mark(colour, shape, 4.8) for colour, shape in styles.values()]
    names = ["source (not in ρ)"] + [words(name) if name else "no category" for name in styles]
    axis.set_axis_off()
    spaced = {"handletextpad": 0.3, "labelspacing": 0.45, "columnspacing": 1}
    axis.legend(handles, names, loc="center", ncols=columns, borderpad=0, **spaced)


def _name_highest(axis: Axes, mine: pl.DataFrame, cosine: str, y: str, star: dict | None) -> None:
    top = mine.filter(pl.col(y) > 0).sort([y, "persona"], descending=[True, False]).head(NAMED)
    named = [
        (words(name), (x, value)) for name, x, value in top.select("persona", f"cosine_{cosine}", y).rows()
    ]
    spots = mine.select(f"cosine_{cosine}", y).rows() + ([(1.0, star[y])] if star else [])
    name_points(axis, named, np.array(spots, dtype=np.float64), most=NAMED)
