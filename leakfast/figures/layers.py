"""ρ by layer, one line a source. Demands the table of correlations."""

from __future__ import annotations

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from leakfast.figures.style import FAINT, INK, STYLE, colour_of, figure_of, settle, words
from leakfast.stats.correlations import COSINES, POOLED
from leakfast.stats.summary import best_layer


def layers(
    correlations: pl.DataFrame, *, behavior: str, y: str = "rate", cosines: tuple[str, ...] = COSINES
) -> Figure | None:
    """Spearman ρ by layer, one line per source and a thick one pooled, one panel per cosine.

    The ring is the layer with the largest pooled |ρ|. A hollow dot: not distinguishable from chance once the
    choice of a layer is paid for (`spearman_p_max` from 0.05 on, where it is known). None where there are
    fewer than two layers."""
    all_rows = correlations.filter(
        pl.col("category").is_null(), pl.col("spearman").is_not_null(), behavior=behavior, y=y
    )
    cosines = tuple(c for c in cosines if all_rows.filter(cosine=c)["layer"].n_unique() > 1)
    if not cosines:
        return None
    lines = all_rows.select("adapter", "source", "seed").unique(maintain_order=True).rows()
    sources = [source for _, source, _ in lines if source != POOLED]
    colours = {source: colour_of(i) for i, source in enumerate(dict.fromkeys(sources))} | {POOLED: INK}
    with matplotlib.rc_context(STYLE):
        figure = figure_of((3.6 * len(cosines), 2.7))
        axes = figure.subplots(1, len(cosines), sharey=True, squeeze=False)[0]
        for axis, cosine in zip(axes, cosines, strict=True):
            ends = []
            for adapter, source, seed in lines:
                line = all_rows.filter(
                    pl.col("adapter").eq_missing(pl.lit(adapter, pl.String)),
                    pl.col("seed").eq_missing(pl.lit(seed, pl.Int64)),
                    cosine=cosine,
                    source=source,
                ).sort("layer")
                if line.is_empty():
                    continue
                pooled, colour = source == POOLED, colours[source]
                width, size, above = (2.0, 3.2, 3) if pooled else (1.1, 2.4, 2)
                _line(axis, line, color=colour, linewidth=width, markersize=size, zorder=above)
                if "spearman_p_max" in line.columns:
                    chance = line.filter(pl.col("spearman_p_max") >= 0.05)
                    hollow = {"markerfacecolor": "white", "markeredgewidth": 0.8, "linestyle": "none"}
                    _line(axis, chance, color=colour, markersize=size, zorder=4, **hollow)
                ends.append((line["spearman"][-1], words(source), colour, pooled))
            _ring(axis, all_rows, behavior, cosine, y)
            axis.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axis.set_title(f"{cosine} cosine", loc="left", fontweight="bold")
            axis.set_xlabel("layer (output of decoder block, 0-based)")
            _name_ends(axis, ends, max(all_rows["layer"]))
        axes[0].set_ylabel(f"Spearman ρ, cosine and {behavior} {y}")
        settle(figure)
    return figure


def _line(axis: Axes, rows: pl.DataFrame, **style) -> None:
    axis.plot(rows["layer"].to_list(), rows["spearman"].to_list(), marker="o", **style)


def _ring(axis: Axes, rows: pl.DataFrame, behavior: str, cosine: str, y: str) -> None:
    best = best_layer(rows, behavior, cosine, y)
    at = rows.filter(cosine=cosine, layer=best, source=POOLED)["spearman"]
    for value in at:
        axis.plot([best], [value], "o", markersize=8, fillstyle="none", color=INK, markeredgewidth=0.9)


def _name_ends(axis: Axes, ends: list[tuple[float, str, str, bool]], last: int) -> None:
    """Names at the right end of the lines, pushed apart where they would overlap."""
    ends = sorted(ends)
    low, high = axis.get_ylim()
    steps = np.arange(len(ends)) * (high - low) * 0.062
    heights = isotonic_regression([end[0] for end in ends] - steps).x + steps  # least total shift
    for height, (_, name, colour, bold) in zip(heights, ends, strict=True):
        axis.annotate(
            name,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            fontsize=6.5,
            va="center",
            fontweight="bold" if bold else "normal",
            annotation_clip=False,
        )
    axis.set_xlim(right=last + 0.02 * max(last, 1))
