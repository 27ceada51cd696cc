"""Who leaks, and who leaks beyond what the cosine to the source gives. Demands the tables of a run; fits no new model: the
curve is the isotonic one of `gradients`, and a residual is a description of one persona, not a test."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.behaviors.registry import sign_of
from leakfast.stats.gradients import isotonic
from leakfast.stats.summary import rate_interval
from leakfast.stats.tables import Stats

METHOD = (
    "beyond = rate − the isotonic curve of rate on cosine over all bystanders of the adapter, the persona itself among "
    "them (the curve's ends follow single personas); no test: of so many the largest is large by chance too"
)
_ONE = ["behavior", "adapter", "source", "seed"]
_CURVE = {**dict.fromkeys(("behavior", "adapter", "cosine"), pl.String), "layer": pl.Int32}
_CURVE |= dict.fromkeys(("at", "fitted"), pl.Float64)


def leaks(stats: Stats, behavior: str, layer: int | None, cosine: str = "centered") -> pl.DataFrame:
    """A row per adapter and bystander of a behavior, those that show most of it first (the highest rates,
    or the lowest where `sign_of` is −1).

    Columns: behavior, adapter, source, seed, persona, category, rate, low and high (its 95 % interval, `rate_interval`),
    delta, cosine (to the source, at `layer`), place and of (1: the nearest of so many bystanders with a cosine),
    expected, beyond, above. expected: isotonic regression of rate on cosine over the adapter's bystanders, rising or
    falling as the data do, weighted by the completions counted (judged means alike), at equal cosines their mean;
    beyond: rate − expected, in the unit of the rate; above: the whole interval of the rate lies on the side
    of `expected` that is more of the behavior. Null
    where there is no cosine or no rate."""
    mine = stats.rates.filter(behavior=behavior, role="bystander")
    mine = mine.with_columns(side.alias(end) for end, side in rate_interval(mine).items())
    at = stats.pairs.filter(
        pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)),
        pl.col("persona").is_not_null(),
        behavior=behavior,
    )
    name = f"cosine_{cosine}"
    kept = at.select(*[key for key in _ONE if key in at.columns], "persona", cosine=name)
    keys = [key for key in _ONE if key in kept.columns]
    mine = mine.select(*_ONE, "persona", "category", "rate", "low", "high", "delta", "total").join(
        kept.unique([*keys, "persona"]),
        on=[*keys, "persona"],
        how="left",
        nulls_equal=True,
        maintain_order="left",
    )
    curves = stats.more.get("isotonic", pl.DataFrame(schema=_CURVE))
    curves = curves.filter(
        pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)), behavior=behavior, cosine=cosine
    )
    groups = [
        _fitted(group, curves.filter(adapter=group["adapter"][0]), sign_of(behavior))
        for group in mine.partition_by(_ONE, maintain_order=True)
    ]
    return pl.concat(groups) if groups else _fitted(mine, curves.clear())


def _fitted(group: pl.DataFrame, curve: pl.DataFrame, way: int = 1) -> pl.DataFrame:
    """One adapter's bystanders + place, of, expected, beyond, above, most of the behavior first. curve: at, fitted; where the run
    keeps none it is fitted here."""
    fits = group.filter(pl.col("cosine").is_not_null(), pl.col("rate").is_not_null())
    if curve.is_empty() and fits.height > 1:
        weight = fits["total"].cast(pl.Float64).fill_null(1.0).to_numpy()
        at, fitted = isotonic(fits["cosine"].to_numpy(), fits["rate"].to_numpy(), np.maximum(weight, 1e-9))
        curve = pl.DataFrame({"at": at, "fitted": fitted})
    expected_at, low, high = map(pl.col, ("expected", "low", "high"))
    more = low > expected_at if way > 0 else high < expected_at
    expected = curve.group_by(cosine="at", maintain_order=True).agg(expected=pl.col("fitted").mean())
    return (
        group.join(expected, on="cosine", how="left", maintain_order="left")
        .with_columns(
            place=pl.col("cosine").rank("min", descending=True).cast(pl.Int64),
            of=pl.col("cosine").count().cast(pl.Int64),
            beyond=pl.col("rate") - pl.col("expected"),
        )
        .with_columns(above=more)
        .drop("total")
        .sort(["rate", "persona"], descending=[way > 0, False], nulls_last=True)
    )
