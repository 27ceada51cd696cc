"""Who leaked from whom: persona × source as shades. Demands the table `matrix`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from leakfast.figures.style import (
    COLUMN_IN,
    INK,
    PAGE_IN,
    SMALLEST_PT,
    STYLE,
    adapter_words,
    captioned,
    colour_bar,
    figure_of,
    quantity,
    settle,
    words,
)

_DOT = {"markersize": 2.8, "markeredgewidth": 0.5, "markeredgecolor": "white"}
_ROW_IN, _CELL_IN, _NAME_IN = 0.118, 0.13, 1.65
BLOCK_ROWS = 41  # rows in a column of the figure; three columns hold the 111 personas and their categories
MOST_ROWS = 56  # as many fit below one another on a printed page
ORDERS = ("category", "leakage")


def matrix(
    table: pl.DataFrame,
    *,
    behavior: str,
    y: str = "rate",
    unit: str = "share",
    order: str | Sequence[str] = "category",
    width: float = PAGE_IN,
) -> Figure | None:
    """Shades of `y` (rate or delta) for each persona (rows) and source.

    order: `category` (then by the mean over sources), `leakage` (by that mean alone), or the personas in the order
    wanted. A dot marks the source itself, a grey cell was not measured. Rates run from white to blue, deltas
    from red (less) over white to blue (more). Where the rows do not fit on a page of `width` inches, the personas that
    leak most are shown, and the caption says so. None where nothing is known. Raises ValueError for another order."""
    here = table.filter(pl.col(y).is_not_null(), behavior=behavior)
    if here.is_empty():
        return None
    several = here["seed"].n_unique() > 1
    adapters = here.select("adapter", "source", "seed").unique(maintain_order=True).rows(named=True)
    across_in = _NAME_IN + _CELL_IN * len(adapters)
    fitting = max(1, int((width + 0.35) / across_in))
    people = _ordered(here, y, order)
    kept = _kept(people, order, fitting * MOST_ROWS)
    lines = _lines(kept, order == "category")
    blocks = min(fitting, math.ceil(len(lines) / BLOCK_ROWS))
    rows = math.ceil(len(lines) / blocks)
    values, own = _values(here, y, lines, [row["adapter"] for row in adapters])
    largest = float(np.nanmax(np.abs(values))) or 1.0
    shades: dict = {"cmap": "RdBu", "norm": TwoSlopeNorm(0.0, -largest, largest)}
    if y == "rate":
        shades = {"cmap": "Blues", "vmin": 0.0, "vmax": largest}
    titles = [name.replace(", seed ", ", ") for name in adapter_words(adapters, several)]
    with matplotlib.rc_context(STYLE):
        above = 0.25 + 0.0545 * max(map(len, titles))
        figure = figure_of(
            (min(width, max(COLUMN_IN, blocks * (across_in + 0.8))), _ROW_IN * rows + above + 0.6)
        )
        axes = figure.subplots(1, blocks, squeeze=False)[0]
        for block, axis in enumerate(axes):
            inside = slice(block * rows, (block + 1) * rows)
            axis.set_facecolor("#e6e6e6")
            image = axis.imshow(values[inside], aspect="auto", interpolation="nearest", **shades)
            for i, j in own:
                if inside.start <= i < inside.stop:
                    axis.plot(j, i - inside.start, "o", color=INK, **_DOT)
            _label(axis, lines[inside], titles, rows)
        colour_bar(figure, image, axes.tolist(), quantity(behavior, y, unit), unit, aspect=40, below=True)
        settle(figure)
    return captioned(figure, _caption(people, kept, order))


def _ordered(here: pl.DataFrame, y: str, order: str | Sequence[str]) -> pl.DataFrame:
    """persona, category, role, mean (as a bystander): a row each, in the order wanted."""
    others = (
        here.filter(pl.col("role") != "source")
        .group_by("persona", maintain_order=True)
        .agg(mean=pl.col(y).mean())
    )
    own = here.filter(role="source")["persona"].unique().implode()
    people = here.select("persona", "category").unique("persona", maintain_order=True)
    people = people.join(others, on="persona", how="left").with_columns(own=pl.col("persona").is_in(own))
    more = y == "rate" or float(people["mean"].mean() or 0) > 0
    if isinstance(order, str):
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)} or a list of personas, not {order!r}")
        keys = ["category", "mean", "persona"] if order == "category" else ["mean", "persona"]
        down = [name == "mean" and more for name in keys]
        return people.sort(keys, descending=down, nulls_last=True)
    place = {name: i for i, name in enumerate(order)}
    at = pl.col("persona").replace_strict(place, default=len(place), return_dtype=pl.Int64)
    return people.sort(at, "persona")


def _kept(people: pl.DataFrame, order: str | Sequence[str], rows: int) -> pl.DataFrame:
    """The personas that fit into so many rows: the sources and those with the largest |mean|, order unchanged."""
    heads = people["category"].n_unique() if order == "category" else 0
    if people.height + heads <= rows:
        return people
    size = pl.when("own").then(float("inf")).otherwise(pl.col("mean").abs().fill_null(-1.0))
    return people.filter(size.rank("ordinal", descending=True) <= rows - heads)


def _lines(people: pl.DataFrame, by_category: bool) -> list[tuple[str, bool]]:
    """What stands in each row: (persona, True), or (category, False) above its personas."""
    lines: list[tuple[str, bool]] = []
    last: str | None = None
    for name, kind in people.select("persona", "category").rows():
        if by_category and (kind or "no category") != last:
            last = kind or "no category"
            lines.append((last, False))
        lines.append((name, True))
    return lines


def _values(
    here: pl.DataFrame, y: str, lines: list[tuple[str, bool]], adapters: list[str]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(rows, adapters) values, NaN where there is none, and the cells of the sources themselves."""
    place = {name: i for i, (name, is_persona) in enumerate(lines) if is_persona}
    column = {adapter: j for j, adapter in enumerate(adapters)}
    values, own = np.full((len(lines), len(adapters)), np.nan), []
    for name, adapter, role, value in here.select("persona", "adapter", "role", y).rows():
        if name in place:
            values[place[name], column[adapter]] = value
            if role == "source":
                own.append((place[name], column[adapter]))
    return values, own


def _label(axis: Axes, lines: list[tuple[str, bool]], titles: list[str], rows: int) -> None:
    """Names at the rows, categories bold above theirs, sources above the columns."""
    axis.set_yticks(range(len(lines)), [words(name) for name, _ in lines], fontsize=SMALLEST_PT)
    axis.set_xticks(range(len(titles)), titles, rotation=90, fontsize=SMALLEST_PT)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, pad=2)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for i, (label, (_, is_persona)) in enumerate(zip(axis.get_yticklabels(), lines, strict=True)):
        if not is_persona:
            label.set(fontweight="bold", color=INK)
            axis.axhspan(i - 0.5, i + 0.5, color="white", linewidth=0, zorder=1.5)
    if len(lines) < rows:
        axis.axhspan(len(lines) - 0.5, rows - 0.5, color="white", linewidth=0)
    axis.set_ylim(rows - 0.5, -0.5)


def _caption(people: pl.DataFrame, kept: pl.DataFrame, order: str | Sequence[str]) -> str:
    told = {"category": "by category, then by mean over the sources", "leakage": "by mean over the sources"}
    how = told[order] if isinstance(order, str) else "near ones in the base model's geometry together"
    caption = f"Rows: {how}. Dot: the source itself. Grey: not measured."
    if kept.height < people.height:
        caption += f" Shown: the sources and whoever leaks most, {kept.height} of {people.height} personas."
    return caption
