"""Cosine against rate, one panel a source: who leaked, and how near they are. Demands the tables of rates,
pairs and correlations."""

from __future__ import annotations

import itertools
import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from leakfast.figures.style import (
    CATEGORY_STYLES,
    PANEL_IN,
    STAR,
    STYLE,
    figure_of,
    in_percent,
    p_words,
    quantity,
    settle,
    source_words,
    words,
)
from leakfast.stats.summary import rate_interval
from leakfast.stats.summary import unit as unit_of


def scatter(
    rates: pl.DataFrame,
    pairs: pl.DataFrame,
    correlations: pl.DataFrame,
    *,
    behavior: str,
    layer: int,
    cosine: str = "centered",
    y: str = "rate",
    label: int = 4,
) -> Figure:
    """One panel per adapter: a bystander's cosine to the source against its rate.

    Colour and shape give the category, the star is the source itself (cosine 1, not part of ρ), the
    `label` personas with the highest rates are named. Axes are shared between panels. Shares
    are shown in percent. Raises ValueError where the tables hold no pair at this behavior and layer.
    """
    at = pairs.filter(
        pl.col(f"cosine_{cosine}").is_not_null(), pl.col(y).is_not_null(), behavior=behavior, layer=layer
    )
    if at.is_empty():
        raise ValueError(f"no pair of {behavior} at layer {layer} has a {cosine} cosine and a {y}")
    unit = unit_of(rates, behavior)
    panels = at.select("adapter", "source", "seed").unique(maintain_order=True).rows(named=True)
    styles = _styles(at["category"])
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    free = columns * height - len(panels)  # a free cell takes the legend, else a row of its own
    width = max(PANEL_IN[0] * columns, 1.4 * PANEL_IN[0])
    across = max(1, int(width / 1.35))
    legend_in = 0 if free else 0.2 + 0.16 * math.ceil((len(styles) + 1) / across)
    ratios = [PANEL_IN[1]] * height + ([legend_in] if legend_in else [])
    with matplotlib.rc_context(STYLE):
        figure = figure_of((width, sum(ratios)))
        grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
        first = figure.add_subplot(grid[0, 0])
        axes = [first]
        for place in range(1, len(panels)):
            axes.append(figure.add_subplot(grid[divmod(place, columns)], sharex=first, sharey=first))
        several = len({panel["seed"] for panel in panels}) > 1
        stars = _stars(rates, behavior, y)
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            mine = at.filter(adapter=panel["adapter"])
            _dots(axis, mine, styles, cosine, y, stars.get(panel["adapter"]))
            key = {
                "behavior": behavior,
                "adapter": panel["adapter"],
                "layer": layer,
                "cosine": cosine,
                "y": y,
            }
            found = correlations.filter(pl.col("category").is_null(), **key)
            name = source_words(panel["source"], panel["seed"], several)
            axis.set_title(name, loc="left", fontweight="bold", pad=15)
            axis.text(0, 1.03, _result(found), transform=axis.transAxes, fontsize=7, color="#444444")
            left, lowest = place % columns == 0, place + columns >= len(panels)
            axis.tick_params(labelleft=left, labelbottom=lowest)
            if left:
                axis.set_ylabel(quantity(behavior, y, unit))
            if lowest:
                axis.set_xlabel(f"{cosine} cosine, layer {layer}")
        _limits(first, at, cosine, y, stars, unit)
        _legend(figure.add_subplot(grid[-1, -1] if free else grid[-1, :]), styles, 1 if free else across)
        settle(figure)
        for axis, panel in zip(axes, panels, strict=True):
            mine = at.filter(adapter=panel["adapter"])
            _name_highest(axis, mine, cosine, y, label, stars.get(panel["adapter"]))
    return figure


def _styles(categories: pl.Series) -> dict[str | None, tuple[str, str]]:
    names: list[str | None] = sorted(categories.drop_nulls().unique().to_list())
    if "original" in names:
        names.remove("original")
        names.insert(0, "original")
    if categories.has_nulls():
        names.append(None)
    return {name: CATEGORY_STYLES[i % len(CATEGORY_STYLES)] for i, name in enumerate(names)}


def _stars(rates: pl.DataFrame, behavior: str, y: str) -> dict[str, dict]:
    own = rates.filter(behavior=behavior, role="source")
    own = own.with_columns(side.alias(f"shown_{end}") for end, side in rate_interval(own).items())
    return {row["adapter"]: row for row in own.rows(named=True) if row[y] is not None}


def _dots(axis: Axes, mine: pl.DataFrame, styles: dict, cosine: str, y: str, star: dict | None) -> None:
    for category, (colour, shape) in styles.items():
        some = mine.filter(pl.col("category").eq_missing(pl.lit(category, pl.String)))
        style = {"s": 15, "linewidths": 0.35, "edgecolors": "white", "alpha": 0.9, "zorder": 2}
        axis.scatter(some[f"cosine_{cosine}"].to_list(), some[y].to_list(), c=colour, marker=shape, **style)
    if star is not None:
        if y == "rate":
            axis.plot([1, 1], [star["shown_low"], star["shown_high"]], color=STAR, linewidth=0.9, zorder=3)
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
        axis.plot([1], [star[y]], "*", color=STAR, markersize=9, clip_on=False, zorder=4, **edge)


def _limits(axis: Axes, at: pl.DataFrame, cosine: str, y: str, stars: dict, unit: str) -> None:
    x, values = at[f"cosine_{cosine}"], [*at[y].to_list(), *(row[y] for row in stars.values())]
    left, room = x.min(), 1.0 - x.min()
    axis.set_xlim(left - 0.06 * room, 1 + 0.06 * room)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    low, high = min(0.0, *values), max(0.0, *values)
    room = (high - low) or 1.0
    axis.set_ylim(low - 0.04 * room, high + 0.06 * room)
    in_percent(axis.yaxis, unit)


def _result(rows: pl.DataFrame) -> str:
    found = rows.row(0, named=True) if rows.height else {}
    if found.get("spearman") is None:
        return "ρ is not defined" if found else ""
    shuffled = found["spearman_p_perm"]
    if shuffled is None:
        p = f", p = {p_words(found['spearman_p_t'])} (t)"
    else:  # the smallest p that so many shuffles can give is a bound
        least = shuffled * (found["permutations"] + 1) < 1.5
        p = f", p {'≤' if least else '='} {p_words(shuffled)} (perm.)"
    rho = f"{found['spearman']:.2f}".replace("-", "−")
    return f"ρ = {rho}{p}, N = {found['n']}"


def _legend(axis: Axes, styles: dict, columns: int) -> None:
    def dot(colour: str, shape: str, size: float) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="",
            marker=shape,
            color=colour,
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.4,
        )

    handles = [dot(STAR, "*", 8)] + [dot(colour, shape, 4.8) for colour, shape in styles.values()]
    names = ["source (not in ρ)"] + [words(name) if name else "no category" for name in styles]
    axis.set_axis_off()
    axis.legend(
        handles, names, loc="center", ncols=columns, handletextpad=0.3, labelspacing=0.45, columnspacing=1
    )


def _name_highest(axis: Axes, mine: pl.DataFrame, cosine: str, y: str, count: int, star: dict | None) -> None:
    """Names beside the highest points, each where it and the line to it hide the least."""
    top = mine.filter(pl.col(y) > 0).sort([y, "persona"], descending=[True, False]).head(count)
    renderer = axis.figure.canvas.get_renderer()
    spots = mine.select(f"cosine_{cosine}", y).rows() + ([(1.0, star[y])] if star else [])
    hidden = axis.transData.transform(np.array(spots, dtype=np.float64))
    frame = axis.get_window_extent(renderer)
    taken: list[Bbox] = []
    for row in top.rows(named=True):
        spot = (row[f"cosine_{cosine}"], row[y])
        start = axis.transData.transform(spot)
        best: tuple[float, Annotation, Bbox, np.ndarray] | None = None
        for distance, (dx, dy, h, v) in itertools.product((5, 11, 18, 27, 36), _AROUND):
            line = {"arrowstyle": "-", "lw": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 2}
            text = axis.annotate(
                words(row["persona"]),
                spot,
                (dx * distance, dy * distance),
                fontsize=6,
                textcoords="offset points",
                ha=h,
                va=v,
                color="#333333",
                zorder=5,
                arrowprops=line if distance > 5 else None,
                path_effects=[_HALO],
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # of the words alone, without the line
            end = start + np.array([dx, dy]) * distance * axis.figure.dpi / 72
            path = np.linspace(start, end, 9)[1:] if distance > 5 else np.empty((0, 2))
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1 + 6
            cost = box.padded(1).count_contains(hidden) + 0.1 * distance + 100 * bool(outside)
            cost += sum(30 * box.overlaps(other) + 3 * other.count_contains(path) for other in taken)
            if best is None or cost < best[0] - 1e-9:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box, path)
            else:
                text.remove()
        if best is not None:
            taken.append(best[2])
            hidden = np.vstack([hidden, best[3]])


_HALO = withStroke(linewidth=1.2, foreground="white")
_AROUND = (
    (-1, 0, "right", "center"),
    (1, 0, "left", "center"),
    (-0.7, 0.7, "right", "bottom"),
    (0.7, 0.7, "left", "bottom"),
    (-0.7, -0.7, "right", "top"),
    (0.7, -0.7, "left", "top"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
)
