"""The base model's personas in a plane. Demands a map (`stats.persona_map`) and who the personas are; the caption says how
much of the geometry the plane keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from leakfast.figures.names import name_points
from leakfast.figures.scatter import mark, styles_of
from leakfast.figures.style import FAINT, PAGE_IN, STAR, STYLE, captioned, figure_of, settle, words
from leakfast.stats.persona_map import PersonaMap

_AT = ("persona", "x", "y")


def persona_map(
    found: PersonaMap, categories: Mapping[str, str | None], sources: Sequence[str], *, width: float = PAGE_IN
) -> Figure:
    """A point a persona, colour and shape its category, the sources as stars with their names; beside them as many of
    the outermost personas are named as find room. Both axes have one scale, so that distances can be read.

    categories: persona → category; sources: those that something was trained into."""
    points = found.points.with_columns(
        category=pl.col("persona").replace_strict(dict(categories), default=None, return_dtype=pl.String)
    )
    styles = styles_of(points["category"])
    narrow = width < 5
    across = max(1, int(width / 1.4))
    lines = math.ceil((len(styles) + 1) / across) if narrow else 0
    own = points.filter(pl.col("persona").is_in(list(sources)))
    at = points.select("x", "y").to_numpy()
    with matplotlib.rc_context(STYLE):
        figure = figure_of((width, (3.3 if narrow else 4.6) + 0.16 * lines))
        axis = figure.subplots()
        for kind, (colour, shape) in styles.items():
            some = points.filter(pl.col("category").eq_missing(pl.lit(kind, pl.String)))
            style = {"s": 16, "linewidths": 0.35, "edgecolors": "white", "alpha": 0.9, "zorder": 2}
            axis.scatter(some["x"].to_numpy(), some["y"].to_numpy(), c=colour, marker=shape, **style)
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
        axis.plot(own["x"].to_numpy(), own["y"].to_numpy(), "*", color=STAR, markersize=9, zorder=4, **edge)
        for line in (axis.axhline, axis.axvline):
            line(0, color=FAINT, linewidth=0.5, zorder=0)
        axis.set_aspect("equal", adjustable="datalim")
        axis.margins(0.08)
        where = f"of √(2 − 2 cos), {found.cosine} cosine, layer {found.layer}"
        axis.set_xlabel(f"first axis {where}")
        axis.set_ylabel("second axis")
        handles = [mark(STAR, "*", 8)] + [mark(colour, shape, 4.8) for colour, shape in styles.values()]
        names = ["source"] + [words(kind) if kind else "no category" for kind in styles]
        place = "outside lower center" if narrow else "outside right center"
        spaced = {"handletextpad": 0.3, "columnspacing": 1, "borderpad": 0.2}
        figure.legend(handles, names, loc=place, ncols=across if narrow else 1, **spaced)
        settle(figure)
        far = points.filter(~pl.col("persona").is_in(list(sources)))
        far = far.sort((pl.col("x") ** 2 + pl.col("y") ** 2).neg(), "persona")
        named = [(words(n), (x, y)) for n, x, y in [*own.select(*_AT).rows(), *far.select(*_AT).rows()]]
        bold = frozenset(words(name) for name in own["persona"])
        most = own.height + (8 if narrow else 20)
        name_points(axis, named, np.asarray(at, dtype=np.float64), most=most, bold=bold, wrap_in=1.1)
    return captioned(figure, found.caption())
