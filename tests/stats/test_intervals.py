"""Intervals and combinations: closed forms by hand, scipy, and statsmodels where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from leakfast.stats import intervals, rates


def test_wilson_over_whole_samples_is_wilson():
    hits, total = np.array([0, 1, 7, 200]), np.array([5, 9, 20, 200])
    told = rates.wilson(hits, total)
    found = intervals.wilson_share(hits / total, total)
    for a, b in zip(found, told, strict=True):
        assert np.allclose(a, b, atol=1e-12, rtol=0)


def test_icc_is_the_analysis_of_variance_one():
    rng = np.random.default_rng(0)
    people, asked, m = 6, 5, 4
    hits = rng.binomial(m, rng.beta(1, 2, size=(people, asked)))
    draws = (np.arange(m) < hits[..., None]).astype(float)  # each sample as 0 or 1
    mean = draws.mean((1, 2), keepdims=True)
    between = m * ((draws.mean(2, keepdims=True) - mean) ** 2).sum() / (people * (asked - 1))
    within = ((draws - draws.mean(2, keepdims=True)) ** 2).sum() / (people * asked * (m - 1))
    told = max(0, (between - within) / (between + (m - 1) * within))
    who = np.repeat(np.arange(people), asked)
    assert intervals.question_icc(hits.ravel(), np.full(hits.size, m), who) == pytest.approx(told, abs=1e-12)


def test_icc_at_its_ends():
    who = np.zeros(10, int)
    assert intervals.question_icc([4, 0] * 5, [4] * 10, who) == pytest.approx(1)
    assert intervals.question_icc([2] * 10, [4] * 10, who) == 0
    assert intervals.question_icc([1] * 10, [1] * 10, who) is None
    assert intervals.question_icc([], [], []) is None
    assert intervals.effective_total(200.0, 20 * 10.0**2, 1.0) == 20
    assert intervals.effective_total(200.0, 20 * 10.0**2, 0.0) == 200


def test_a_difference_adds_both_variances():
    low, high = intervals.difference(0.5, 0.4, 0.6, 0.2, 0.17, 0.24)
    assert low == pytest.approx(0.3 - np.hypot(0.1, 0.04), abs=1e-15)
    assert high == pytest.approx(0.3 + np.hypot(0.1, 0.03), abs=1e-15)


def test_benjamini_hochberg_by_hand():
    assert np.allclose(intervals.benjamini_hochberg([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5])
    with pytest.raises(ValueError, match="p"):
        intervals.benjamini_hochberg([1.5])


def test_shares_differences_and_many_tests_are_statsmodels():
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

    rng = np.random.default_rng(4)
    for _ in range(50):
        total = rng.integers(5, 400, 2)
        hits = rng.integers(0, total + 1)
        sides = [intervals.wilson_share(h / n, n) for h, n in zip(hits, total, strict=True)]
        for (low, high), h, n in zip(sides, hits, total, strict=True):
            told = proportion_confint(h, n, method="wilson")
            assert (float(low), float(high)) == pytest.approx(told, abs=1e-12)
        a, b = hits / total
        found = intervals.difference(a, *sides[0], b, *sides[1])
        told = confint_proportions_2indep(hits[0], total[0], hits[1], total[1], "newcomb", "diff")
        assert [float(side) for side in found] == pytest.approx(told, abs=1e-12)
    p = np.round(rng.uniform(size=60) ** 3, 3)  # with ties
    assert intervals.benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1], abs=1e-12)


def test_a_resample_with_rho_of_one_gives_no_standard_error():
    draws = np.array([[0.5, 0.5], [0.4, 1.0], [0.6, 0.7], [np.nan, 0.6]] * 30)
    se, lost = intervals.bootstrap_z(np.array([0.5, 0.5]), draws)
    kept = np.arctanh(draws[~np.isnan(draws[:, 0]), 0])
    assert se[0] != se[0], "a quarter of the draws has no value"
    assert np.isnan(se[1]) and lost.tolist() == [0.25, 0.0]
    whole = draws[~np.isnan(draws).any(axis=1)]
    assert intervals.bootstrap_z(np.array([0.5, 0.5]), whole)[0][0] == pytest.approx(
        kept.std(ddof=1), abs=1e-12
    )


def test_what_can_be_detected_shrinks_with_n_and_is_found_that_often():
    found = [intervals.detectable(n) for n in (10, 30, 110, 1000)]
    assert found == sorted(found, reverse=True)
    assert intervals.detectable(4) is None
    rho, n = intervals.detectable(60), 60
    rng, r = np.random.default_rng(0), 2 * np.sin(np.pi * intervals.detectable(60) / 6)
    x = rng.normal(size=(3000, n))
    y = r * x + np.sqrt(1 - r * r) * rng.normal(size=x.shape)
    p = [scipy.stats.spearmanr(a, b).pvalue for a, b in zip(x, y, strict=True)]
    assert 0.2 < rho < 0.5
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.8, abs=0.04)


def test_percentiles_leave_out_what_has_no_value():
    draws = np.array([[0.1, np.nan], [0.2, np.nan], [np.nan, np.nan], [0.4, np.nan]])
    low, high = intervals.percentiles(draws)
    assert (low[0], high[0]) == tuple(np.quantile([0.1, 0.2, 0.4], [0.025, 0.975]))
    assert np.isnan(low[1]) and np.isnan(high[1])
    se, lost = intervals.bootstrap_z(np.array([0.2, 0.2]), draws)
    assert np.isnan(se).all() and list(lost) == [0.25, 1]


def test_a_mean_over_personas_with_several_values_each_counts_personas():
    rng = np.random.default_rng(5)
    values, people = rng.normal(size=9), np.array(list("abcdefghi"))
    assert intervals.of_mean_over(values, people) == pytest.approx((*intervals.of_mean(values)[:3], None))
    twice = intervals.of_mean_over(np.tile(values, 2), np.tile(people, 2))
    assert twice[:3] == pytest.approx(intervals.of_mean(values)[:3]), "the same again tells nothing more"
    held = 0
    for _ in range(400):
        mine = np.repeat(rng.normal(size=12), 3) + rng.normal(0, 0.2, 36)
        _, low, high, _ = intervals.of_mean_over(mine, np.repeat(np.arange(12), 3))
        held += low <= 0 <= high
    assert 0.91 < held / 400 < 0.985, held
    assert intervals.of_mean_over(np.ones(3), np.zeros(3))[3] == "one persona: no spread to judge by"
