"""The report, the pictures and the points of training of a run with probabilities: beside sampled rates, or in their place."""

from __future__ import annotations

import polars as pl
import pytest
import scipy.stats
from report_runs import PEOPLE, SOURCES, fill, with_probabilities

from leakfast import stats
from leakfast.figures.of_run import draw
from leakfast.report import trajectory
from leakfast.report.payload import payload
from leakfast.storage import layout


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    run = with_probabilities(fill(tmp_path_factory.mktemp("runs") / "both"), series=True)
    return run, stats.stats(run, permutations=50, bootstraps=50)


def test_probability_is_another_y_where_a_run_has_it(both):
    run, tables = both
    data = payload(run, tables, {})
    (behavior,) = data["behaviors"]
    assert behavior["ys"] == ["rate", "delta", "probability"]
    means = tables.more["probabilities"]
    rows = zip(data["rates"]["adapter"], data["rates"]["persona"], data["rates"]["probability"], strict=True)
    shown = {(data["adapters"][a]["adapter"], data["personas"][p]["name"]): value for a, p, value in rows}
    assert shown == {(a, p): v for a, p, v in means.select("adapter", "persona", "mean_probability").rows()}
    told = pl.DataFrame(data["correlations"], strict=False).filter(
        y="probability", cosine="centered", layer=3
    )
    assert set(told["source"]) == {*SOURCES, "pooled"}
    mine = tables.pairs.filter(source="villain", layer=3).join(means, on=["behavior", "adapter", "persona"])
    wanted = scipy.stats.spearmanr(mine["cosine_centered"], mine["mean_probability"]).statistic
    assert told.filter(source="villain")["spearman"][0] == pytest.approx(wanted)


def test_without_probabilities_there_is_no_such_y(tmp_path):
    run = fill(tmp_path / "plain")
    tables = stats.stats(run, permutations=20, bootstraps=0)
    data = payload(run, tables, {})
    assert data["behaviors"][0]["ys"] == ["rate", "delta"]
    assert set(data["rates"]["probability"]) == {None}
    (drawn,) = draw(run, tables, ["probability"])
    assert drawn.figure is None and "no probability" in drawn.reason


def test_a_picture_has_the_probability_on_its_axis(both):
    (drawn,) = draw(*both, ["probability"])
    assert drawn.figure is not None
    assert any("probability of marker" in axis.get_ylabel().replace("\n", " ") for axis in drawn.figure.axes)


def test_a_training_is_followed_by_probability(both):
    run, _ = both
    made = trajectory.table(run)
    assert set(made["scoring"]) == {"probability, anywhere"} and set(made["share"]) == {0.0, 0.5, 1.0}
    mine = made.filter(source="villain", persona=PEOPLE[3]).sort("share")
    start, half, end = mine["rate"]
    assert half == pytest.approx(end / 2) and mine["delta"].to_list()[2] == pytest.approx(end - start)
    assert mine["role"].to_list() == ["bystander"] * 3


def test_a_behavior_measured_by_nothing_else_has_its_rates_from_it(tmp_path):
    run = with_probabilities(fill(tmp_path / "alone"), alone="refusal")
    tables = stats.stats(run, permutations=50, bootstraps=50)
    rates = tables.rates.filter(behavior="refusal", adapter="marker-villain-s42")
    means = tables.more["probabilities"].filter(behavior="refusal", adapter="marker-villain-s42")
    both = rates.join(means, on=["behavior", "adapter", "persona"])
    assert rates.height == len(PEOPLE) and (both["rate"] == both["mean_probability"]).all()
    assert set(rates["estimator"]) == {"openings"} and rates["delta"].null_count() == 0
    assert tables.rates.filter(behavior="marker")["estimator"].null_count() == 3 * len(PEOPLE)
    assert tables.best_layer("refusal") is not None
    assert payload(run, tables, {})["behaviors"][1]["ys"] == ["rate", "delta"], "its rate is the probability"


def test_a_line_through_training_is_of_one_measurement(both):
    """Rates by a detector and probabilities at the same shares are no one line."""
    run, tables = both
    kept = run.read(layout.table("trajectory")) if run.has(layout.table("trajectory")) else None
    probable = trajectory.table(run)
    counted = probable.with_columns(scoring=pl.lit("detector"), rate=pl.lit(0.25))
    try:
        for several in (pl.concat([probable, counted]), pl.concat([counted, probable])):
            run.add_shard(layout.table("trajectory"), several)
            shown = payload(run, tables, {})["trajectory"]
            assert set(shown["rate"]) == {0.25} and len(shown["rate"]) == counted.height
        run.add_shard(layout.table("trajectory"), probable)
        assert len(payload(run, tables, {})["trajectory"]["rate"]) == probable.height
    finally:
        if kept is None:
            run.retire(layout.table("trajectory"), "made up")
        else:
            run.add_shard(layout.table("trajectory"), kept)
