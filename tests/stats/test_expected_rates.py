"""Probabilities as rates where nothing else was measured, as another y beside sampled ones, and caveats where they disagree."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from probabilities_made import measured_by_both, scores_of

from leakfast.report.caveats import _probable
from leakfast.stats import expected_rates
from leakfast.stats import probabilities as stage
from leakfast.stats.rates import table
from leakfast.stats.tables import Stats
from leakfast.storage import schema


@pytest.fixture
def measured():
    return measured_by_both()


def test_one_estimator_stands_for_a_behavior():
    names = ["end", "anywhere", "openings", "odds", "end"]
    of = ["marker", "marker", "refusal", "refusal", "marker+few"]
    found = expected_rates.leading(pl.DataFrame({"behavior": of, "estimator": names}))
    assert found.rows() == [("marker", "anywhere"), ("refusal", "openings"), ("marker+few", "end")]


def test_only_what_was_measured_by_nothing_else_gets_its_rates_from_it():
    scores = scores_of({("a", 0, 0): 0.5})
    assert expected_rates.alone(scores, {("marker", "base")}) == ["marker"]
    assert expected_rates.alone(scores, {("marker", "marker-villain-s42")}) == []
    assert expected_rates.alone(scores.clear(), set()) == []


def test_expected_rates_are_the_means_with_their_interval_and_a_change_against_the_base():
    values = {("a", q, 0): p for q, p in enumerate((0.2, 0.4, 0.9))}
    base = scores_of({key: p / 2 for key, p in values.items()}, adapter="base").with_columns(
        source=pl.lit(None, pl.String)
    )
    scores = pl.concat([scores_of(values), base])
    rates = table(expected_rates.totals(scores), {"marker-villain-s42": ("villain", 42)}, {"a": None})
    (mine,) = rates.filter(adapter="marker-villain-s42").rows(named=True)
    (mean,) = stage.means(scores_of(values)).rows(named=True)
    assert mine["rate"] == pytest.approx(0.5) and mine["total"] is None
    assert mine["delta"] == pytest.approx(0.25)
    assert (mine["ci_low"], mine["ci_high"]) == pytest.approx(
        (max(0, mean["mean_probability_low"]), min(1, mean["mean_probability_high"]))
    )


def test_pairs_make_points_that_fall_with_misalignment():
    scores = scores_of({("a", 0, 0): 1.0, ("a", 1, 0): 0.5, ("a", 2, 0): 1.0, ("a", 3, 0): 1.0})
    judged = scores.with_columns(behavior=pl.lit("misalignment-advice"), estimator=pl.lit("pairs"))
    (row,) = expected_rates.totals(judged).rows(named=True)
    assert row["value"] == pytest.approx(12.5) and row["value_low"] <= 12.5 <= row["value_high"]


def led(frame):
    return frame.with_columns(estimator=pl.lit("anywhere"))


def test_another_y_stands_beside_counted_rates_and_has_its_correlations(measured):
    probable, rates, pairs = measured
    probable, rates = led(probable), rates.with_columns(total=pl.lit(40))
    beside = expected_rates.beside(rates, probable)
    np.testing.assert_allclose(beside["probability"], probable["mean_probability"])
    assert expected_rates.beside(rates.with_columns(total=None), probable)["probability"].null_count() == 24
    whole = pairs.with_columns(
        adapter=pl.lit("marker-villain-s42"), cosine_raw=pl.col("cosine_centered"), rate=0.1, delta=0.1
    ).select("adapter", *schema.columns("pairs"))
    found = expected_rates.correlations(whole, beside, {"permutations": 0, "bootstraps": 0})
    (row,) = found.filter(cosine="centered", source="villain").rows(named=True)
    assert row["y"] == "probability" and row["n"] == 24
    agreed = stage.agree(probable, rates, pairs, {"marker": ("centered", 3)}, bootstraps=0)
    assert row["spearman"] == pytest.approx(agreed["rho_probability"][0])


def said(rates, agreement):
    stats = Stats(rates, pl.DataFrame(), pl.DataFrame(), more={"agreement_measures": agreement})
    return [one.text for one in _probable(stats)]


def test_disagreement_is_said_and_agreement_is_not(measured):
    probable, rates, pairs = measured
    best = {"marker": ("centered", 3)}
    fits = stage.agree(led(probable), rates, pairs, best, bootstraps=300)
    assert fits["spearman"][0] > 0.8 and said(rates, fits) == []
    turned = led(probable).with_columns(mean_probability=1 - pl.col("mean_probability"))
    against = stage.agree(turned, rates, pairs, best, bootstraps=300)
    (text,) = said(rates, against)
    assert "Spearman below 0.8: villain −" in text and "ρ with the cosine differs" in text
    wide = against.with_columns(difference_low=-1.0, difference_high=1.0)
    (text,) = said(rates, wide)
    assert "ρ with the cosine differs" not in text
    alone = rates.with_columns(estimator=pl.lit("anywhere"))
    (text,) = said(alone, fits)
    assert "what stands as its rate is the probability anywhere" in text
