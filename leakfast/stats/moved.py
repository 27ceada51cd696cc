"""How far each rate of two runs lies apart: one row per adapter and persona that both measured, in standard errors. Demands two
runs' tables; the intervals are those of `stats.against`. Writes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from scipy.special import ndtri, stdtrit

from leakfast.stats.against import PAIRED, Pair, Side, cells_of, of_persona, pairs_of
from leakfast.stats.intervals import CONFIDENCE
from leakfast.stats.summary import rate_interval

SCHEMA = {
    **dict.fromkeys(("behavior", "source"), pl.String),
    "seed": pl.Int64,
    **dict.fromkeys(("adapter", "other_adapter", "persona"), pl.String),
    **dict.fromkeys(("value", "other", "difference", "difference_low", "difference_high"), pl.Float64),
    "standard_errors": pl.Float64,
    "questions": pl.Int64,
    "paired": pl.Boolean,
    "method": pl.String,
    "reason": pl.String,
}
FAR = 1.96  # standard errors


def moved(this: Side, other: Side) -> pl.DataFrame:
    """A row per behavior, adapter (the unadapted model too) and persona that both runs measured; the farthest first.

    difference: this run's rate less the other's, with its interval (`against.of_persona`: over questions, or items, paired,
    where both asked the same; else independent). standard_errors: the difference over its standard error, which is the
    interval's arm towards 0 over the quantile (of t with Q − 1 degrees of freedom, or of the normal) that made the arm; of
    paired rates that is the paired t statistic. Estimand: the change of a persona's rate between the two runs' models;
    resampled are questions (independent: what each rate's own interval is over). Null where there is no interval, or no
    spread, and `reason` says so.
    """
    rows = [row for pair in pairs_of(this, other, base=True) for row in _of_pair(pair)]
    table = pl.DataFrame(rows, schema=SCHEMA).with_columns(pl.col(pl.Float64).fill_nan(None))
    far = table["standard_errors"].abs()
    return (
        table.with_columns(_far=far, _by=pl.col("difference").abs())
        .sort("_far", "_by", descending=True, nulls_last=True, maintain_order=True)
        .drop("_far", "_by")
    )


def _of_pair(pair: Pair) -> list[dict[str, Any]]:
    sides = [
        {row["persona"]: row for row in part.with_columns(**rate_interval(part)).rows(named=True)}
        for part in (pair.mine, pair.theirs)
    ]
    people = [name for name in sides[0] if name in sides[1]]
    cells = cells_of(pair.counts, people) if pair.same and people else None
    rows = []
    for number, name in enumerate(people):
        one, other = (side[name] for side in sides)
        told = pair.told | {"persona": name}
        if one["rate"] is None or other["rate"] is None:
            sides_of = {"value": one["rate"], "other": other["rate"]}
            rows.append(told | sides_of | {"paired": False, "reason": "one of the rates is not known"})
            continue
        apart = None if cells is None else cells[0][number] - cells[1][number]
        found = of_persona(one, other, None if apart is None or np.isnan(apart).any() else apart)
        rows.append(told | found | _in_errors(found))
    return rows


def _in_errors(found: dict[str, Any]) -> dict[str, Any]:
    """standard_errors, and why there are none."""
    gap, low, high = (found.get(name) for name in ("difference", "difference_low", "difference_high"))
    if gap == 0:
        return {"standard_errors": 0.0}
    if low is None or high is None:
        return {"standard_errors": None}
    arm = gap - low if gap > 0 else high - gap
    if arm <= 1e-12 * abs(gap):
        return {"standard_errors": None, "reason": "every question moved alike: no spread to judge by"}
    share = 0.5 + CONFIDENCE / 2
    paired = found.get("method") == PAIRED
    bar = float(stdtrit(found["questions"] - 1, share) if paired else ndtri(share))
    return {"standard_errors": float(np.float64(gap) / (arm / bar))}
