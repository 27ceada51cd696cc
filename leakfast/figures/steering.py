"""Dose and response: the behavior on the source and on the bystanders against the strength of each intervention, and what it
costs in plain text. Demands the table `steering`."""

from __future__ import annotations

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from leakfast.figures.style import (
    FAINT,
    INK,
    PAGE_IN,
    STYLE,
    colour_of,
    figure_of,
    headed,
    in_percent,
    panels_in,
    settle,
    source_words,
    words,
    wrapped,
)
from leakfast.stats.summary import twins

_MEASURES = ("completions", "probability", "choices")  # the first that there is, is drawn
_MODES = {"add": "added", "project": "share taken out", "cap": "capped at"}
_UNITS = {"direction": "in lengths of the direction", "residual": "in mean lengths of centroids"}


def steering(table: pl.DataFrame, *, behavior: str, width: float = PAGE_IN) -> Figure | None:
    """A column an adapter, source, mode and unit, strengths from left to right: above the behavior, source solid, mean of the
    bystanders dashed with its interval; below the change of plain text's log-probability, nats a token. A colour a direction
    at the blocks steered, which are named where a direction was taken at several sets of them. None where the behavior was
    measured under no intervention."""
    mine = _lined(table.filter(behavior=behavior))
    measure = next((one for one in _MEASURES if one in mine["measure"]), None)
    if measure is None:
        return None
    mine = mine.filter(measure=measure)
    estimator = mine["estimator"][0]
    mine = mine.filter(pl.col("estimator").eq_missing(pl.lit(estimator, pl.String)))
    key = ["adapter", "source", "mode", "_unit"]
    columns = mine.select(*key, "seed").unique(key, maintain_order=True).rows(named=True)
    directions = mine["_line"].unique(maintain_order=True).to_list()
    colours = {name: colour_of(place) for place, name in enumerate(directions)}
    alike, several = twins(columns), len({one["seed"] for one in columns}) > 1
    across = panels_in(width, len(columns), 1.7, 3)
    down = -(-len(columns) // across)
    told = {"completions": "rate", "probability": f"probability ({estimator})", "choices": "accuracy"}
    with matplotlib.rc_context(STYLE):
        figure = figure_of((width, (2.7 if down < 3 else 2.4) * down + 0.5))
        axes = figure.subplots(2 * down, across, squeeze=False, height_ratios=[3, 2] * down)
        for place in range(across * down):
            upper, lower = axes[2 * (place // across) : 2 * (place // across) + 2, place % across]
            if place >= len(columns):
                upper.set_axis_off()
                lower.set_axis_off()
                continue
            column = columns[place]
            upper.tick_params(labelbottom=False)
            upper.set_ylim(-0.02, 1.02)
            in_percent(upper.yaxis, "share")
            if place % across == 0:
                upper.set_ylabel(wrapped(f"{words(behavior)}, {told[measure]}", 1.3, 7.5))
                lower.set_ylabel(wrapped("plain text, nats a token", 0.9, 7.5))
            one = mine.filter(*(pl.col(name).eq_missing(pl.lit(column[name])) for name in key))
            for line in one["_line"].unique(maintain_order=True):
                _lines(upper, lower, one.filter(_line=line).sort("strength"), colours[line])
            _head(upper, column, (alike[place], several), width / across - 0.75)
            lower.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
            told_at = ", ".join(filter(None, [_MODES[column["mode"]], _UNITS.get(column["_unit"])]))
            lower.set_xlabel(wrapped(told_at, width / across - 0.2, 7.5))
            lower.xaxis.set_major_locator(MaxNLocator(nbins=4))
        handles = [Line2D([], [], color=colours[name], linewidth=1.4) for name in directions]
        handles += [Line2D([], [], color=INK, linewidth=1.2, linestyle=line) for line in ("-", "--")]
        names = [*directions, "source", "bystanders"]
        figure.legend(
            handles, names, loc="outside lower center", ncols=4 if width == PAGE_IN else 2, columnspacing=1.2
        )
        settle(figure)
    return figure


def _head(axis: Axes, column: dict, told: tuple[bool, bool], inches: float) -> None:
    """The source above its column; the adapter too where it is the unadapted model, or a twin. told: whether it is one, and
    whether there are several seeds."""
    twin, several = told
    name = source_words(column["source"] or column["adapter"], column["seed"], several)
    adapter = column["adapter"] if twin or column["adapter"] == "base" else ""
    headed(axis, wrapped(name, inches, 8.5), [wrapped(adapter, inches)])


def _lined(mine: pl.DataFrame) -> pl.DataFrame:
    """`mine` + _unit, of what a strength is told in (null: a share), and _line, the direction with the blocks steered where it
    was taken at several sets of them: strengths in other units, or at other blocks, are no points of one line."""
    many = pl.col("steered_layers").n_unique().over("direction") > 1
    told = pl.concat_str("direction", pl.lit(", layers "), "steered_layers")
    return mine.with_columns(
        _unit=pl.when(pl.col("mode") != "project").then("unit"),
        _line=pl.when(many).then(told).otherwise("direction"),
    )


def _lines(upper: Axes, lower: Axes, rows: pl.DataFrame, colour: str) -> None:
    shape = {"color": colour, "marker": "o", "markersize": 2.4}
    own, mean, cost = (rows.drop_nulls(name) for name in ("on_source", "mean_bystander", "text_change_nats"))
    upper.plot(own["strength"], own["on_source"], linewidth=1.4, **shape)
    upper.plot(mean["strength"], mean["mean_bystander"], linewidth=1.1, linestyle="--", **shape)
    held = rows.drop_nulls("mean_bystander_low")
    ends = held["mean_bystander_low"].clip(0, 1), held["mean_bystander_high"].clip(0, 1)
    upper.fill_between(held["strength"], *ends, color=colour, alpha=0.12, linewidth=0)
    lower.plot(cost["strength"], cost["text_change_nats"], linewidth=1.1, **shape)
