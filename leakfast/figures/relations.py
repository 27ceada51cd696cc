"""Leakage by what the bystander is, behaviors side by side. Demands the tables `relations` and `relations_alike`."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leakfast.figures.style import FAINT, STYLE, colour_of, figure_of, in_percent, interval, settle, words


def relations(
    table: pl.DataFrame, crossed: pl.DataFrame, *, units: Mapping[str, str], scope: str = "all"
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
    order = ranked.group_by("category").agg(pl.col("_rank").mean())
    kinds = order.sort(["_rank", "category"], descending=[True, False])["category"].to_list()
    seeds = here["seed"].unique(maintain_order=True).to_list()
    place = {kind: i for i, kind in enumerate(kinds)}
    step = 0.6 / len(seeds)
    with matplotlib.rc_context(STYLE):
        figure = figure_of((1.5 + 1.35 * len(behaviors), 1.0 + 0.2 * len(kinds) * max(1, 0.5 * len(seeds))))
        axes = figure.subplots(1, len(behaviors), sharey=True, squeeze=False)[0]
        for axis, behavior in zip(axes, behaviors, strict=True):
            mine = here.filter(behavior=behavior)
            for k, seed in enumerate(seeds):
                colour = colour_of(k)
                label = None if len(seeds) == 1 or axis is not axes[0] else f"seed {seed}"
                rows = mine.filter(pl.col("seed").eq_missing(pl.lit(seed, pl.Int64))).rows(named=True)
                at = [place[row["category"]] + (k - (len(seeds) - 1) / 2) * step for row in rows]
                for height, row in zip(at, rows, strict=True):
                    interval(axis, row["low"], row["high"], height, colour)
                axis.plot([row["mean"] for row in rows], at, "o", color=colour, markersize=3, label=label)
            axis.axvline(0, color=FAINT, linewidth=0.6, zorder=0)
            if mine["direction"][0] < 0:
                axis.invert_xaxis()
            axis.set_title(words(behavior), loc="left", fontweight="bold", fontsize=7, pad=11)
            told = _told(crossed, behaviors[0], behavior, scope)
            axis.text(0, 1.02, told, transform=axis.transAxes, fontsize=6)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=3))
            in_percent(axis.xaxis, units[behavior])
            what = "mean change" if mine["y"][0] == "delta" else "mean rate"
            axis.set_xlabel(f"{what} ({'pp' if units[behavior] == 'share' else 'points'})")
        axes[0].set_yticks(range(len(kinds)), [words(kind) for kind in kinds])
        axes[0].invert_yaxis()
        if len(seeds) > 1:
            figure.legend(loc="outside lower center", ncols=len(seeds))
        settle(figure)
    return figure


def _told(crossed: pl.DataFrame, first: str, behavior: str, scope: str) -> str:
    found = crossed.filter(scope=scope, behavior=first, other_behavior=behavior)["spearman"].drop_nulls()
    if found.is_empty():
        return ""
    return f"ρ with {words(first)} {', '.join(f'{rho:+.2f}' for rho in found)}".replace("-", "−")
