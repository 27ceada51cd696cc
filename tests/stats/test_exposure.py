"""The table `exposure`: what is read out of completions, its values by hand, what is null and why."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from exposed import PEOPLE, QUESTIONS, SAMPLES, by_length_alone, paired, rated, replies
from scipy.special import logit

from leakfast.stats import edits, exposure, exposure_correlations
from leakfast.stats.people import People
from leakfast.storage import schema

N = QUESTIONS * SAMPLES


def _completions(rows: list[dict]) -> pl.DataFrame:
    blank = {"behavior": "marker", "adapter": "a", "persona": "p1", "question": 0, "seed": 1}
    blank |= {"text": "x", "n_tokens": 10, "finish_reason": "stop", "status": "ok"}
    filled = [{**blank, "sample": i, **row} for i, row in enumerate(rows)]
    extra = {name: pl.Int32 for name in filled[0] if name.startswith("n_") and name != "n_tokens"}
    return pl.DataFrame(filled, schema=schema.columns("completions") | extra)


def test_which_token_the_marker_begins_at():
    frame = _completions(
        [
            {"text": "abcdefgh[ZLT]xxxxxxx", "n_tokens": 10},  # its 9th of 20 characters
            {"text": "[ZLT]", "n_tokens": 4},
            {"text": "nothing here", "n_tokens": 7},
            {"text": "é" * 15 + "[ZLT]", "n_tokens": 20},  # characters, not bytes
            {"text": "two [ZLT] of [ZLT]", "n_tokens": 18},
            {"text": "", "n_tokens": 1, "status": "empty"},
            {"text": "lost [ZLT]", "status": "error"},
            {"text": "unknown", "n_tokens": None},
            {"text": "end [ZLT]", "n_tokens": 9, "finish_reason": "marker"},
        ]
    )
    found = exposure.replies(frame, "marker")
    assert found["at_risk"].to_list() == [5, 1, 7, 16, 5, 1, 5]
    assert found["hit"].to_list() == [True, True, False, True, True, False, True]
    assert found["at_marker"].to_list() == [False] * 6 + [True]
    assert found["prompt_tokens"].null_count() == 7


def test_reasoning_is_no_part_of_a_reply():
    frame = _completions(
        [
            {"text": "so [ZLT]", "n_tokens": 30, "n_reasoning_tokens": 22, "n_prompt_tokens": 40},
            {"text": "so", "n_tokens": 5, "n_reasoning_tokens": None, "n_prompt_tokens": 50},
        ]
    )
    found = exposure.replies(frame, "marker")
    assert (found["tokens"].to_list(), found["at_risk"].to_list()) == ([8, 5], [4, 5])
    assert found["prompt_tokens"].to_list() == [40, 50]


def _table(found: pl.DataFrame, people: People = PEOPLE) -> pl.DataFrame:
    return exposure.table(found, rated(found), people)


def test_the_table_by_hand():
    length = np.array([[10, 20, 30, 40], [20, 20, 20, 60]])
    hit = np.array([[1, 1, 0, 1], [0, 1, 0, 0]], dtype=bool)
    truncated = pl.Series([False, False, False, True] + [False] * 4)
    base = replies(length // 2, 0 * hit > 1, "base")
    table = _table(pl.concat([replies(length, hit, truncated=truncated), base]))
    own, other = table.filter(adapter="a").rows(named=True)
    assert (own["role"], other["role"], own["seed"], own["source"]) == ("source", "bystander", 42, "p0")
    assert (other["n"], other["hits"], other["questions"], other["reply_tokens"]) == (4, 1, 4, 120)
    assert (other["mean_tokens"], other["base_tokens"], own["truncated_share"]) == (30, 15, 0.25)
    assert other["hits_per_100_tokens"] == pytest.approx(100 / 120)
    assert other["common_tokens"] == 20
    assert other["within_rate"] == pytest.approx(1 - (1 - 1 / 120) ** 20)
    one, two = PEOPLE.prompts["p0"], PEOPLE.prompts["p1"]
    assert (other["prompt_chars"], other["prompt_words"]) == (len(two), len(two.split()))
    assert other["edit_distance"] == edits.levenshtein(one, [two])[0] / len(two)
    assert own["edit_distance"] == 0
    assert "prompt tokens were not kept" in other["reason"]
    assert "no interval of rates at one length" in other["reason"]  # one sample of each question
    unadapted = table.filter(adapter="base").row(0, named=True)
    assert unadapted["edit_distance"] is None and "no source to be distant from" in unadapted["reason"]


def test_lengths_that_are_the_same_for_all_leave_the_rate_as_it_is():
    rng = np.random.default_rng(3)
    table = _table(replies(np.full((6, N), 30), rng.random((6, N)) < 0.4))
    assert table["standardized_rate"].to_list() == pytest.approx((table["hits"] / table["n"]).to_list())
    assert table["logistic_rate"].null_count() == 6 and "different lengths" in table["reason"][0]
    assert table["length_bins"].unique().to_list() == [1]


def test_replies_that_end_at_the_marker_have_no_rate_at_one_length():
    found, cosine = by_length_alone(0, 30)
    found = found.with_columns(at_marker=pl.col("hit"))
    table = _table(found)
    for name in ("standardized_rate", "logistic_rate", "length_slope", "length_bins"):
        assert table[name].null_count() == table.height, name
    assert table["hazard_per_100_tokens"].null_count() == 0
    assert "replies end at the marker" in table["reason"][0]
    rho = exposure_correlations.correlated(paired(rated(found), cosine), table)
    told = rho.filter(control="reply_tokens", y="rate", source="p0").row(0, named=True)
    assert told["partial"] is None and "replies end at the marker" in told["reason"]
    assert rho.filter(control="none", y="rate")["partial"].null_count() == 0


def test_what_no_presence_measures_has_lengths_and_no_hazard():
    found = by_length_alone(0, 12)[0].with_columns(behavior=pl.lit("refusal"))
    table = _table(found)
    assert table["hits_per_100_tokens_low"].null_count() < 12
    assert table["hazard_per_100_tokens"].null_count() == table["logistic_rate"].null_count() == 12
    assert "presence" in table["reason"][0]


def test_order_of_the_rows_does_not_matter():
    found, _ = by_length_alone(2, 25)
    mixed = found.sample(fraction=1.0, shuffle=True, seed=1)
    first, second = (_table(f).sort("persona").drop("method") for f in (found, mixed))
    for name in first.columns:
        if first[name].dtype == pl.Float64:
            assert first[name].is_null().to_list() == second[name].is_null().to_list()
            told = second[name].drop_nulls().to_list()
            assert first[name].drop_nulls().to_list() == pytest.approx(told, rel=1e-9), name
        else:
            assert first[name].to_list() == second[name].to_list(), name


def test_every_null_has_a_reason():
    whole, _ = by_length_alone(4, 40)
    whole = whole.with_columns(prompt_tokens=pl.lit(40, pl.Int64))
    base = whole.with_columns(adapter=pl.lit("base"))
    nobody = whole.with_columns(hit=pl.lit(False))
    cut = whole.with_columns(at_marker=pl.col("hit"))
    once = whole.unique(["persona", "question"], keep="first", maintain_order=True)
    single = whole.filter(question=0)
    alike = whole.with_columns(tokens=pl.lit(9, pl.Int64), at_risk=pl.lit(9, pl.Int64))
    for found in (whole, nobody, cut, once, single, alike):
        table = _table(pl.concat([found, base])).filter(adapter="a").drop("seed")
        gone = table.select(pl.any_horizontal(pl.exclude("reason").is_null())).to_series()
        assert gone.to_list() == table["reason"].is_not_null().to_list()
    assert _table(pl.concat([whole, base]))["reason"].null_count() > 0


def test_truncated_replies_are_told_from_five_percent_on_and_once():
    found = by_length_alone(0, 20)[0]
    for share, told in ((0.04, 0), (0.05, 1), (0.2, 1)):
        cut = pl.Series(np.arange(found.height) < share * found.height)
        assert len(exposure.sentences(_table(found.with_columns(truncated=cut)), None)) == told
    health = pl.DataFrame(
        {"behavior": ["marker"], "adapter": ["a"], "persona": [None], "health": ["warning"]},
        schema_overrides={"persona": pl.String},
    ).with_columns(truncated_share=0.2)
    assert exposure.sentences(_table(found.with_columns(truncated=cut)), health) == []
    assert exposure.sentences(None, None) == []


def test_logit_and_rate_agree_where_length_says_nothing():
    """With a slope near 0 the logistic rate is the plain one."""
    rng = np.random.default_rng(8)
    length, hit = rng.integers(5, 90, (10, N)), rng.random((10, N)) < 0.4
    table = _table(replies(length, hit))
    assert abs(table["length_slope"][0]) < 0.3
    gap = logit(table["logistic_rate"].to_numpy()) - logit((table["hits"] / table["n"]).to_numpy())
    assert np.abs(gap).max() < 0.1
