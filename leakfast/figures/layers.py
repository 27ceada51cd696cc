"""ρ by layer, one line a source, with a band that pays for picking a layer. Demands the tables of correlations and,
for the band, `picked`."""

from __future__ import annotations

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from leakfast.figures.style import (
    FAINT,
    INK,
    PAGE_IN,
    SMALLEST_PT,
    STYLE,
    colour_of,
    figure_of,
    panels_in,
    settle,
    words,
    wrapped,
)
from leakfast.stats.correlations import COSINES, POOLED
from leakfast.stats.summary import best_layer


def layers(
    correlations: pl.DataFrame,
    *,
    behavior: str,
    y: str = "rate",
    cosines: tuple[str, ...] = COSINES,
    picked: pl.DataFrame | None = None,
    width: float = PAGE_IN,
) -> Figure | None:
    """Spearman ρ by layer, one line per source and a thick one pooled, one panel per cosine.

    The ring is the layer with the largest pooled |ρ|. A hollow dot: not distinguishable from chance once the
    choice of a layer is paid for (`spearman_p_max` from 0.05 on, where it is known). With `picked` (the table), a band
    is the 95 % interval of the pooled ρ (of a single source, its own) at the picked layer that pays for the pick, and a
    diamond the ρ of questions that the pick did not see. None where there are fewer than two layers."""
    all_rows = correlations.filter(
        pl.col("category").is_null(), pl.col("spearman").is_not_null(), behavior=behavior, y=y
    )
    cosines = tuple(c for c in cosines if all_rows.filter(cosine=c)["layer"].n_unique() > 1)
    if not cosines:
        return None
    lines = all_rows.select("adapter", "source", "seed").unique(maintain_order=True).rows()
    looks = _looks(lines)
    across = panels_in(width, len(cosines), 2.8, 3)
    down = -(-len(cosines) // across)
    with matplotlib.rc_context(STYLE):
        figure = figure_of((width, 2.5 * down + 0.3))
        axes = figure.subplots(down, across, sharey=True, sharex=True, squeeze=False).ravel()
        ends = {}
        for axis, cosine in zip(axes, cosines, strict=False):
            ends[axis] = _panel(axis, all_rows.filter(cosine=cosine), looks)
            paid = _paid(picked, behavior, cosine, y)
            if paid:
                _band(axis, paid)
            _ring(axis, all_rows, behavior, cosine, y)
            axis.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axis.set_title(f"{cosine} cosine", loc="left", fontweight="bold")
            axis.tick_params(labelleft=True, labelbottom=True)
            axis.set_xlabel(f"layer (decoder block, from 0), {cosine} cosine")
            axis.set_ylabel(wrapped(f"Spearman ρ of cosine and {words(behavior)} {y}", 1.75, 7.5))
        for axis in axes[len(cosines) :]:
            axis.set_axis_off()
        for axis, named in ends.items():
            _name_ends(axis, named, max(all_rows["layer"]), 2.5)
        _legend(figure, [_paid(picked, behavior, cosine, y) for cosine in cosines], across)
        settle(figure)
    return figure


def _looks(lines: list[tuple]) -> dict[tuple, tuple[str, str]]:
    """Line (adapter, source, seed) → its name and its colour: the source's, or where several adapters have one source and seed
    the adapter's own."""
    own = [line for line in lines if line[1] != POOLED]
    each = 0 if len({line[1:] for line in own}) < len(own) else 1  # place of what has a colour
    told = list(dict.fromkeys(line[each] for line in own))
    found = {}
    for line in lines:
        name = words(line[1]) if each or line[1] == POOLED else f"{words(line[1])} ({line[0]})"
        found[line] = name, INK if line[1] == POOLED else colour_of(told.index(line[each]))
    return found


def _panel(
    axis: Axes, rows: pl.DataFrame, looks: dict[tuple, tuple[str, str]]
) -> list[tuple[float, str, str, bool]]:
    """A line each source; returns where each ends, its name, its colour and whether it is the pooled one."""
    ends = []
    for (adapter, source, seed), (name, colour) in looks.items():
        line = rows.filter(
            pl.col("adapter").eq_missing(pl.lit(adapter, pl.String)),
            pl.col("seed").eq_missing(pl.lit(seed, pl.Int64)),
            source=source,
        ).sort("layer")
        if line.is_empty():
            continue
        pooled = source == POOLED
        width, size, above = (2.0, 3.2, 3) if pooled else (1.1, 2.4, 2)
        _line(axis, line, color=colour, linewidth=width, markersize=size, zorder=above)
        if "spearman_p_max" in line.columns:
            chance = line.filter(pl.col("spearman_p_max") >= 0.05)
            hollow = {"markerfacecolor": "white", "markeredgewidth": 0.8, "linestyle": "none"}
            _line(axis, chance, color=colour, markersize=size, zorder=4, **hollow)
        ends.append((line["spearman"][-1], name, colour, pooled))
    return ends


def _paid(picked: pl.DataFrame | None, behavior: str, cosine: str, y: str) -> list[dict]:
    """The rows of `picked` with an interval: pooled, or those of a single source."""
    if picked is None:
        return []
    mine = picked.filter(behavior=behavior, cosine=cosine, y=y)
    if mine.filter(source=POOLED).height:
        mine = mine.filter(source=POOLED)
    elif mine["source"].n_unique() > 1:
        return []
    return mine.filter(pl.col("picked_low").is_not_null()).rows(named=True)


def _band(axis: Axes, paid: list[dict]) -> None:
    for row in paid:
        axis.axhspan(row["picked_low"], row["picked_high"], color=FAINT, alpha=0.35, linewidth=0, zorder=0)
        if row["cross_fitted"] is not None:
            place = [row["cross_fitted_layer"]], [row["cross_fitted"]]
            axis.plot(
                *place, "D", color="white", markersize=4.5, markeredgecolor=INK, markeredgewidth=1, zorder=5
            )


def _legend(figure: Figure, paid: list[list[dict]], across: int) -> None:
    rows = [row for some in paid for row in some]
    ring = {"markersize": 7, "fillstyle": "none", "markeredgewidth": 0.9}
    handles: list = [Line2D([], [], marker="o", color=INK, linestyle="none", **ring)]
    names = ["layer with the largest |ρ|"]
    if rows:
        pooled = "pooled " if rows[0]["source"] == POOLED else ""
        handles.append(Patch(color=FAINT, alpha=0.5, linewidth=0))
        names.append(f"{pooled}ρ there, 95 %, the pick paid for")
    if any(row["cross_fitted"] is not None for row in rows):
        shape = {"markersize": 4.5, "markerfacecolor": "white", "markeredgewidth": 1}
        handles.append(Line2D([], [], marker="D", color=INK, linestyle="none", **shape))
        names.append("ρ on questions not picked on")
    spaced = {"handletextpad": 0.5, "columnspacing": 1.3, "borderpad": 0.2}
    figure.legend(handles, names, loc="outside lower center", ncols=3 if across > 1 else 1, **spaced)


def _line(axis: Axes, rows: pl.DataFrame, **style) -> None:
    axis.plot(rows["layer"].to_list(), rows["spearman"].to_list(), marker="o", **style)


def _ring(axis: Axes, rows: pl.DataFrame, behavior: str, cosine: str, y: str) -> None:
    best = best_layer(rows, behavior, cosine, y)
    at = rows.filter(cosine=cosine, layer=best, source=POOLED)["spearman"]
    for value in at:
        axis.plot([best], [value], "o", markersize=8, fillstyle="none", color=INK, markeredgewidth=0.9)


def _name_ends(axis: Axes, ends: list[tuple[float, str, str, bool]], last: int, inches: float) -> None:
    """Names at the right end of the lines, pushed apart where they would overlap."""
    ends = sorted(ends)
    low, high = axis.get_ylim()
    steps = np.arange(len(ends)) * (high - low) * 1.35 * SMALLEST_PT / 72 / (inches - 0.75)
    heights = isotonic_regression([end[0] for end in ends] - steps).x + steps  # least total shift
    for height, (_, name, colour, bold) in zip(heights, ends, strict=True):
        axis.annotate(
            name,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            fontsize=SMALLEST_PT,
            va="center",
            fontweight="bold" if bold else "normal",
            annotation_clip=False,
        )
    axis.set_xlim(right=last + 0.02 * max(last, 1))
