"""The geometry before and after training, per source. Demands the tables `shifts` and `shift_correlations`."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from leakfast.figures.style import (
    FAINT,
    PAGE_IN,
    STAR,
    STYLE,
    adapter_words,
    colour_bar,
    figure_of,
    headed,
    in_percent,
    panels_in,
    quantity,
    settle,
    wrapped,
)

_DOT = {"s": 10, "linewidths": 0.3, "edgecolors": "white"}


def shifts(
    table: pl.DataFrame,
    correlations: pl.DataFrame,
    *,
    behavior: str,
    layer: int,
    cosine: str = "centered",
    y: str = "rate",
    unit: str = "share",
    width: float = PAGE_IN,
) -> Figure | None:
    """Two panels an adapter. Above: a bystander's cosine to the source in the base model against that under the
    adapter, coloured by `y`; the line is where nothing changed. Below: how far its shift points the way the source's
    does, against `y`. Their ρ with `y` are told; the source is the star. None where no adapter has centroids."""
    rows = table.filter(
        pl.col(f"cosine_{cosine}").is_not_null(), pl.col(y).is_not_null(), behavior=behavior, layer=layer
    )
    at = rows.filter(role="bystander")
    if at.is_empty():
        return None
    panels = at.select("adapter", "source", "seed").unique(maintain_order=True).rows(named=True)
    names = adapter_words(panels, len({panel["seed"] for panel in panels}) > 1)
    across = panels_in(width, len(panels), 1.7, 3)
    panel_in = (width if width < 5 else width - 0.6) / max(across, min(2, width // 2))
    blocks = math.ceil(len(panels) / across)
    row_in = min(min(panel_in, 2.1) + 0.45, 8.7 / (2 * blocks))  # a page is no higher
    shades = _shades(at[y], y)
    with matplotlib.rc_context(STYLE):
        figure = figure_of((min(width, panel_in * across + 0.9), 2 * row_in * blocks + 0.5))
        axes = figure.subplots(2 * blocks, across, squeeze=False)
        drawn, image = [], None
        for place, panel in enumerate(panels):
            block, column = divmod(place, across)
            above, below = axes[2 * block, column], axes[2 * block + 1, column]
            drawn += [above, below]
            mine = at.filter(adapter=panel["adapter"])
            rho = _rhos(correlations, behavior, panel["adapter"], layer, cosine, y)
            image = _before_and_after(above, mine, cosine, y, shades)
            name = wrapped(names[place], panel_in - 0.5, 9)
            headed(
                above, name, [wrapped(f"ρ base {rho['base']}, fine-tuned {rho['adapted']}", panel_in - 0.45)]
            )
            own = rows.filter(adapter=panel["adapter"], role="source")
            _alignment(below, mine, own, cosine, y)
            headed(below, "", [wrapped(f"ρ alignment {rho['alignment']}", panel_in - 0.45)])
            if column == 0:
                above.set_ylabel(wrapped(f"fine-tuned {cosine} cosine", min(panel_in, 2.1) - 0.4, 7.5))
                below.set_ylabel(wrapped(quantity(behavior, y, unit), min(panel_in, 2.1) - 0.4, 7.5))
            above.set_xlabel(f"base {cosine} cosine")
            below.set_xlabel(wrapped("alignment with the source’s shift", panel_in - 0.45, 7.5))
            in_percent(below.yaxis, unit)
        for axis in axes.ravel():
            if axis not in drawn:
                axis.remove()
        told = f"{quantity(behavior, y, unit)}; {cosine} cosines, layer {layer}"
        colour_bar(figure, image, drawn, told, unit, aspect=40, below=width < 5)
        settle(figure)
    return figure


def _before_and_after(axis: Axes, mine: pl.DataFrame, cosine: str, y: str, shades: dict):
    before, after = mine[f"cosine_{cosine}"].to_numpy(), mine[f"cosine_{cosine}_adapted"].to_numpy()
    both = np.concatenate([before, after])
    low, high = float(both.min()), float(both.max())
    axis.plot([low, high], [low, high], color=FAINT, linewidth=0.7, zorder=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
    return axis.scatter(before, after, c=mine[y].to_numpy(), zorder=2, **_DOT, **shades)


def _alignment(axis: Axes, mine: pl.DataFrame, own: pl.DataFrame, cosine: str, y: str) -> None:
    x = f"alignment_{cosine}"
    known = mine.drop_nulls(x)
    axis.scatter(known[x].to_numpy(), known[y].to_numpy(), c="#4477aa", zorder=2, **_DOT)
    axis.scatter(own[x].to_numpy(), own[y].to_numpy(), marker="*", s=60, c=STAR, linewidths=0, zorder=3)
    axis.axvline(0, color=FAINT, linewidth=0.6, zorder=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4))


def _shades(values: pl.Series, y: str) -> dict:
    largest = float(values.abs().max()) or 1.0
    if y == "rate":
        return {"cmap": "viridis", "vmin": 0.0, "vmax": largest}
    return {"cmap": "coolwarm", "vmin": -largest, "vmax": largest}


def _rhos(
    correlations: pl.DataFrame, behavior: str, adapter: str, layer: int, cosine: str, y: str
) -> dict[str, str]:
    found = correlations.filter(
        pl.col("category").is_null(), behavior=behavior, adapter=adapter, layer=layer, cosine=cosine, y=y
    )
    told = dict.fromkeys(("base", "adapted", "alignment", "shift"), "not defined")
    for geometry, rho in found.select("geometry", "spearman").rows():
        if rho is not None:
            told[geometry] = f"{rho:+.2f}".replace("-", "−")
    return told
