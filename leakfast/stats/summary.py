"""The few numbers a person reads first: one row per source and layer, and which layer orders leakage
best. Demands the rates and correlations tables; computes nothing that is not in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from leakfast.behaviors.registry import get, is_known, sign_of
from leakfast.stats.correlations import POOLED

LEARNED = 0.3  # of the scale (1 for a share, 100 points)
_BOTH = ("spearman_both_low", "spearman_both_high")
_KEYS = ["behavior", "adapter", "source", "seed"]


def outcome(rates: pl.DataFrame, behavior: str) -> str:
    """What a behavior's leakage is read from: `delta` where the unadapted model was measured for every
    bystander and is not 0 for all of them, else `rate` (which is then the delta, or all there is)."""
    mine = rates.filter(behavior=behavior, role="bystander")
    known = mine.filter(pl.col("rate").is_not_null())["baseline"]
    return "delta" if known.len() and known.null_count() == 0 and (known != 0).any() else "rate"


def rate_interval(rates: pl.DataFrame) -> dict[str, pl.Expr]:
    """low and high: the 95 % interval of a rate that is shown, over questions where counts of them are known, since
    samples of one question are alike; else over samples (Wilson)."""
    return {
        end: pl.coalesce(f"bb_{end}", f"ci_{end}") if f"bb_{end}" in rates.columns else pl.col(f"ci_{end}")
        for end in ("low", "high")
    }


def most(row: Mapping[str, Any]) -> str | None:
    """The bystander that shows most, of a row of the summary, and how many others show as much: pirate +3."""
    name, count = row["max_persona"], row["max_count"]
    return f"{name} +{count - 1}" if name is not None and count > 1 else name


def twins(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Of each of the rows (adapter, source, seed) whether another adapter among them has its source and seed (another recipe;
    those that a control is measured on are of several behaviors), so that these two do not name it."""
    named: dict[tuple, set] = {}
    for row in rows:
        named.setdefault((row["source"], row["seed"]), set()).add(row["adapter"])
    return [len(named[row["source"], row["seed"]]) > 1 for row in rows]


def unit(rates: pl.DataFrame, behavior: str) -> str:
    """`share` (0–1) or `points` (of a judge's 0–100): the behavior's own; of one that is not registered, points
    where some value lies outside 0–1."""
    if is_known(behavior):
        return get(behavior).unit
    mine = rates.filter(behavior=behavior)["rate"]
    return "share" if mine.drop_nulls().is_between(0, 1).all() else "points"


def best_layer(correlations: pl.DataFrame, behavior: str, cosine: str, y: str) -> int | None:
    """The layer with the largest pooled |Spearman|, averaged over training seeds; the lower of equals.

    Where there is no pooled value, the largest mean over sources. None where no ρ is defined."""
    defined = correlations.filter(
        pl.col("category").is_null(), pl.col("spearman").is_not_null(), behavior=behavior, cosine=cosine, y=y
    )
    for pool in (pl.col("source") == POOLED, pl.col("source") != POOLED):
        ranked = (
            defined.filter(pool)
            .group_by("layer", maintain_order=True)
            .agg(pl.col("spearman").abs().mean())
            .sort(["spearman", "layer"], descending=[True, False])
        )
        if ranked.height:
            return int(ranked["layer"][0])
    return None


def summarize(
    rates: pl.DataFrame, correlations: pl.DataFrame, cosine: str, y: str | None = None
) -> pl.DataFrame:
    """behavior, adapter, source, seed, layer, cosine, y, best_layer (Boolean), source_rate with its
    interval (`rate_interval`), source_delta with its interval, learned, mean_bystander, mean_delta, max_bystander,
    whose and of how many bystanders it is (the rate that is most of the behavior: the lowest where `sign_of` is −1), chance (what
    guessing gives, of choices alone), then n, ρ with its interval, r and their p-values. learned: the source's Δ goes the way
    it was trained, its 95 % interval excludes 0, and it covers at least LEARNED of the behavior's scale; null for controls,
    without that interval, and for an adapter that was taught another behavior.
    `y`: rate or delta; without it each behavior's own (`outcome`).

    Sources in order of their adapters, `pooled` last (it has no source rate; none of a single adapter). Without correlations,
    one row per adapter with a null layer."""
    people = _people(rates)
    ys = {b: y or outcome(rates, b) for b in people["behavior"].unique()}
    its_y = pl.col("behavior").replace_strict(ys, default=None, return_dtype=pl.String)
    chosen = correlations.filter(pl.col("category").is_null(), cosine=cosine, y=its_y)
    chosen = chosen.with_columns(  # tables of earlier versions have no interval over questions
        pl.lit(None, pl.Float64).alias(name) for name in _BOTH if name not in chosen.columns
    )
    values = [
        "n",
        "spearman",
        "spearman_ci_low",
        "spearman_ci_high",
        *_BOTH,
        "spearman_p_t",
        "spearman_p_perm",
    ]
    values += ["spearman_p_max", "pearson", "pearson_p", "reason"]
    if chosen.is_empty():
        people = people.filter(pl.col("source") != POOLED)
    table = people.join(
        chosen.select(*_KEYS, "layer", *values), on=_KEYS, how="left", nulls_equal=True, maintain_order="left"
    ).with_columns(cosine=pl.lit(cosine), y=its_y)
    best = {b: best_layer(correlations, b, cosine, ys[b]) for b in ys}
    table = table.with_columns(
        pl.Series(
            "best_layer",
            [layer is not None and layer == best[b] for b, layer in table.select("behavior", "layer").rows()],
            dtype=pl.Boolean,
        )
    )
    first = [*_KEYS, "layer", "cosine", "y", "best_layer"]
    return table.select(*first, pl.exclude(*first, *values), *values)


def _learned(rates: pl.DataFrame, own: pl.DataFrame, taught: pl.Series) -> pl.Series:
    """Of sources: whether they show what they were trained to; null where their adapter was taught something else."""
    found = []
    rows = own.select("behavior", "source_delta", "source_delta_low", "source_delta_high").rows()
    for what, (name, delta, low, high) in zip(taught, rows, strict=True):
        sign = get(name).direction if is_known(name) else 0
        if not sign or what not in (None, name) or delta is None or low is None or high is None:
            found.append(None)
            continue
        scale = 1.0 if unit(rates, name) == "share" else 100.0
        found.append(bool(min(sign * low, sign * high) > 0 and sign * delta >= LEARNED * scale))
    return pl.Series("learned", found, dtype=pl.Boolean)


def _people(rates: pl.DataFrame) -> pl.DataFrame:
    """Source and bystander rates per adapter, and per behavior and seed for `pooled`."""
    bystanders = rates.filter(role="bystander")
    trained = rates.filter(pl.col("role") != "base")
    ways = {name: sign_of(name) for name in rates["behavior"].unique()}
    way = pl.col("behavior").replace_strict(ways, default=1, return_dtype=pl.Int64).first()
    leaks = pl.col("rate") * way
    spread = [
        pl.col("rate").mean().alias("mean_bystander"),
        pl.col("delta").mean().alias("mean_delta"),
        (leaks.max() * way).alias("max_bystander"),
        pl.col("persona")
        .sort_by(leaks, "persona", descending=[True, False], nulls_last=True)
        .first()
        .alias("max_persona"),
        pl.col("persona").filter(leaks == leaks.max()).n_unique().cast(pl.Int64).alias("max_count"),
        (pl.col("chance").mean() if "chance" in rates.columns else pl.lit(None, pl.Float64)).alias("chance"),
    ]
    own = rates.filter(role="source").select(
        *_KEYS,
        pl.col("rate").alias("source_rate"),
        *[side.alias(f"source_ci_{end}") for end, side in rate_interval(rates).items()],
        pl.col("delta").alias("source_delta"),
        *[
            (pl.col(f"delta_{end}") if f"delta_{end}" in rates.columns else pl.lit(None, pl.Float64)).alias(
                f"source_delta_{end}"
            )
            for end in ("low", "high")
        ],
    )
    if "taught" not in rates.columns:
        rates = rates.with_columns(taught=pl.lit(None, pl.String))
    own = own.with_columns(_learned(rates, own, rates.filter(role="source")["taught"]))
    single = (
        trained.select(_KEYS)
        .unique(maintain_order=True)
        .join(own, on=_KEYS, how="left", nulls_equal=True, maintain_order="left")
        .join(
            bystanders.group_by(_KEYS, maintain_order=True).agg(spread),
            on=_KEYS,
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )
    )
    pooled = (
        bystanders.filter((pl.col("adapter").n_unique() > 1).over("behavior", "seed"))
        .group_by("behavior", "seed", maintain_order=True)
        .agg(spread)
        .with_columns(source=pl.lit(POOLED), adapter=pl.lit(None, pl.String))
    )
    return pl.concat([single, pooled], how="diagonal").sort("behavior", "seed", maintain_order=True)
