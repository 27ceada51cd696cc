"""ρ and rates of one behavior on several question sets. Demands the table `question_sets`."""

from __future__ import annotations

import matplotlib
import polars as pl
from matplotlib.figure import Figure

from leakfast.figures.style import (
    FAINT,
    INK,
    PAGE_IN,
    STYLE,
    adapter_words,
    colour_of,
    figure_of,
    in_percent,
    interval,
    quantity,
    settle,
    words,
    wrapped,
)
from leakfast.stats.correlations import POOLED


def question_sets(
    table: pl.DataFrame,
    *,
    behavior: str,
    layer: int,
    cosine: str = "centered",
    y: str = "rate",
    unit: str = "share",
    width: float = PAGE_IN,
) -> Figure | None:
    """A row a source (and pooled), a colour a set. Left: ρ of cosine and `y` with its 95 % interval. Right: mean
    bystander (dot) and source (star). None where no ρ is defined at this layer."""
    here = table.filter(behavior=behavior, layer=layer, cosine=cosine, y=y)
    if here["spearman"].null_count() == here.height:
        return None
    people = here.select("adapter", "source", "seed").unique(maintain_order=True).rows(named=True)
    people.sort(key=lambda who: who["source"] == POOLED)
    several = len({who["seed"] for who in people}) > 1
    main_first = here.sort("main", descending=True, maintain_order=True)
    sets = main_first["questions"].unique(maintain_order=True).to_list()
    place = {tuple(who.values()): i for i, who in enumerate(people)}
    step = 0.72 / len(sets)
    narrow = width < 5
    with matplotlib.rc_context(STYLE):
        height = 0.9 + len(people) * max(0.3, 0.11 * len(sets))
        figure = figure_of((width, height + 0.16 * (len(sets) + 2) if narrow else height))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        for k, name in enumerate(sets):
            colour, label = colour_of(k), name
            for row in here.filter(questions=name).rows(named=True):
                at = place[row["adapter"], row["source"], row["seed"]] + (k - (len(sets) - 1) / 2) * step
                interval(left, row["spearman_ci_low"], row["spearman_ci_high"], at, colour)
                if row["spearman"] is not None:
                    left.plot(row["spearman"], at, "o", color=colour, markersize=3, label=label)
                    label = None  # once a set
                mean = row["mean_bystander" if y == "rate" else "mean_delta"]
                for value, shape, size in ((mean, "o", 3), (row[f"source_{y}"], "*", 5)):
                    if value is not None:
                        right.plot(value, at, shape, color=colour, markersize=size)
        for axis in (left, right):
            axis.axvline(0, color=FAINT, linewidth=0.6, zorder=0)
        left.set_yticks(range(len(people)), adapter_words(people, several))
        left.invert_yaxis()
        told = f"Spearman ρ, {cosine} cosine (layer {layer}) and {words(behavior)} {y}"
        left.set_xlabel(wrapped(told, 0.38 * width, 7.5))
        what = [quantity(behavior, y, unit), "dot: mean bystander, star: source"]
        right.set_xlabel("\n".join(wrapped(line, 0.24 * width, 7.5) for line in what), color=INK)
        in_percent(right.xaxis, unit)
        figure.legend(loc="outside lower center" if narrow else "outside right upper", title="questions")
        settle(figure)
    return figure
