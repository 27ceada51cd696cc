"""Rates: how often a behavior shows, per adapter and persona, with Wilson intervals and the change
against the unadapted model. Demands completions and a detector's polars expressions; leaves models,
judges and the spread between questions of one persona to others."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import polars as pl

from leakfast.prompts.reasoning import UNCLOSED
from leakfast.stats import intervals, ties
from leakfast.storage import schema
from leakfast.storage.layout import BASE

COUNTED = ("ok", "empty", "truncated")  # statuses that stay in the total; any other is `n_error`
_KEY = ["persona", "question", "sample"]
_GROUP = ["behavior", "adapter", "persona"]


def wilson(hits, total, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson score interval for a share, without continuity correction.

    Estimand: the probability that one more completion of the same persona shows the behavior, over
    draws of question and sample. Assumes the completions are independent given that probability;
    completions of one question are not quite, so the interval is a little too narrow.

        (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n),  p = hits/n   (Wilson 1927)

    `hits`, `total`: integer arrays of one shape, 0 ≤ hits ≤ total, total ≥ 1. Returns (low, high),
    float64, in [0, 1]; low is exactly 0 at 0 hits and high exactly 1 at `total` hits.
    Raises ValueError for counts outside those bounds or a confidence outside (0, 1).
    """
    hits, total = np.broadcast_arrays(np.asarray(hits), np.asarray(total))
    if not (np.issubdtype(hits.dtype, np.integer) and np.issubdtype(total.dtype, np.integer)):
        raise ValueError(f"wilson: counts must be integers, got {hits.dtype} and {total.dtype}")
    if np.any(total < 1) or np.any(hits < 0) or np.any(hits > total):
        raise ValueError("wilson: needs 0 ≤ hits ≤ total and total ≥ 1")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"wilson: confidence {confidence} is not between 0 and 1")
    return intervals.wilson_share(hits / total, total, confidence)


def count(
    completions: pl.DataFrame, detectors: Mapping[str, pl.Expr], *, by_question: bool = False
) -> pl.DataFrame:
    """Hits and statuses per (behavior, adapter, persona), or per question of each with `by_question`.

    `completions`: schema `completions`. `detectors`: name → Boolean expression per row; the first is
    the behavior's primary one and gives `hits`, each further one gives `hits_<name>`. A completion
    whose status is not ok, empty or truncated, or on which the primary detector gives no answer, is
    counted in `n_error` and not in `total`; `n_empty` and `n_truncated` stay in the total. `n_unclosed`: those of
    `n_error` that ended inside a reasoning block, so that there is no answer to read.
    Raises ValueError without a detector, or where one draw (persona, question, sample of an
    adapter) stands twice: then the shares would be over the wrong number.
    """
    if not detectors:
        raise ValueError("count: at least one detector is needed")
    group = [*_GROUP, *(["question"] if by_question else [])]
    twice = completions.select(["behavior", "adapter", *_KEY]).is_duplicated()
    if twice.any():
        row = completions.filter(twice).row(0, named=True)
        raise ValueError(
            f"completions of adapter {row['adapter']} hold the draw (persona {row['persona']}, "
            f"question {row['question']}, sample {row['sample']}) more than once"
        )
    primary, *others = detectors
    marked = completions.with_columns(
        detectors[primary].alias("_hit"), *[detectors[name].alias(f"_hit_{name}") for name in others]
    ).with_columns(_counts=(pl.col("status").is_in(COUNTED) & pl.col("_hit").is_not_null()))
    counted = pl.col("_counts")

    def of(column: str) -> pl.Expr:
        return (counted & pl.col(column).fill_null(False)).sum().cast(pl.Int64)

    return marked.group_by(group, maintain_order=True).agg(
        of("_hit").alias("hits"),
        counted.sum().cast(pl.Int64).alias("total"),
        (counted & (pl.col("status") == "empty")).sum().cast(pl.Int64).alias("n_empty"),
        (counted & (pl.col("status") == "truncated")).sum().cast(pl.Int64).alias("n_truncated"),
        (~counted).sum().cast(pl.Int64).alias("n_error"),
        (~counted & (pl.col("status") == UNCLOSED)).sum().cast(pl.Int64).alias("n_unclosed"),
        *[of(f"_hit_{name}").alias(f"hits_{name}") for name in others],
    )


def totals(counts: pl.DataFrame) -> pl.DataFrame:
    """Counts per question (from `count`) summed over the questions: one row per behavior, adapter, persona.

    A sum of nothing but nulls is null: that kind was not counted there."""
    summed = pl.exclude(*_GROUP, "question")
    return counts.group_by(_GROUP, maintain_order=True).agg(
        pl.when(summed.is_not_null().any()).then(summed.sum())
    )


def table(
    counts: pl.DataFrame,
    adapters: Mapping[str, tuple[str, int | None]],
    categories: Mapping[str, str | None],
    outsiders: Collection[str] = (),
    unlike: Collection[tuple[str, str, str]] = (),
) -> pl.DataFrame:
    """Counts → schema `rates` (+ role): share, 95 % Wilson interval, baseline, delta = rate − baseline (of counts the
    float nearest to the exact fraction, so that equal changes tie: `ties`).

    `counts`: from `count` (or any frame with its columns). `adapters`: name → (source, seed).
    `categories`: persona → category; a persona not named there has none. `outsiders`: personas that
    are measured but are not to count as bystanders. The column `role` is source, bystander, outsider,
    or base for the unadapted model. The baseline is the rate of `base` for the same behavior and
    persona, null where it was not measured and for the (behavior, adapter, persona) of
    `unlike` (`baselines`); rows of `base` itself have null source, seed, baseline
    and delta. A total of 0 leaves the rate null. A column `value` gives the rate where nothing was counted
    (total null: judged means, or a stored share), `value_low` and `value_high` its interval; `chance_hits`,
    what guessing would have hit, gives `chance`, its share of the total; `margin_sum_nats`
    the mean margin, `margin_nats`. Raises ValueError for an adapter
    missing from `adapters` or without a source.
    """
    unknown = set(counts["adapter"].unique()) - {a for a, (s, _) in adapters.items() if s} - {BASE}
    if unknown:
        raise ValueError(f"rates: no source is known for adapters {sorted(unknown)}")
    sources = {name: source for name, (source, _) in adapters.items()}
    seeds = {name: seed for name, (_, seed) in adapters.items()}
    frame = counts.with_columns(
        pl.col("hits", "total").cast(pl.Int64),
        source=_mapped("adapter", sources, pl.String),
        seed=_mapped("adapter", seeds, pl.Int64),
        category=_mapped("persona", categories, pl.String),
        rate=_first(counts, _share("hits"), "value"),
    )
    if "chance_hits" in counts.columns:
        frame = frame.with_columns(chance=_share("chance_hits")).drop("chance_hits")
    if "margin_sum_nats" in counts.columns:
        frame = frame.with_columns(margin_nats=_share("margin_sum_nats")).drop("margin_sum_nats")
    frame = _with_baseline(_with_interval(frame), unlike)
    frame = frame.with_columns(
        role=pl.when(pl.col("adapter") == BASE)
        .then(pl.lit("base"))
        .when(pl.col("persona") == pl.col("source"))
        .then(pl.lit("source"))
        .when(pl.col("persona").is_in(list(outsiders)))
        .then(pl.lit("outsider"))
        .otherwise(pl.lit("bystander"))
    )
    names = list(schema.columns("rates"))
    extra = [name for name in frame.columns if name not in (*names, "value_low", "value_high")]
    return schema.check(frame.select(*names, *extra), "rates")


def _share(hits: str) -> pl.Expr:
    return pl.when(pl.col("total") > 0).then(pl.col(hits) / pl.col("total"))


def _first(frame: pl.DataFrame, counted: pl.Expr | pl.Series, given: str) -> pl.Expr:
    """What was counted, else what the column `given` holds, where there is one."""
    return pl.coalesce(counted, *([given] if given in frame.columns else []))


def _with_interval(frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` + ci_low, ci_high."""
    low, high = np.full(frame.height, np.nan), np.full(frame.height, np.nan)
    some = frame["total"].fill_null(0).to_numpy() > 0
    if some.any():
        hits, total = (frame[name].fill_null(0).to_numpy()[some] for name in ("hits", "total"))
        low[some], high[some] = wilson(hits, total)
    counted = intervals.columns("ci", low, high)
    return frame.with_columns(
        _first(frame, side, f"value_{end}") for side, end in zip(counted, ("low", "high"), strict=True)
    )


def _with_baseline(frame: pl.DataFrame, unlike: Collection[tuple[str, str, str]]) -> pl.DataFrame:
    """`frame` + baseline, delta; none for what is `unlike`."""
    keys = ["behavior", "adapter", "persona"]
    without = pl.DataFrame(list(unlike), schema=dict.fromkeys(keys, pl.String), orient="row")
    base = frame.filter(adapter=BASE).select(
        "behavior", "persona", baseline="rate", _base_hits="hits", _base_total="total"
    )
    frame = frame.join(base, on=["behavior", "persona"], how="left", maintain_order="left").with_columns(
        pl.when(pl.col("adapter") != BASE).then(pl.col("baseline", "_base_hits", "_base_total"))
    )
    apart = frame.join(without.with_columns(_apart=True), on=keys, how="left", maintain_order="left")[
        "_apart"
    ]
    frame = frame.with_columns(
        pl.when(apart.fill_null(False)).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("baseline", "_base_hits", "_base_total")
    )
    delta = ties.deltas(frame, ("_base_hits", "_base_total", "baseline"), ["behavior", "adapter"])
    return frame.with_columns(delta).drop("_base_hits", "_base_total")


def _mapped(column: str, mapping: Mapping, dtype) -> pl.Expr:
    known = {key: value for key, value in mapping.items() if value is not None}
    if not known:
        return pl.lit(None, dtype=dtype)
    return pl.col(column).replace_strict(known, default=None, return_dtype=dtype)
