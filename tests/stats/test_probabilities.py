"""Means of probabilities against plain numbers and scipy, replies weighted as drawn, and agreement with sampled rates."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.stats
from probabilities_made import measured_by_both, scores_of

from leakfast.stats import calibration
from leakfast.stats import probabilities as stage
from leakfast.storage import schema
from leakfast.storage.columns import columns


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
    return measured_by_both()


def test_agreement_is_scipys(measured):
    probable, rates, pairs = measured
    found = stage.agree(probable, rates, pairs, {"marker": ("centered", 3)}, bootstraps=500)
    assert found.columns == [c.name for c in columns("agreement_measures")][: found.width]
    assert found["summary"].to_list() == list(stage.SUMMARIES)[:3], "the marker has no log-odds"
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


def test_a_probability_that_stands_as_the_rate_agrees_with_nothing(measured):
    """Of a behavior that was measured by probability alone it would agree with itself, at 1."""
    probable, rates, pairs = measured
    alone = rates.with_columns(rate=probable["mean_probability"], estimator=pl.lit("end"))
    assert stage.agree(probable, alone, pairs, {"marker": ("centered", 3)}, bootstraps=0).is_empty()
    counted = rates.with_columns(estimator=pl.lit(None, pl.String))
    assert stage.agree(probable, counted, pairs, {"marker": ("centered", 3)}, bootstraps=0).height == 3


def test_pooled_ranks_within_each_source(measured):
    """Two sources on other levels: pooled ρ is that of the ranks within each, r that of values less their source's mean."""
    probable, rates, pairs = measured
    other = [
        one.with_columns(
            source=pl.lit("comedian"),
            **({"adapter": pl.lit("marker-comedian-s42")} if "adapter" in one.columns else {}),
        )
        for one in (probable, rates, pairs)
    ]
    other[0] = other[0].with_columns(mean_probability=pl.col("mean_probability").reverse() + 5)
    found = stage.agree(
        pl.concat([probable, other[0]]),
        pl.concat([rates, other[1]]),
        pl.concat([pairs, other[2]]),
        {"marker": ("centered", 3)},
        bootstraps=200,
    )
    (row,) = found.filter(source="pooled", summary="mean_probability").rows(named=True)
    values = [one["mean_probability"].to_numpy() for one in (probable, other[0])]
    rate = rates["rate"].to_numpy()
    ranks = np.concatenate([scipy.stats.rankdata(v) for v in values])
    twice = np.concatenate([scipy.stats.rankdata(rate)] * 2)
    assert row["spearman"] == pytest.approx(scipy.stats.pearsonr(ranks, twice).statistic)
    centered = np.concatenate([v - v.mean() for v in values])
    wanted = scipy.stats.pearsonr(centered, np.concatenate([rate - rate.mean()] * 2)).statistic
    assert row["pearson"] == pytest.approx(wanted)
    assert (row["n"], row["adapter"]) == (48, None)
    assert row["spearman_ci_low"] < row["spearman"] < row["spearman_ci_high"]
    assert row["difference"] == pytest.approx(row["rho_probability"] - row["rho_rate"])


def test_a_rate_that_falls_with_the_behavior_agrees_with_the_turned_sign(measured):
    probable, rates, pairs = measured
    judged = [one.with_columns(behavior=pl.lit("misalignment-advice")) for one in (probable, rates, pairs)]
    judged[1] = judged[1].with_columns(rate=1 - pl.col("rate"))
    best = {"misalignment-advice": ("centered", 3), "marker": ("centered", 3)}
    turned = stage.agree(*judged, best, bootstraps=0).row(0, named=True)
    plain = stage.agree(*measured, best, bootstraps=0).row(0, named=True)
    assert turned["spearman"] == pytest.approx(plain["spearman"])
    assert turned["rho_probability"] == pytest.approx(-plain["rho_probability"])


def test_calibration_is_of_ten_bins_in_the_order_of_what_is_expected(measured):
    probable, rates, _ = measured
    rates = rates.with_columns(total=pl.lit(40))
    found = calibration.table(probable, rates)
    assert found["n"].to_list() == [3] * 4 + [2] * 6
    first = np.argsort(probable["mean_probability"].to_numpy())[:3]
    row, rate = found.row(0, named=True), rates["rate"].to_numpy()[first]
    assert row["expected"] == pytest.approx(probable["mean_probability"].to_numpy()[first].mean())
    low, high = scipy.stats.t.interval(0.95, 2, rate.mean(), scipy.stats.sem(rate))
    ends = (row["observed"], row["observed_ci_low"], row["observed_ci_high"])
    assert ends == pytest.approx((rate.mean(), low, high))
    assert found["expected"].is_sorted()
    assert found["source"].unique().to_list() == ["villain"], "one adapter is not pooled"
    pairs = probable.with_columns(estimator=pl.lit("pairs"))
    assert calibration.table(pairs, rates).is_empty(), "a preference between two texts expects no rate"


def test_a_persona_under_several_sources_is_one_unit_of_a_pooled_calibration(measured):
    """The same rates under a second source are no second personas: the pooled interval is that of one source."""
    both = []
    for one in measured[:2]:
        other = one.with_columns(source=pl.lit("comedian"), adapter=pl.lit("marker-comedian-s42"))
        both.append(pl.concat([one, other]))
    probable, rates = both[0], both[1].with_columns(total=pl.lit(40))
    assert set(probable["adapter"]) == {"marker-villain-s42", "marker-comedian-s42"}
    found = calibration.table(probable, rates).filter(source="pooled")
    for row in found.filter(pl.col("n") % 2 == 0).rows(named=True):
        inside = probable.filter(
            pl.col("mean_probability").is_between(row["expected_low"], row["expected_high"])
        )
        mine = inside.join(rates, on=["adapter", "persona"])
        each = mine.group_by("persona").agg(pl.col("rate").mean(), n=pl.len())
        if set(each["n"]) != {2} or mine.height != row["n"]:
            continue  # a persona whose two rows fall into two bins
        se = scipy.stats.sem(each["rate"].to_numpy())
        low, high = scipy.stats.t.interval(0.95, each.height - 1, row["observed"], se)
        assert (row["observed_ci_low"], row["observed_ci_high"]) == pytest.approx((low, high))
        break
    else:
        pytest.fail("no bin holds whole personas")
