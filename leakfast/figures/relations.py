"""Leakage by what the bystander is, behaviors side by side. Demands the tables `relations` and `relations_alike`."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leakfast.figures.style import (
    FAINT,
    PAGE_IN,
    STYLE,
    colour_of,
    figure_of,
    headed,
    in_percent,
    interval,
    panels_in,
    settle,
    words,
    wrapped,
)


def relations(
    table: pl.DataFrame,
    crossed: pl.DataFrame,
    *,
    units: Mapping[str, str],
    scope: str = "all",
    width: float = PAGE_IN,
) -> Figure | None:
    """A panel a behavior (its own axis: units differ), a row a category, in the same order in all: the mean change with
    its 95 % interval over personas, a colour a training seed. Axes point to more of the behavior. Above each panel its
    ρ of category means with the first behavior. `units`: behavior → share or points. None where there are no categories."""
    here = table.filter(scope=scope)
    if here.is_empty():
        return None
    behaviors = here["behavior"].unique(maintain_order=True).to_list()
    leak = pl.col("mean") * pl.col("direction")
    ranked = here.with_columns(_rank=leak.rank().over("behavior", "seed"))
    order = ranked.group_by("category", maintain_order=True).agg(pl.col("_rank").mean())
    kinds = order.sort(["_rank", "category"], descending=[True, False])["category"].to_list()
    seeds = here["seed"].unique(maintain_order=True).to_list()
    across = panels_in(width - 1.2, len(behaviors), 1.1, 6)
    down = -(-len(behaviors) // across)
    with matplotlib.rc_context(STYLE):
        tall = 1.0 + 0.17 * len(kinds) * max(1, 0.55 * len(seeds))
        figure = figure_of((min(width, 1.3 + 2.2 * across), tall * down))
        cells = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
        for axis, behavior in zip(cells, behaviors, strict=False):
            name = wrapped(words(behavior), (width - 1.3) / across - 0.15, 8.5)
            told = wrapped(_told(crossed, behaviors[0], behavior, scope), (width - 1.3) / across - 0.15)
            headed(axis, name, [told])
            _panel(axis, here.filter(behavior=behavior), kinds, seeds, units[behavior])
        for place, axis in enumerate(cells):
            axis.tick_params(labelleft=place % across == 0)
            if place >= len(behaviors):
                axis.set_axis_off()
        cells[0].set_yticks(range(len(kinds)), [words(kind) for kind in kinds])
        cells[0].invert_yaxis()
        if len(seeds) > 1:
            handles, names = cells[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=min(len(seeds), 3))
        settle(figure)
    return figure


def _panel(axis: Axes, mine: pl.DataFrame, kinds: list, seeds: list, unit: str) -> None:
    place = {kind: i for i, kind in enumerate(kinds)}
    step = 0.6 / len(seeds)
    for k, seed in enumerate(seeds):
        colour = colour_of(k)
        rows = mine.filter(pl.col("seed").eq_missing(pl.lit(seed, pl.Int64))).rows(named=True)
        at = [place[row["category"]] + (k - (len(seeds) - 1) / 2) * step for row in rows]
        for height, row in zip(at, rows, strict=True):
            interval(axis, row["low"], row["high"], height, colour)
        means = [row["mean"] for row in rows]
        axis.plot(means, at, "o", color=colour, markersize=3, label=f"seed {seed}")
    axis.axvline(0, color=FAINT, linewidth=0.6, zorder=0)
    if mine["direction"][0] < 0:
        axis.invert_xaxis()
    axis.xaxis.set_major_locator(MaxNLocator(nbins=3))
    in_percent(axis.xaxis, unit)
    what = "mean change" if mine["y"][0] == "delta" else "mean rate"
    sign = "pp" if what == "mean change" else "%"
    axis.set_xlabel(f"{what} ({sign if unit == 'share' else 'points'})")


def _told(crossed: pl.DataFrame, first: str, behavior: str, scope: str) -> str:
    found = crossed.filter(scope=scope, behavior=first, other_behavior=behavior)["spearman"].drop_nulls()
    if found.is_empty():
        return ""
    return f"ρ with {words(first)} {', '.join(f'{rho:+.2f}' for rho in found)}".replace("-", "−")
