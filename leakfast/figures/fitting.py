"""Which adapters have a panel where a page cannot hold all of them. Demands the table of pairs; draws nothing."""

from __future__ import annotations

import polars as pl

from leakfast.behaviors.registry import sign_of

MOST_PANELS = 24  # two printed pages of three by four


def numbered(pairs: pl.DataFrame) -> pl.DataFrame:
    """behavior, source, seed and adapter of pairs, in order of appearance, and nth: which of the behavior's adapters of that
    source and seed it is."""
    each = ["behavior", "source", "seed"]
    found = pairs.select(*each, "adapter").unique(maintain_order=True)
    return found.with_columns(nth=pl.int_range(pl.len()).over(each))


def fitting(pairs: pl.DataFrame, behavior: str, y: str) -> tuple[pl.DataFrame, str | None]:
    """The pairs of those adapters that have a panel, and what the caption says of that: all of them and nothing where no more
    than MOST_PANELS were trained, else those whose bystanders show most of the behavior on average, by `y` (at equal means the
    first), in the order in which they were. Of other behaviors' pairs those of adapters of the same sources and seeds are kept,
    of several of one source and seed the same ones by their order."""
    every = numbered(pairs)
    mine = pairs.filter(pl.col(y).is_not_null(), behavior=behavior)
    means = mine.group_by("adapter", maintain_order=True).agg(mean=pl.col(y).mean() * sign_of(behavior))
    if means.height <= MOST_PANELS:
        return pairs, None
    kept = means.sort("mean", descending=True, maintain_order=True).head(MOST_PANELS)
    told = f"Shown: the {MOST_PANELS} of {means.height} adapters whose bystanders show most of {behavior} on average."
    places = every.filter(behavior=behavior).join(kept, on="adapter", how="semi")
    shown = every.join(places, on=["source", "seed", "nth"], how="semi", nulls_equal=True)
    return pairs.join(shown, on=["behavior", "adapter"], how="semi", maintain_order="left"), told
