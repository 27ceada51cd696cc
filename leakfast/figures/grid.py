"""Behaviors × sources: cosine against rate, the source as a star, whoever shares a word with its name as a diamond, and
whoever leaks beyond the cosine by name. Demands the tables of rates, pairs and correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import isotonic_regression
from scipy.stats import rankdata

from leakfast.figures.fitting import numbered
from leakfast.figures.names import name_points
from leakfast.figures.scatter import draw_star, limits, mark, result, stars_of
from leakfast.figures.style import (
    INK,
    PAGE_IN,
    STAR,
    STYLE,
    adapter_words,
    captioned,
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
from leakfast.stats.confounds import words as words_of
from leakfast.stats.correlations import POOLED
from leakfast.stats.people import People
from leakfast.stats.summary import outcome
from leakfast.stats.summary import unit as unit_of

NAMED, FAR = 3, 0.08  # outliers named in a panel, and the share of its height that they are away from the fit
_COLUMN = ["source", "seed", "nth"]  # nth: of the adapters of one source and seed
_PLAIN, _SHARED = "#7a9cc6", "#e8a33d"


def grid(
    rates: pl.DataFrame,
    pairs: pl.DataFrame,
    correlations: pl.DataFrame,
    *,
    layers: Mapping[str, int],
    cosine: str = "centered",
    p: str = "perm",
    width: float = PAGE_IN,
) -> Figure:
    """A row a behavior of `layers` (behavior → layer), a column an adapter's source (of several adapters of one source and seed
    each has its own); where the columns are too many for `width` inches, a behavior's row wraps. Points are bystanders: a
    diamond with a dark edge where the name shares a content word with the source's, else a dot; the star is the source
    (cosine 1, not in ρ). y is each behavior's own outcome (rate or delta). The dotted steps are the isotonic fit in ρ's
    direction; the NAMED bystanders farthest from it are named, if they are FAR from it and their names find room. p: `perm`
    or `t`. The caption has the pooled ρ.

    Raises ValueError where no behavior has a pair at its layer."""
    shown = {b: _pairs(pairs, rates, b, layer, cosine) for b, layer in layers.items()}
    shown = {b: found for b, found in shown.items() if found.height}
    if not shown:
        raise ValueError(f"no pair of {', '.join(layers)} has a {cosine} cosine at the layers asked")
    who = pl.concat([found.select(_COLUMN) for found in shown.values()]).unique(maintain_order=True).rows()
    columns = panels_in(
        width, len(who), 2.2 if len(shown) == 1 and width > 5 else 1.15, 6 if len(shown) > 1 else 3
    )
    if width < 5:
        columns = min(columns, 2)
    lines = math.ceil(len(who) / columns)
    panel_in = width / columns
    with matplotlib.rc_context(STYLE):
        figure = figure_of((width, len(shown) * lines * (min(panel_in, 1.75) + 0.45)))
        cells = figure.subplots(len(shown) * lines, columns, squeeze=False, sharex=True)
        drawn = []
        for block, (behavior, found) in enumerate(shown.items()):
            rows = cells[block * lines : (block + 1) * lines].ravel()
            how = {"y": outcome(rates, behavior), "cosine": cosine, "p": p, "panel_in": panel_in}
            how |= {
                "behavior": behavior,
                "layer": layers[behavior],
                "who": who,
                "unit": unit_of(rates, behavior),
            }
            drawn += _behavior(rows, found, rates, correlations, how)
        used = {axis for axis, *_ in drawn}
        free = [axis for axis in cells.ravel() if axis not in used]
        for axis in free:
            axis.set_axis_off()
        _legend(figure, free[-1] if free and panel_in > 1.7 else None, 2 if width < 5 else 4)
        settle(figure)
        for axis, named, points in drawn:
            name_points(axis, named, points, most=NAMED, wrap_in=min(0.9, 0.5 * panel_in))
    told = [
        _pooled(correlations, b, layer, cosine, outcome(rates, b))
        for b, layer in layers.items()
        if b in shown
    ]
    return captioned(figure, " ".join(filter(None, told)))


def _pairs(pairs: pl.DataFrame, rates: pl.DataFrame, behavior: str, layer: int, cosine: str) -> pl.DataFrame:
    """The pairs of a behavior with both values, whether the names share a word, and which of the adapters of one source and seed
    theirs is (nth)."""
    y = outcome(rates, behavior)
    known = pl.col(f"cosine_{cosine}").is_not_null() & pl.col(y).is_not_null()
    found = pairs.filter(known, behavior=behavior, layer=layer)
    names = [*found["persona"].unique(), *found["source"].unique()]
    said, _ = words_of(People(dict.fromkeys(names)))
    shares = [bool(said[a] & said[b]) for a, b in found.select("source", "persona").rows()]
    found = found.with_columns(shares=pl.Series(shares, dtype=pl.Boolean))
    nth = numbered(found).select("adapter", "nth")
    return found.join(nth, on="adapter", how="left", maintain_order="left")


def _behavior(
    axes: np.ndarray,
    found: pl.DataFrame,
    rates: pl.DataFrame,
    correlations: pl.DataFrame,
    how: dict[str, Any],
) -> list[tuple[Axes, list, np.ndarray]]:
    """Draw a behavior's panels and return (axes, who is to be named, points) of each."""
    behavior, y, cosine, layer = how["behavior"], how["y"], how["cosine"], how["layer"]
    several = len({seed for _, seed, _ in how["who"]}) > 1
    adapters = found.select("adapter", *_COLUMN).unique(maintain_order=True).rows(named=True)
    names = {
        tuple(row[key] for key in _COLUMN): name
        for row, name in zip(adapters, adapter_words(adapters, several), strict=True)
    }
    columns = axes[0].get_gridspec().ncols
    stars, drawn, first = stars_of(rates, behavior, y), [], None
    seen = [0.0, *found[y].to_list(), *(row[y] for row in stars.values())]
    far = FAR * (max(seen) - min(seen))
    for place, (axis, (source, seed, nth)) in enumerate(zip(axes, how["who"], strict=False)):
        mine = found.filter(pl.col("seed").eq_missing(pl.lit(seed, pl.Int64)), source=source, nth=nth)
        if mine.is_empty():
            continue
        star = stars.get(mine["adapter"][0])
        told = correlations.filter(
            pl.col("category").is_null(),
            behavior=behavior,
            adapter=mine["adapter"][0],
            layer=layer,
            cosine=cosine,
            y=y,
        )
        name = wrapped(names[source, seed, nth], how["panel_in"] - 0.1, 9)
        headed(axis, name, [result(told, narrow=how["panel_in"] < 2.1, p=how["p"])])
        named, points = _points(axis, mine, cosine, y, far)
        draw_star(axis, star, y)
        drawn.append((axis, named, np.vstack([points, [[1.0, star[y]]]]) if star else points))
        first = first or axis
        if axis is not first:
            axis.sharey(first)
        axis.tick_params(labelleft=place % columns == 0, labelbottom=True)
        if place % columns == 0:
            axis.set_ylabel(
                wrapped(quantity(behavior, y, how["unit"]), min(how["panel_in"], 1.75) - 0.15, 7.5)
            )
        if place + columns >= len(how["who"]):
            axis.set_xlabel(wrapped(f"{cosine} cosine, layer {layer}", how["panel_in"] - 0.25))
    limits(first, found, cosine, y, [row[y] for row in stars.values()])
    in_percent(first.yaxis, how["unit"])
    return drawn


def _points(axis: Axes, mine: pl.DataFrame, cosine: str, y: str, far: float) -> tuple[list, np.ndarray]:
    """Dots, diamonds and the isotonic steps; returns the bystanders farthest from the steps, and all points."""
    for shares, style in (
        (False, {"c": _PLAIN, "marker": "o", "s": 9, "edgecolors": "white", "linewidths": 0.25}),
        (True, {"c": _SHARED, "marker": "D", "s": 13, "edgecolors": INK, "linewidths": 0.6}),
    ):
        some = mine.filter(pl.col("shares") == shares)
        axis.scatter(some[f"cosine_{cosine}"].to_numpy(), some[y].to_numpy(), zorder=2 + shares, **style)
    order = mine.sort([f"cosine_{cosine}", "persona"])
    x, values = order[f"cosine_{cosine}"].to_numpy(), order[y].to_numpy()
    points = np.column_stack([x, values])
    if np.ptp(values) == 0 or np.ptp(x) == 0:
        return [], points
    fitted = isotonic_regression(
        values, increasing=bool(np.corrcoef(rankdata(x), rankdata(values))[0, 1] >= 0)
    ).x
    axis.step(x, fitted, where="mid", color="#555555", linewidth=0.7, linestyle=(0, (1, 1)), zorder=1.5)
    away = np.abs(values - fitted)
    away[away < far] = 0
    ranked = np.lexsort((np.arange(len(away)), -away))[: 2 * NAMED]
    return [(words(order["persona"][int(i)]), (x[i], values[i])) for i in ranked if away[i] > 0], points


def _legend(figure: Figure, place: Axes | None, columns: int) -> None:
    """In a panel that is free, else below all."""
    handles = [
        mark(STAR, "*", 8),
        mark(_SHARED, "D", 4, markeredgecolor=INK, markeredgewidth=0.6),
        mark(_PLAIN, "o", 4),
        Line2D([], [], color="#555555", linewidth=0.8, linestyle=(0, (1, 1))),
    ]
    names = ["source (not in ρ)", "shares a word with its name", "other bystanders", "isotonic fit"]
    spaced = {"handletextpad": 0.4, "columnspacing": 1.2, "borderpad": 0.2}
    if place is not None:
        place.legend(handles, names, loc="center", **spaced)
    else:
        figure.legend(handles, names, loc="outside lower center", ncols=columns, **spaced)


def _pooled(correlations: pl.DataFrame, behavior: str, layer: int, cosine: str, y: str) -> str:
    """The pooled ρ of a behavior in words: within the sources, and of all pairs as they are."""
    rows = correlations.filter(
        pl.col("category").is_null(),
        pl.col("spearman").is_not_null(),
        behavior=behavior,
        layer=layer,
        source=POOLED,
    ).filter(cosine=cosine, y=y)
    told = []
    for i, row in enumerate(rows.rows(named=True)):
        seed = f", seed {row['seed']}" if rows.height > 1 else ""
        line = f"{words(behavior)}, all sources{seed}: within sources {result(rows[i : i + 1])}"
        if row.get("spearman_plain") is not None:
            p = p_words(row["spearman_plain_p_t"])
            line += f"; over all pairs as they are ρ = {row['spearman_plain']:.2f}, p = {p} (t)"
        told.append(line.replace("= -", "= −") + ".")
    return " ".join(told)
