"""Changes of judged means are paired by question."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import t

from leakfast.stats import judged, summaries
from leakfast.stats import rates as rate_tables
from leakfast.storage import schema

NOTHING = schema.empty("question_counts")


def made(sides, paired=True):
    """Rates with intervals of scores: adapter → (people, questions, samples)."""
    frames = []
    for adapter, scores in sides.items():
        people, asked, drawn = np.indices(scores.shape).reshape(3, -1)
        names = np.array([f"p{i:02d}" for i in range(scores.shape[0])])
        frame = {
            "behavior": "advice",
            "adapter": adapter,
            "persona": names[people],
            "question": asked,
            "sample": drawn,
        }
        frame |= {"aligned": scores.ravel(), "coherent": 90.0, "status": "ok", "judge": "j"}
        frames.append(pl.DataFrame(frame, schema_overrides={"question": pl.Int32}))
    joined = pl.concat(frames)
    table = rate_tables.table(judged._by_persona(joined, 50.0), {"a": ("s", 1)}, {})
    questions = judged._by_question(joined, 50.0)
    return summaries.with_intervals(table, NOTHING, questions if paired else None)


def scores(rng, people, asked, drawn, change=-15.0):
    """A question is as hard for both models, but for a part of its own in each."""
    both = 10 * rng.normal(size=(people, asked, 1))
    own = [
        4 * rng.normal(size=(people, asked, 1)) + 8 * rng.normal(size=(people, asked, drawn))
        for _ in range(2)
    ]
    return {"a": 60 + change + both + own[0], "base": 60 + both + own[1]}


def test_the_change_over_questions_is_the_paired_t_interval_where_all_personas_are_one():
    """One persona: the correlation is its own, so the width is that of the questions' differences."""
    sides = scores(np.random.default_rng(0), 1, 8, 10)
    row = made(sides).filter(adapter="a").row(0, named=True)
    apart = (sides["a"] - sides["base"])[0].mean(1)
    half = t.ppf(0.975, 7) * apart.std(ddof=1) / np.sqrt(8)
    assert row["delta"] == pytest.approx(apart.mean())
    assert (row["delta_low"], row["delta_high"]) == pytest.approx((apart.mean() - half, apart.mean() + half))
    assert row["delta_method"] == "square-and-add of the means' intervals over questions, paired by question"
    wide = made(sides, paired=False).filter(adapter="a").row(0, named=True)
    assert wide["delta_high"] - wide["delta_low"] > 2.6 * half and "paired" not in wide["delta_method"]


def test_a_side_without_an_interval_over_questions_is_not_paired():
    """The base gives one score always: its interval is over samples, which shares nothing with the adapter's questions."""
    sides = scores(np.random.default_rng(1), 3, 8, 10)
    sides["base"] = np.concatenate([sides["base"][:2], np.full((1, 8, 10), 90.0)])
    first, _, last = made(sides).filter(adapter="a").sort("persona").rows(named=True)
    assert "paired" in first["delta_method"] and "paired" not in last["delta_method"]
    plain = made(sides, paired=False).filter(adapter="a").sort("persona").row(2, named=True)
    assert (last["delta_low"], last["delta_high"]) == (plain["delta_low"], plain["delta_high"])


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "drawn"), [(8, 10), (20, 5)])
def test_coverage_of_the_change_of_judged_means(asked, drawn):
    """2,400 personas, whose questions are drawn each for itself: the true change is −15 points."""
    rng, held = np.random.default_rng(2), {True: [], False: []}
    for _ in range(40):
        sides = scores(rng, 60, asked, drawn)
        for paired, into in held.items():
            rows = made(sides, paired).filter(adapter="a")
            into += (
                rows.select((pl.col("delta_low") <= -15) & (pl.col("delta_high") >= -15))
                .to_series()
                .to_list()
            )
    print(f"{asked} x {drawn}: paired {np.mean(held[True]):.4f}, unpaired {np.mean(held[False]):.4f}")
    assert 0.93 <= np.mean(held[True]) <= 0.97
    assert np.mean(held[False]) > 0.985
