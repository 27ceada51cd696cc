"""The table `calibration`: expected rates, as probabilities give them, against observed ones, in ten bins of personas. Demands
the tables `probabilities` and `rates`; leaves the order of the personas to `probabilities.agree`.

A probability of the behavior's words or beginnings is an expected rate only if the place it is asked at is the one place at
which the behavior shows, and if the rates were sampled from the whole distribution. The table says how far that holds. Which of
two given replies is the likelier is no expected rate: pairs have no rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from leakfast.stats.correlations import POOLED
from leakfast.stats.intervals import of_mean_over

BINS = 10
_NO_RATE = ("pairs", "pairs_per_token")  # estimators that expect no rate
_KEY = ["behavior", "adapter", "persona"]
_SCHEMA = {
    "behavior": pl.String,
    "seed": pl.Int64,
    "source": pl.String,
    "adapter": pl.String,
    "estimator": pl.String,
    "bin": pl.Int64,
    "n": pl.Int64,
    "expected": pl.Float64,
    "expected_low": pl.Float64,
    "expected_high": pl.Float64,
    "observed": pl.Float64,
    "observed_ci_low": pl.Float64,
    "observed_ci_high": pl.Float64,
    "reason": pl.String,
}


def table(probabilities: pl.DataFrame, rates: pl.DataFrame) -> pl.DataFrame:
    """A row a source's adapter (and `pooled`, of a training seed), estimator and bin; shares, 0–1.

    The bystanders with both are sorted by their mean probability (then by name) and cut into ten bins of as equal number as
    can be; fewer bystanders make fewer bins. expected: the bin's mean probability; expected_low, expected_high: the smallest
    and largest in it; observed: the mean sampled rate of its personas, with the 95 % t interval over them. Resampling unit: the
    persona, pooled with all its sources that fall into the bin (intervals.of_mean_over); n counts each of these. Estimand: the
    mean rate of further personas of such a probability."""
    if probabilities.is_empty():
        return pl.DataFrame(schema=_SCHEMA)
    counted = rates.filter(pl.col("role") == "bystander", pl.col("total").is_not_null())
    here = probabilities.filter(
        ~pl.col("estimator").is_in(_NO_RATE), pl.col("mean_probability").is_not_null()
    ).join(
        counted.filter(pl.col("rate").is_not_null()).select(*_KEY, "rate"),
        on=_KEY,
        how="inner",
        maintain_order="left",
    )
    rows: list[dict[str, Any]] = []
    for mine in here.partition_by("behavior", "seed", "estimator", maintain_order=True):
        parts = mine.partition_by("adapter", maintain_order=True)
        for part in [*parts, mine] if len(parts) > 1 else parts:
            about = {name: part[name][0] for name in ("behavior", "seed", "source", "adapter", "estimator")}
            if part is mine:
                about |= {"source": POOLED, "adapter": None}
            rows += [about | one for one in _bins(part)]
    return pl.DataFrame(rows, schema=_SCHEMA)


def _bins(part: pl.DataFrame) -> list[dict[str, Any]]:
    part = part.sort("mean_probability", "persona", "adapter")
    found = []
    for number, some in enumerate(np.array_split(np.arange(part.height), min(BINS, part.height))):
        value, rate = part["mean_probability"].to_numpy()[some], part["rate"].to_numpy()[some]
        mean, low, high, why = of_mean_over(rate, part["persona"].to_numpy()[some])
        about = {"bin": number, "n": len(some), "expected": float(value.mean())}
        about |= {"expected_low": float(value.min()), "expected_high": float(value.max())}
        about |= {"observed": mean, "observed_ci_low": low, "observed_ci_high": high, "reason": why}
        found.append(about)
    return found
