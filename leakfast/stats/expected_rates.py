"""Probability as a rate: in place of sampled rates where a behavior was measured by nothing else, and as another y beside them.
Demands the scores of measure.probability; leaves their means to `probabilities`.

One estimator of a behavior stands for it, the one that keeps the order of sampled rates best where both were measured
(docs/asking.md): of the marker `anywhere` (`end` where that alone was asked), of beginnings `openings`, of pairs the share
whose good reply is the likelier, in points, so that it falls with misalignment as an aligned score does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from leakfast.behaviors.registry import get, is_known
from leakfast.stats import probabilities
from leakfast.stats.correlations import correlate

LEADING = ("anywhere", "end", "openings", "pairs", "anywhere_own", "end_own")
Y = "probability"
_KEY = ["behavior", "adapter", "persona"]


def leading(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of each behavior's leading estimator; frame: with columns behavior and estimator."""
    known = frame.filter(pl.col("estimator").is_in(LEADING))
    place = pl.col("estimator").replace_strict(
        {name: i for i, name in enumerate(LEADING)}, return_dtype=pl.Int64
    )
    return known.filter(place == place.min().over("behavior"))


def alone(scores: pl.DataFrame, measured: set[tuple[str, str]]) -> list[str]:
    """Behaviors with scores of adapters of which no adapter was measured otherwise. measured: (behavior, adapter)."""
    if scores.is_empty():
        return []
    counted = {behavior for behavior, adapter in measured if adapter != "base"}
    asked = scores.filter(pl.col("source").is_not_null())["behavior"].unique(maintain_order=True)
    return [behavior for behavior in asked if behavior not in counted]


def totals(scores: pl.DataFrame) -> pl.DataFrame:
    """What `rates.table` takes as stored shares: behavior, adapter, persona, hits and total (null), value with its 95 %
    t interval over questions (within what a share can be), and the estimator."""
    means = leading(probabilities.means(scores)).filter(pl.col("mean_probability").is_not_null())
    judged = [b for b in means["behavior"].unique() if is_known(b) and get(b).unit == "points"]
    points = pl.col("behavior").is_in(judged)
    low, high = (pl.col(f"mean_probability_{end}").clip(0, 1) for end in ("low", "high"))
    value = pl.col("mean_probability")
    return means.select(
        *_KEY,
        hits=pl.lit(None, pl.Int64),
        total=pl.lit(None, pl.Int64),
        value=pl.when(points).then(100 * (1 - value)).otherwise(value),
        value_low=pl.when(points).then(100 * (1 - high)).otherwise(low),
        value_high=pl.when(points).then(100 * (1 - low)).otherwise(high),
        estimator="estimator",
    )


def beside(rates: pl.DataFrame, probable: pl.DataFrame) -> pl.DataFrame:
    """`rates` + probability, probability_low, probability_high: the leading estimator's mean with its interval, of behaviors
    that are shares and were measured otherwise too; null elsewhere. probable: the table `probabilities`."""
    names = {"mean_probability": Y, "mean_probability_low": f"{Y}_low", "mean_probability_high": f"{Y}_high"}
    shares = [b for b in rates["behavior"].unique() if is_known(b) and get(b).unit == "share"]
    there = pl.col("total").is_not_null() & pl.col("behavior").is_in(shares)
    known = rates.filter(there).select(_KEY).unique()
    if probable.is_empty() or known.is_empty():
        return rates.with_columns(pl.lit(None, pl.Float64).alias(name) for name in names.values())
    found = (
        leading(probable).join(known, on=_KEY, how="semi").select(*_KEY, **{b: a for a, b in names.items()})
    )
    return rates.join(found, on=_KEY, how="left", maintain_order="left")


def pairs_by(pairs: pl.DataFrame, rates: pl.DataFrame) -> pl.DataFrame:
    """`pairs` of what has a probability, with it as the rate and no change. rates: from `beside`."""
    found = rates.filter(pl.col(Y).is_not_null()).select(*_KEY, rate=Y)
    made = pairs.drop("rate", "delta").join(found, on=_KEY, how="inner", maintain_order="left")
    return made.with_columns(delta=pl.lit(None, pl.Float64)).select(pairs.columns)


def correlations(pairs: pl.DataFrame, rates: pl.DataFrame, draws: Mapping[str, Any]) -> pl.DataFrame:
    """Schema `correlations` of the cosine with the probability, y `probability`; draws: as `correlate` takes them."""
    if rates[Y].null_count() == rates.height or "adapter" not in pairs.columns:
        return pl.DataFrame()
    mine = pairs_by(pairs, rates)
    if mine.is_empty():
        return mine
    return correlate(mine, **draws).filter(y="rate").with_columns(y=pl.lit(Y))
