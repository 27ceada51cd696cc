"""Intervals over personas and questions, both drawn."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from leakfast.stats import association, correlations, intervals, resample, two_way
from leakfast.storage import schema


def world(rng, people=60, asked=12, drawn=10, slopes=0.6, sources=("s",), behavior="marker"):
    """(pairs, counts per question): leakage follows the cosine, by how much differs between questions."""
    pairs, counts = [], []
    names = [f"p{i}" for i in range(people)]
    slope, level = 0.8 + slopes * rng.normal(size=asked), 0.5 * rng.normal(size=asked)
    for source in sources:
        cosine = rng.normal(size=people)
        own = 0.5 * rng.normal(size=people)
        logit = (
            -1.5
            + slope[None] * cosine[:, None]
            + level[None]
            + own[:, None]
            + 0.3 * rng.normal(size=(people, asked))
        )
        hits = rng.binomial(drawn, 1 / (1 + np.exp(-logit)))
        frame = {
            "behavior": behavior,
            "source": source,
            "seed": 42,
            "persona": names,
            "category": None,
            "layer": 0,
        }
        frame |= {
            "cosine_centered": cosine,
            "cosine_raw": None,
            "rate": hits.sum(1) / (asked * drawn),
            "delta": None,
        }
        pairs.append(pl.DataFrame(frame, schema=schema.columns("pairs")))
        counts.append(
            pl.DataFrame(
                {
                    "behavior": behavior,
                    "adapter": source,
                    "persona": np.repeat(names, asked),
                    "question": np.tile(np.arange(asked), people),
                    "hits": hits.ravel(),
                    "total": drawn,
                },
                schema_overrides={"question": pl.Int32, "total": pl.Int64},
            )
        )
    return pl.concat(pairs), pl.concat(counts)


def made(pairs, counts, bootstraps=200):
    table = correlations.correlate(pairs, 0, bootstraps=bootstraps, workers=1)
    return two_way.with_questions(table, pairs, counts).filter(y="rate", cosine="centered")


def test_the_error_over_questions_is_the_jackknifes_done_the_long_way():
    pairs, counts = world(np.random.default_rng(0))
    row = made(pairs, counts).filter(source="s").row(0, named=True)
    z = []
    for question in range(12):
        rest = (
            counts.filter(pl.col("question") != question)
            .group_by("persona")
            .agg(pl.col("hits", "total").sum())
        )
        both = pairs.join(rest, on="persona")
        z.append(np.arctanh(spearmanr(both["cosine_centered"], both["hits"] / both["total"])[0]))
    wanted = np.sqrt(11 / 12 * np.square(np.array(z) - np.mean(z)).sum())
    assert row["spearman_question_se_z"] == pytest.approx(wanted, rel=1e-9) and row["questions"] == 12


def test_few_questions_widen_the_interval_and_many_leave_that_of_personas():
    rng = np.random.default_rng(1)
    few, many = made(*world(rng, asked=6)), made(*world(rng, asked=200, slopes=0.0))
    wide = few.filter(source="s").row(0, named=True)
    assert wide["spearman_both_low"] < wide["spearman_ci_low"] - 0.02
    row = many.filter(source="s").row(0, named=True)
    assert row["spearman_both_high"] - row["spearman_both_low"] == pytest.approx(
        row["spearman_ci_high"] - row["spearman_ci_low"], rel=0.15
    )


def test_pooled_leaves_a_question_out_of_all_sources_at_once():
    pairs, counts = world(np.random.default_rng(2), sources=("s", "t", "u"))
    table = made(pairs, counts)
    pooled = table.filter(source="pooled").row(0, named=True)
    singles = table.filter(pl.col("source") != "pooled")
    assert (
        pooled["spearman_question_se_z"] > 0.5 * singles["spearman_question_se_z"].mean()
    )  # slopes are shared
    assert pooled["spearman_both_low"] < pooled["spearman"] < pooled["spearman_both_high"]


def test_what_is_not_there_says_so():
    pairs, counts = world(np.random.default_rng(3))
    none = made(pairs, schema.empty("question_counts"))
    assert (
        none["spearman_both_low"].null_count() == none.height
        and "0 questions with counts" in none["both_reason"][0]
    )
    two = made(pairs, counts.filter(pl.col("question") < 2))
    assert "2 questions with counts; at least 3" in two["both_reason"][0]
    table = correlations.correlate(pairs, 0, bootstraps=0)
    told = two_way.with_questions(table, pairs, counts).filter(y="rate", cosine="centered")
    assert told["both_reason"][0] == "no bootstrap was asked for"
    assert two_way.with_questions(table, pairs, counts).columns[: len(table.columns)] == table.columns


def test_the_mean_over_a_table_is_a_two_way_anova():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(9, 1)) + rng.normal(size=(1, 7)) + 0.1 * rng.normal(size=(9, 7))
    mean, low, high = two_way.of_mean(values)
    assert mean == pytest.approx(values.mean()) and low < mean < high
    assert two_way.of_mean(np.full((4, 5), 0.3)) == (pytest.approx(0.3),) * 3
    assert np.isnan(two_way.of_mean(values[:1])[1])
    alone = values.mean(1)
    assert high - low > 2 * float(intervals.t_half(alone.std(ddof=1) / 3, 8)), "questions add to it"


def _lean(rng, asked: int, drawn: int, sources: int, people: int = 110, slopes: float = 0.6):
    """(ρ, interval over personas, interval over both) of `world`, pooled within sources, without the tables in between."""
    slope, level = 0.8 + slopes * rng.normal(size=asked), 0.5 * rng.normal(size=asked)
    parts, whole = [], np.full((people, asked), float(drawn))
    for _ in range(sources):
        cosine, own = rng.normal(size=(2, people))
        logit = -1.5 + slope * cosine[:, None] + level + 0.5 * own[:, None]
        logit += 0.3 * rng.normal(size=logit.shape)
        hits = rng.binomial(drawn, 1 / (1 + np.exp(-logit))).astype(float)
        rate = hits.sum(1) / (asked * drawn)
        left = {"rate": two_way._left_out((hits, whole), None, np.isfinite(rate))}
        names = [f"p{i:03d}" for i in range(people)]
        parts.append(two_way.Asked(names, cosine[:, None], {"rate": rate}, left, list(range(asked))))
    block = np.repeat(np.arange(sources), people)
    x, y = (
        association.within(np.concatenate(side), block)
        for side in ([part.x for part in parts], [part.whole["rate"][:, None] for part in parts])
    )
    rho = np.array([spearmanr(x[:, 0], y[:, 0]).statistic])
    seed, person = int(rng.integers(2**31)), np.tile(np.arange(people), sources)
    draws = resample.bootstrap_spearman(x.T, y[:, 0], 400, seed, person=person, workers=1)
    errors = intervals.bootstrap_z(rho, draws)[0], *two_way.errors_of(parts, "rate", seed)
    alone, crossed = intervals.percentiles(draws), two_way.both(rho, errors, (people - 1.0, asked - 1.0))
    return float(rho[0]), *([float(end[0]) for end in ends] for ends in (alone, crossed))


def test_the_lean_simulation_is_the_table():
    """The interval of `_lean` is as wide as that of the tables on the same kind of world."""
    rng = np.random.default_rng(7)
    table = [made(*world(rng, 110, 12, 10, sources=("s", "t")), 400) for _ in range(12)]
    rows = [frame.filter(source="pooled").row(0, named=True) for frame in table]
    told = np.mean(
        [np.diff(np.arctanh([row["spearman_both_low"], row["spearman_both_high"]])) for row in rows]
    )
    found = np.mean([np.diff(np.arctanh(_lean(rng, 12, 10, 2)[2])) for _ in range(12)])
    assert found == pytest.approx(told, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [8, 20, 210])
@pytest.mark.parametrize("sources", [1, 5])
def test_coverage_of_rho_with_question_slopes(asked, sources):
    """Over new personas and new questions; the mean of z over the trials stands for the estimand."""
    rng = np.random.default_rng(5)
    rows = [_lean(rng, asked, 10 if asked < 100 else 2, sources) for _ in range(1_000)]
    true = np.tanh(np.mean(np.arctanh([row[0] for row in rows])))
    shares = {
        kind: np.mean([row[k][0] <= true <= row[k][1] for row in rows])
        for k, kind in enumerate(("ci", "both"), 1)
    }
    print(f"{asked} questions, {sources} sources: {shares}, rho {true:.3f}")
    assert 0.93 <= shares["both"] <= 0.975, shares


@pytest.mark.slow
@pytest.mark.parametrize("asked", [8, 20])
def test_coverage_of_a_mean_over_personas_and_questions(asked):
    rng = np.random.default_rng(6)
    inside, total = [], []
    for _ in range(4_000):
        p = rng.beta(2, 6, size=(60, 1)) * np.clip(1 + 0.4 * rng.normal(size=(1, asked)), 0.1, 1.9)
        values = rng.binomial(5, np.clip(p, 0, 1), size=(60, asked)) / 5
        total.append(two_way.of_mean(values))
    true = np.mean([mean for mean, *_ in total])
    inside = [low <= true <= high for _, low, high in total]
    print(f"{asked} questions: {np.mean(inside):.4f}")
    assert 0.93 <= np.mean(inside) <= 0.97
