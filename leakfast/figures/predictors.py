"""How well each predictor orders the bystanders of a source that it was not learned from. Demands the table
`predictors_held_out`."""

from __future__ import annotations

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from leakfast.figures.style import (
    FAINT,
    INK,
    PAGE_IN,
    SMALLEST_PT,
    STYLE,
    captioned,
    colour_of,
    figure_of,
    interval,
    settle,
    words,
    wrapped,
)
from leakfast.stats.correlations import POOLED
from leakfast.stats.predictors import FAMILIES, REFERENCE

_GAP = 0.9  # rows between two families


def predictors(table: pl.DataFrame, *, behavior: str, width: float = PAGE_IN) -> Figure | None:
    """A row a predictor (and training seed, where there are several), families apart, in each the largest mean first: a dot a
    source left out, a diamond their mean with its 95 % interval over sources, personas and questions. Predictors without a mean
    have no row. None where none has one: with a single source nothing can be left out."""
    here = table.filter(behavior=behavior)
    means = here.filter(pl.col("spearman").is_not_null(), source=POOLED)
    if means.is_empty():
        return None
    several = means["seed"].n_unique() > 1
    known = {family: i for i, family in enumerate(FAMILIES)}
    order = pl.col("family").replace_strict(known, default=len(known), return_dtype=pl.Int64)
    rows = means.sort(order, -pl.col("spearman"), maintain_order=True).rows(named=True)
    at, heads = _places([row["family"] for row in rows])
    with matplotlib.rc_context(STYLE):
        figure = figure_of((width, 1.0 + 0.17 * (at[-1] + 1)))
        axis = figure.subplots()
        sources = here.filter(pl.col("source") != POOLED)["source"].unique(maintain_order=True).to_list()
        for k, source in enumerate(sources):
            _dots(axis, here.filter(source=source), rows, at, (colour_of(k), words(source)))
        for place, row in zip(at, rows, strict=True):
            interval(axis, row["spearman_low"], row["spearman_high"], place, INK)
            axis.plot([row["spearman"]], [place], "D", color=INK, markersize=4, zorder=3)
        axis.plot([], [], "D-", color=INK, markersize=4, linewidth=0.9, label="mean, 95 %")
        axis.axvline(0, color=FAINT, linewidth=0.6, zorder=0)
        reference = [r["spearman"] for r in rows if r["predictor"] == REFERENCE]
        for value in reference:
            axis.axvline(value, color=FAINT, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        labels = [words(r["predictor"]) + (f", seed {r['seed']}" if several else "") for r in rows]
        axis.set_yticks(at, labels)
        for family, place in heads:
            style = {"fontsize": SMALLEST_PT, "fontweight": "bold", "ha": "right", "va": "center"}
            axis.annotate(
                family, (0, place), (-4, 0), axis.get_yaxis_transform(), textcoords="offset points", **style
            )
        axis.set_ylim(at[-1] + 0.7, -_GAP - 0.5)
        axis.set_xlabel(
            wrapped(f"Spearman ρ of prediction and {words(behavior)} {rows[0]['y']}", width - 2, 7.5)
        )
        figure.legend(loc="outside lower center", ncols=3 if width < PAGE_IN else 6, columnspacing=1.2)
        settle(figure)
    told = "Each source left out in turn: a predictor's layer and direction are those of the other sources."
    return captioned(figure, f"{told} Dashed: the centered cosine's mean." if reference else told)


def _places(families: list[str]) -> tuple[list[float], list[tuple[str, float]]]:
    """Heights of the rows, and of each family's name above its own."""
    at: list[float] = []
    heads: list[tuple[str, float]] = []
    for i, family in enumerate(families):
        first = i == 0 or family != families[i - 1]
        at.append(0.0 if i == 0 else at[-1] + 1 + (first * (_GAP + 0.3)))
        if first:
            heads.append((family, at[-1] - _GAP))
    return at, heads


def _dots(axis: Axes, mine: pl.DataFrame, rows: list[dict], at: list[float], look: tuple[str, str]) -> None:
    """ρ of one source left out."""
    found = {(seed, name): rho for seed, name, rho in mine.select("seed", "predictor", "spearman").rows()}
    points = [
        (found.get((row["seed"], row["predictor"])), place) for row, place in zip(rows, at, strict=True)
    ]
    known = [(rho, place) for rho, place in points if rho is not None]
    axis.plot(
        [rho for rho, _ in known],
        [place for _, place in known],
        "o",
        color=look[0],
        markersize=2.8,
        alpha=0.8,
        label=look[1],
    )
