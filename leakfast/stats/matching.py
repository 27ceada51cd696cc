"""Points of training that are matched on the source: which one is chosen by the sources' own rates, and which row of a point
is to be looked at where several were counted. Demands the counts of the table `trajectory`; loads no model."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from leakfast.storage.layout import CHOOSING, CHOSEN

DETECTOR = "detector"
TO_CHOOSE, ANEW = f"{DETECTOR}, {CHOOSING}", f"{DETECTOR}, {CHOSEN}"  # scoring of the sources' own rows


def nearest(points: Iterable[tuple[float, int, int]], wanted: float) -> float | None:
    """The share of training whose rate is nearest to `wanted` (0–1), the later of equals. points: (share, hits, total); those
    where nothing was counted are passed by, and without any there is none."""
    known = [
        (round(abs(hits / total - wanted), 12), -share) for share, hits, total in points if total > 0
    ]  # 0.78 and 0.82 are as near to 0.8
    return -min(known)[1] if known else None


def one_each(trajectory: pl.DataFrame) -> pl.DataFrame:
    """A row a point and persona, scored by `detector`, where sources were counted several times: of the source what was drawn
    anew at the chosen point, else what a point is chosen by, which are more replies than everybody gives. Rows of other
    scorings are as they were."""
    order = [ANEW, TO_CHOOSE, DETECTOR]
    counted = pl.col("scoring").is_in(order)
    if not trajectory.select((pl.col("scoring").is_in(order[:2])).any()).item():
        return trajectory
    best = trajectory.filter(counted).sort(
        pl.col("scoring").replace_strict({name: i for i, name in enumerate(order)}, default=None),
        maintain_order=True,
    )
    key = ["behavior", "adapter", "items", "share", "persona"]
    best = best.unique(key, keep="first", maintain_order=True).with_columns(scoring=pl.lit(DETECTOR))
    return pl.concat([best, trajectory.filter(~counted)]).sort(
        ["behavior", "adapter", "items", "scoring", "share"], maintain_order=True
    )
