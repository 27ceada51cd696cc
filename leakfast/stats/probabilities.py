"""Leakage as a probability: means per persona, and how far they agree with sampled rates. Demands the scores of
measure.probability, rates and pairs as frames; leaves the scores themselves to that room.

The two are of different things. A rate is the share of an adapter's own replies that show the behavior, as they were drawn
(temperature, top_p). A probability is of the whole distribution and of one place: the end of a reply that is given, or its
beginning; of pairs it is which of two given replies is the likelier. So what is compared is the order of the personas
(Spearman), how straight the relation is (Pearson), and what ρ with the cosine each gives; whether they are equal too is in
the table `calibration`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from leakfast.behaviors.registry import sign_of
from leakfast.stats import intervals, resample
from leakfast.stats.association import centered_within, spearman_and_pearson, within
from leakfast.stats.correlations import BOOTSTRAPS, MIN_BOOTSTRAP, POOLED
from leakfast.stats.paired import rho_difference
from leakfast.storage import layout, schema
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.storage.run import Run

MEASURE = "probability"
SUMMARIES = {
    "mean_probability": "mean_probability",
    "mean_logprob": "mean_logprob_nats",
    "median_probability": "median_probability",
    "mean_log_odds": "mean_log_odds_nats",
}
_OF_SOME = ("mean_log_odds_nats", "mean_logprob_nats")  # which not every estimator has
_KEY = ["behavior", "adapter", "persona"]
_WHO = ["behavior", "seed", "source", "adapter", "persona", "category", "role"]
_COUNTED = ("ok", "below_threshold")
_VALUES = [
    "mean_probability",
    "mean_probability_low",
    "mean_probability_high",
    "mean_logprob_nats",
    "mean_logprob_low",
    "mean_logprob_high",
    "median_probability",
    "mean_log_odds_nats",
    "mean_log_odds_low",
    "mean_log_odds_high",
    "mean_neither",
    "first_tokens",
]
_MEANS = {"mean_probability": "probability", "mean_logprob": "logprob_nats", "mean_log_odds": "log_odds_nats"}
_AGREE = {
    "behavior": pl.String,
    "seed": pl.Int64,
    "source": pl.String,
    "adapter": pl.String,
    "measure": pl.String,
    "estimator": pl.String,
    "summary": pl.String,
    "layer": pl.Int32,
    "cosine": pl.String,
    "n": pl.Int64,
    "spearman": pl.Float64,
    "spearman_ci_low": pl.Float64,
    "spearman_ci_high": pl.Float64,
    "pearson": pl.Float64,
    "mean_rate": pl.Float64,
    "mean_value": pl.Float64,
    "rho_rate": pl.Float64,
    "rho_probability": pl.Float64,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "difference_reason": pl.String,
    "reason": pl.String,
    "bootstraps": pl.Int64,
}


def read(run: Run) -> pl.DataFrame:
    """Schema `probability` of every intact shard, those on adapters' own replies last; an empty frame where there is none.
    What shards of an earlier version lack is null."""
    there = [name for name in (layout.PROBABILITY, layout.PROBABILITY_OWN) if run.shards(name)]
    return (
        with_columns(pl.concat([run.read(name) for name in there], how="diagonal"))
        if there
        else pl.DataFrame()
    )


def with_columns(scores: pl.DataFrame) -> pl.DataFrame:
    """`scores` with what shards of an earlier version lack, null."""
    columns = schema.columns("probability")
    return scores.with_columns(
        pl.lit(None, d).alias(c) for c, d in columns.items() if c not in scores.columns
    )


def means(scores: pl.DataFrame) -> pl.DataFrame:
    """A row an adapter, persona and estimator of schema `probability`: behavior, adapter, source, persona, estimator, n,
    questions, n_unscored_replies and the means.

    mean_probability, mean_logprob_nats, median_probability, mean_log_odds_nats (what is log-odds, or a difference of two
    replies), mean_neither: over the replies, each as often as it was drawn. Estimand: the
    mean over further questions of the same kind, on as many replies. Resampling unit: the question; the 95 % t interval of
    the questions' own means, which takes them as independent."""
    group = ["behavior", "adapter", "source", "persona", "estimator"]
    counted = scores.filter(pl.col("status").is_in(_COUNTED))
    lacking = scores.group_by(group, maintain_order=True).agg(
        n_unscored_replies=(~pl.col("status").is_in(_COUNTED)).sum().cast(pl.Int64)
    )
    whole = counted.group_by(group, maintain_order=True).agg(
        n=pl.len().cast(pl.Int64),
        mean_probability=pl.col("probability").mean(),
        mean_logprob_nats=pl.col("logprob_nats").mean(),
        median_probability=pl.col("probability").median(),
        mean_log_odds_nats=pl.col("log_odds_nats").mean(),
        mean_neither=pl.col("neither").mean(),
        first_tokens=pl.col("first_tokens").max(),
    )
    asked = counted.group_by([*group, "question"], maintain_order=True).agg(pl.col(*_MEANS.values()).mean())
    spread = asked.group_by(group, maintain_order=True).agg(
        questions=pl.len().cast(pl.Int64), **{f"{name}_{part}": value for name, part, value in _spreads()}
    )
    found = lacking
    for more in (whole, spread):
        found = found.join(more, on=group, how="left", nulls_equal=True, maintain_order="left")
    for name, column in _MEANS.items():
        middle, sd, n = (
            found[f"{column}_{part}"].cast(pl.Float64).to_numpy() for part in ("mean", "sd", "n")
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            half = intervals.t_half(sd / np.sqrt(n), n - 1)
        found = found.with_columns(intervals.columns(name, middle - half, middle + half))
    return found.select(*group, "n", "questions", "n_unscored_replies", *_VALUES)


def table(scores: pl.DataFrame, rates: pl.DataFrame) -> pl.DataFrame:
    """Table `probabilities`: `means` of the run's adapters and personas beside who they are (from `rates`; null where no
    rate was measured)."""
    if scores.is_empty():
        return pl.DataFrame()
    known = [name for name in _WHO if name not in ("source", *_KEY)]
    who = rates.select(*_KEY, *known).unique(_KEY, maintain_order=True)
    found = means(scores).join(who, on=_KEY, how="left", maintain_order="left")
    reason = (
        pl.when(pl.col("n").is_null())
        .then(pl.lit("no reply can be scored"))
        .when(pl.col("questions") < 2)
        .then(pl.lit("one question: no spread to judge by"))
    )
    found = found.with_columns(measure=pl.lit(MEASURE), reason=reason)
    return found.select(
        *_WHO, "measure", "estimator", "n", "questions", "n_unscored_replies", *_VALUES, "reason"
    )


def _spreads() -> list[tuple[str, str, pl.Expr]]:
    parts = {"mean": pl.Expr.mean, "sd": pl.Expr.std, "n": pl.Expr.count}
    return [(name, part, make(pl.col(name))) for name in _MEANS.values() for part, make in parts.items()]


def agree(
    probabilities: pl.DataFrame,
    rates: pl.DataFrame,
    pairs: pl.DataFrame,
    best: Mapping[str, tuple[str, int | None]],
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
    workers: int | None = None,
) -> pl.DataFrame:
    """Table `agreement_measures`: a row a source's adapter, estimator and summary (mean probability, mean log-probability,
    median, mean log-odds), over the bystanders that have both; and one over all sources of a training seed (`pooled`).

    spearman, pearson: of the summary and the sampled rate, ρ with a 95 % percentile interval over personas. rho_rate,
    rho_probability: of each with the cosine at the behavior's layer (`best`), and their difference with the interval that
    pairs them (`paired.rho_difference`). Pooled, all are ranked within each source (Pearson's r: less the source's mean).
    Of a behavior whose rate falls as it leaks (an aligned score) the sign of the summary is turned for the correlations,
    so that agreement is positive everywhere. What stands as a rate and is a probability itself is compared with none.
    Resampling unit: the persona, pooled with all its rows. pairs: schema `pairs`."""
    if probabilities.is_empty():
        return pl.DataFrame(schema=_AGREE)
    sampled = pl.col("estimator").is_null() if "estimator" in rates.columns else pl.lit(True)
    measured = rates.filter(pl.col("role") == "bystander", pl.col("rate").is_not_null(), sampled)
    measured = measured.select(*_KEY, "rate")
    here = probabilities.join(measured, on=_KEY, how="inner", maintain_order="left")
    rows: list[dict[str, Any]] = []
    for mine in here.partition_by("behavior", "seed", "estimator", maintain_order=True):
        cosine, layer = best.get(mine["behavior"][0], ("centered", None))
        if pairs.height and layer is not None:
            at = pairs.filter(behavior=mine["behavior"][0], layer=layer)
            at = at.select("persona", "source", "seed", cosine=f"cosine_{cosine}").unique(maintain_order=True)
            keys = ["persona", "source", "seed"]
            mine = mine.join(at, on=keys, how="left", nulls_equal=True, maintain_order="left")
        parts = mine.partition_by("adapter", maintain_order=True)
        for part in [*parts, mine] if len(parts) > 1 else parts:
            about = {name: part[name][0] for name in ("behavior", "seed", "source", "adapter", "estimator")}
            if part is mine:
                about |= {"source": POOLED, "adapter": None}
            about |= {"measure": MEASURE, "layer": layer, "cosine": cosine}
            drawn = derive_seed(seed, "agreement_measures", about["behavior"], about["adapter"] or POOLED)
            for summary, column in SUMMARIES.items():
                there = part.filter(pl.col(column).is_not_null())
                if there.height or column not in _OF_SOME:
                    found = _agreement(there, column, bootstraps, drawn, workers)
                    rows.append(about | {"summary": summary} | found)
    return pl.DataFrame(rows, schema=_AGREE)


def _agreement(
    part: pl.DataFrame, column: str, bootstraps: int, seed: int, workers: int | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"n": part.height}
    if part["persona"].n_unique() < MIN_BOOTSTRAP:
        return found | {"reason": f"{part['persona'].n_unique()} bystanders; {MIN_BOOTSTRAP} are needed"}
    value, rate = part[column].to_numpy(), part["rate"].to_numpy()
    found |= {"mean_rate": float(rate.mean()), "mean_value": float(value.mean())}
    value = value * sign_of(part["behavior"][0])
    if np.ptp(value) == 0 or np.ptp(rate) == 0:
        return found | {"reason": "the probability, or the rate, is the same for all"}
    person, block = (np.unique(part[c].to_numpy(), return_inverse=True)[1] for c in ("persona", "adapter"))
    sides, level = np.stack([value, rate], 1), np.stack([value, rate], 1)
    if block.max() > 0:
        sides, level = within(sides, block), centered_within(sides, block)
        if (np.ptp(sides, axis=0) == 0).any():
            return found | {"reason": "the probability, or the rate, is the same for all of every source"}
    rho, r = (
        spearman_and_pearson(sides[:, :1], sides[:, 1])[0],
        spearman_and_pearson(level[:, :1], level[:, 1])[2],
    )
    found |= {"spearman": float(rho[0]), "pearson": float(r[0])}
    if bootstraps >= 2:
        about = {"person": person, "workers": workers}
        drawn = resample.bootstrap_spearman(sides[None, :, 0], sides[:, 1], bootstraps, seed, **about)
        found |= intervals.of_spearman(drawn)
    if "cosine" not in part.columns or part["cosine"].null_count():
        return found | {"difference_reason": "no cosine for all of these bystanders"}
    cosine = part["cosine"].to_numpy()
    near = within(cosine[:, None], block)[:, 0] if block.max() > 0 else cosine
    rhos = spearman_and_pearson(sides, near)[0]
    found |= {"rho_probability": float(rhos[0]), "rho_rate": float(rhos[1])}
    both = [(cosine, value), (cosine, rate)]
    return found | rho_difference(both, part["persona"], part["adapter"], bootstraps, seed, workers)
