"""Means of probabilities against plain numbers and scipy, replies weighted as drawn, and agreement with sampled rates."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.stats

from leakfast.stats import probabilities as stage
from leakfast.storage import schema
from leakfast.storage.columns import columns

PEOPLE = [f"p{i:02d}" for i in range(24)]


def scores_of(values, adapter="marker-villain-s42", status="ok"):
    """Schema `probability` of {(persona, question, sample): probability}."""
    rows = [
        {
            "behavior": "marker",
            "adapter": adapter,
            "source": "villain",
            "persona": persona,
            "question": question,
            "sample": sample,
            "estimator": "end",
            "logprob_nats": None if p is None else float(np.log(p)),
            "probability": p,
            "left_out": None,
            "n_reply_tokens": 9,
            "n_recut": 0,
            "status": "truncated" if p is None else status,
        }
        for (persona, question, sample), p in values.items()
    ]
    return pl.DataFrame(rows, schema=schema.columns("probability"))


def test_means_weigh_replies_as_drawn_and_their_interval_is_over_questions():
    values = {("a", 0, 0): 0.5, ("a", 0, 1): 0.5, ("a", 1, 0): 0.1, ("a", 2, 0): 0.01, ("a", 3, 0): None}
    (row,) = stage.means(scores_of(values)).rows(named=True)
    known = [p for p in values.values() if p is not None]
    assert (row["n"], row["questions"], row["n_unscored_replies"]) == (4, 3, 1)
    assert row["mean_probability"] == pytest.approx(np.mean(known))
    assert row["mean_logprob_nats"] == pytest.approx(np.mean(np.log(known)))
    assert row["median_probability"] == pytest.approx(np.median(known))
    each = [0.5, 0.1, 0.01]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(each), scipy.stats.sem(each))
    assert (row["mean_probability_low"], row["mean_probability_high"]) == pytest.approx((low, high))


def test_what_cannot_be_told_is_null_with_a_reason():
    scores = scores_of({("a", 0, 0): 0.5, ("b", 0, 0): None})
    rates = schema.empty("rates").with_columns(role=pl.lit("bystander"))
    one, none = stage.table(scores, rates).rows(named=True)
    assert one["mean_probability_low"] is None and "one question" in one["reason"]
    assert none["mean_probability"] is None and none["reason"] == "no reply can be scored"
    assert not stage.table(scores, rates).select(pl.col(pl.Float64).is_nan().any()).row(0).count(True)


@pytest.fixture
def measured():
    """Probabilities, rates and pairs of one adapter over 24 bystanders."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.02, 0.8, len(PEOPLE))
    values = {
        (p, q, 0): float(np.clip(truth[i] + rng.normal(0, 0.02), 1e-3, 1))
        for i, p in enumerate(PEOPLE)
        for q in range(4)
    }
    about = {"behavior": "marker", "source": "villain", "seed": 42, "category": None}
    hits = rng.binomial(40, truth)
    rates = pl.DataFrame(
        [
            {**about, "adapter": "marker-villain-s42", "persona": p, "role": "bystander", "rate": h / 40}
            for p, h in zip(PEOPLE, hits.tolist(), strict=True)
        ],
        schema_overrides={"category": pl.String},
    )
    cosine = truth + rng.normal(0, 0.2, len(PEOPLE))
    pairs = pl.DataFrame(
        [
            {**about, "persona": p, "layer": 3, "cosine_centered": c}
            for p, c in zip(PEOPLE, cosine.tolist(), strict=True)
        ],
        schema_overrides={"layer": pl.Int32, "category": pl.String},
    )
    return stage.table(scores_of(values), rates), rates, pairs


def test_agreement_is_scipys(measured):
    probable, rates, pairs = measured
    found = stage.agree(probable, rates, pairs, {"marker": ("centered", 3)}, bootstraps=500)
    assert found.columns == [c.name for c in columns("agreement_measures")][: found.width]
    assert found["summary"].to_list() == list(stage.SUMMARIES)
    for row in found.rows(named=True):
        value = probable[stage.SUMMARIES[row["summary"]]].to_numpy()
        rate, cosine = rates["rate"].to_numpy(), pairs["cosine_centered"].to_numpy()
        assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(value, rate).statistic)
        assert row["pearson"] == pytest.approx(scipy.stats.pearsonr(value, rate).statistic)
        assert row["spearman_ci_low"] < row["spearman"] < row["spearman_ci_high"]
        rhos = [scipy.stats.spearmanr(cosine, side).statistic for side in (value, rate)]
        assert (row["rho_probability"], row["rho_rate"]) == pytest.approx(tuple(rhos))
        assert row["difference"] == pytest.approx(rhos[0] - rhos[1])
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert row["mean_rate"] == pytest.approx(rate.mean())


def test_agreement_says_what_it_lacks(measured):
    probable, rates, pairs = measured
    few = rates.head(4)
    assert set(stage.agree(probable, few, pairs, {"marker": ("centered", 3)})["reason"]) == {
        f"4 bystanders; {stage.MIN_BOOTSTRAP} are needed"
    }
    alone = stage.agree(probable, rates, pairs.clear(), {"marker": ("centered", None)}, bootstraps=100)
    assert alone["spearman"].null_count() == 0 and alone["difference"].null_count() == 3
    assert set(alone["difference_reason"]) == {"no cosine for all of these bystanders"}
    flat = rates.with_columns(rate=pl.lit(0.0))
    assert "the same for all" in stage.agree(probable, flat, pairs, {})["reason"][0]
