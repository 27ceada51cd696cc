"""What is left of ρ once something else is taken out, per source. Demands the table `partials`."""

from __future__ import annotations

import matplotlib
import polars as pl
from matplotlib.figure import Figure

from leakfast.figures.style import (
    FAINT,
    PAGE_IN,
    STYLE,
    adapter_words,
    colour_of,
    figure_of,
    interval,
    settle,
    words,
    wrapped,
)

_NAMES = {
    "none": "nothing",
    "prompt_words": "prompt length",
    "baseline": "baseline rate",
    "jaccard": "word overlap",
    "shared_word": "a shared word",
    "tfidf": "tf-idf similarity",
    "similarity": "given similarity",
    "category": "category",
    "all": "all of these",
}


def partials(
    table: pl.DataFrame,
    *,
    behavior: str,
    layer: int,
    cosine: str = "centered",
    y: str = "rate",
    width: float = PAGE_IN,
) -> Figure | None:
    """Partial Spearman ρ with its 95 % interval: a row a control, a colour a source.

    Controls that are known for no source have no row. None where no ρ is defined."""
    here = table.filter(pl.col("partial").is_not_null(), behavior=behavior, layer=layer, cosine=cosine, y=y)
    if here.is_empty():
        return None
    controls = [name for name in _NAMES if name in set(here["control"])]
    several = here["seed"].n_unique() > 1
    adapters = here.select("adapter", "source", "seed").unique(maintain_order=True).rows(named=True)
    names = adapter_words(adapters, several)
    step = 0.7 / len(adapters)
    narrow = width < 5
    with matplotlib.rc_context(STYLE):
        figure = figure_of(
            (width, (1.3 if narrow else 0.7) + len(controls) * max(0.28, 0.07 * len(adapters)))
        )
        axis = figure.subplots()
        for k, its in enumerate(adapters):
            mine = {r["control"]: r for r in here.filter(adapter=its["adapter"]).rows(named=True)}
            found = [(i, mine[name]) for i, name in enumerate(controls) if name in mine]
            heights = [i + (k - (len(adapters) - 1) / 2) * step for i, _ in found]
            colour, label = colour_of(k), names[k]
            for height, (_, row) in zip(heights, found, strict=True):
                interval(axis, row["low"], row["high"], height, colour)
            values = [row["partial"] for _, row in found]
            axis.plot(values, heights, "o", color=colour, markersize=3, label=label)
        axis.axvline(0, color=FAINT, linewidth=0.6, zorder=0)
        axis.set_yticks(range(len(controls)), [_NAMES[name] for name in controls])
        axis.invert_yaxis()
        axis.set_ylabel("taken out of both")
        told = f"partial Spearman ρ, {cosine} cosine (layer {layer}) and {words(behavior)} {y}"
        axis.set_xlabel(wrapped(told, width - 1.5, 7.5))
        figure.legend(
            loc="outside lower center" if narrow else "outside right upper", ncols=2 if narrow else 1
        )
        settle(figure)
    return figure
