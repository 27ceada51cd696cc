"""The shape of each source's gradient: rates, the fitted logistic curve with its midpoint and 10–90 % width,
and the isotonic steps. Demands the tables of pairs, gradients and isotonic."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy.special import expit

from leakfast.figures.style import (
    FAINT,
    INK,
    PAGE_IN,
    STYLE,
    adapter_words,
    colour_of,
    figure_of,
    headed,
    in_percent,
    panels_in,
    quantity,
    settle,
    wrapped,
)
from leakfast.stats.gradients import WIDTH


def gradients(
    pairs: pl.DataFrame,
    fits: pl.DataFrame,
    isotonic: pl.DataFrame,
    *,
    behavior: str,
    unit: str = "share",
    width: float = PAGE_IN,
) -> Figure | None:
    """One panel a source with a fitted curve: bystanders as dots, the curve, its midpoint (line) and 10–90 %
    width (band), the isotonic fit (thin steps). None where no source has a curve.

    `fits`, `isotonic`: tables `gradients` and `isotonic`, which say the layer and the cosine."""
    rows = fits.filter(pl.col("midpoint").is_not_null(), behavior=behavior).rows(named=True)
    if not rows:
        return None
    across = panels_in(width, len(rows), 1.7, 3)
    panel_in = width / max(across, min(2, width // 2))
    down = math.ceil(len(rows) / across)
    names = adapter_words(rows, len({row["seed"] for row in rows}) > 1)
    with matplotlib.rc_context(STYLE):
        figure = figure_of((min(width, panel_in * max(across, 2)), (min(panel_in, 2.1) + 0.35) * down + 0.3))
        axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for place, axis in enumerate(axes.ravel()):
            if place >= len(rows):
                axis.set_axis_off()
                continue
            row = rows[place]
            headed(axis, wrapped(names[place], panel_in - 0.1, 8), [_told(row)])
            same = (pl.col("behavior") == behavior) & (pl.col("adapter") == row["adapter"])
            same &= pl.col("layer") == row["layer"]
            at = pairs.filter(same & pl.col(f"cosine_{row['cosine']}").is_not_null())
            _panel(axis, at, isotonic.filter(same), row, colour_of(place))
            axis.tick_params(labelleft=place % across == 0, labelbottom=place + across >= len(rows))
            if place % across == 0:
                axis.set_ylabel(wrapped(quantity(behavior, "rate", unit), min(panel_in, 2.1) - 0.4, 7.5))
            if place + across >= len(rows):
                axis.set_xlabel(f"{row['cosine']} cosine, layer {row['layer']}")
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=4))
        in_percent(axes[0, 0].yaxis, unit)
        handles = [
            Line2D([], [], color=INK, linewidth=1.4),
            Patch(color=FAINT, alpha=0.4, linewidth=0),
            Line2D([], [], color=INK, linewidth=0.7, linestyle=":"),
        ]
        kinds = ["logistic curve", "10–90 % width", "isotonic"]
        figure.legend(handles, kinds, loc="outside lower center", ncols=3, columnspacing=1.2)
        settle(figure)
    return figure


def _panel(axis: Axes, at: pl.DataFrame, steps: pl.DataFrame, row: dict, colour: str) -> None:
    x = at[f"cosine_{row['cosine']}"].to_numpy()
    dots = {"s": 9, "linewidths": 0.3, "edgecolors": "white", "alpha": 0.75, "zorder": 2}
    axis.scatter(x, at["rate"].to_numpy(), c=colour, **dots)
    low, high = float(x.min()), float(x.max())
    half = row["width"] / 2
    left, right = max(low, row["midpoint"] - half), min(high, row["midpoint"] + half)
    if left < right:
        axis.axvspan(left, right, color=FAINT, alpha=0.4, linewidth=0, zorder=0)
    if low <= row["midpoint"] <= high:
        axis.axvline(row["midpoint"], color="#777777", linewidth=0.6, zorder=1)
    line = np.linspace(low, high, 200)
    curve = row["far"] + (row["near"] - row["far"]) * expit(WIDTH * (line - row["midpoint"]) / row["width"])
    axis.plot(line, curve, color=INK, linewidth=1.4, zorder=3)
    order = steps.sort("at", maintain_order=True)
    dotted = {"color": INK, "linewidth": 0.7, "linestyle": ":", "zorder": 3}
    axis.step(order["at"].to_numpy(), order["fitted"].to_numpy(), where="mid", **dotted)


def _told(row: dict) -> str:
    """The midpoint and width with their intervals, open ends said."""

    def with_ends(name: str) -> str:
        low, high = (
            "open" if row[f"{name}_{end}"] is None else f"{row[f'{name}_{end}']:.2f}"
            for end in ("low", "high")
        )
        return f"{row[name]:.2f} ({low} to {high})".replace("-", "−")

    return f"midpoint {with_ends('midpoint')}\nwidth {with_ends('width')}"
