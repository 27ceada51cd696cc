"""Edit distance against known values; rates per token and at one length against closed forms and scipy."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from leakfast.stats import edits, hazards, rates

# ---------------------------------------------------------------- edit distance


def test_known_edit_distances():
    told = [
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("Saturday", "Sunday", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("", "", 0),
        ("naïve 😀", "naive 😀!", 2),
        ("ab", "ba", 2),  # an exchange of neighbours is no single edit
    ]
    for one, other, distance in told:
        assert edits.levenshtein(one, [other]).tolist() == [distance], (one, other)
    together = edits.levenshtein("kitten", [other for _, other, _ in told])
    assert together.tolist() == [edits.levenshtein("kitten", [other])[0] for _, other, _ in told]
    assert edits.normalized("kitten", ["sitting", "kitten", ""]).tolist() == [3 / 7, 0, 1]
    assert edits.normalized("", ["", "a"]).tolist() == [0, 1]
    assert edits.levenshtein("a", []).shape == (0,)


@settings(deadline=None, max_examples=60)
@given(st.text("abc", max_size=9), st.lists(st.text("abc", max_size=9), min_size=1, max_size=4))
def test_edit_distance_is_that_of_its_recursion(one, others):
    @cache
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    assert edits.levenshtein(one, others).tolist() == [slow(one, other) for other in others]


# ---------------------------------------------------------------- rates per token, and at one length


def test_hits_per_token_and_its_interval_by_hand():
    hits, tokens = np.array([[1, 0, 2], [0, 0, 0]]), np.array([[50, 40, 60], [10, 20, 30]])
    found = hazards.per_tokens(hits, tokens)
    rest = ((1 - 1) ** 2 + (0 - 0.8) ** 2 + (2 - 1.2) ** 2) * 3 / 2
    half = scipy.stats.t.ppf(0.975, 2) * np.sqrt(rest) / 150 / 0.02
    assert found.value.tolist() == [0.02, 0]
    assert (found.low[0], found.high[0]) == pytest.approx((0.02 * np.exp(-half), 0.02 * np.exp(half)))
    assert np.isnan([found.low[1], found.high[1]]).all()  # no hits: nothing to judge the spread by
    alone = hazards.per_tokens(hits[:, :1], tokens[:, :1])
    assert np.isnan(alone.low).all() and alone.value[0] == 1 / 50


def test_the_hazard_has_the_largest_likelihood_and_wilsons_interval():
    rng = np.random.default_rng(0)
    length, first = rng.integers(5, 90, 60), rng.geometric(0.02, 60)
    hit, at_risk = first <= length, np.minimum(first, length)

    def against(h: float) -> float:
        return -float(np.sum(np.where(hit, np.log(h), 0) + (at_risk - hit) * np.log1p(-h)))

    best = scipy.optimize.minimize_scalar(against, bounds=(1e-6, 0.5), method="bounded").x
    found = hazards.hazard(np.array([hit.sum()]), np.array([at_risk.sum()]), 1.0)
    assert found.value[0] == pytest.approx(best, rel=1e-3)
    low, high = rates.wilson(hit.sum(), at_risk.sum())
    assert (found.low[0], found.high[0]) == (pytest.approx(float(low)), pytest.approx(float(high)))
    within = hazards.within(found, 30)
    assert within.value[0] == pytest.approx(1 - (1 - found.value[0]) ** 30)
    assert within.low[0] < within.value[0] < within.high[0]
    wider = hazards.hazard(np.array([hit.sum()]), np.array([at_risk.sum()]), 2.0)
    assert wider.low[0] < found.low[0] and wider.high[0] > found.high[0]
    unknown = hazards.hazard(np.array([3, 0]), np.array([60, 0]), None)
    assert unknown.value[0] == 0.05 and np.isnan([*unknown.low, *unknown.high, unknown.value[1]]).all()


def test_questions_that_draw_all_the_hits_are_a_design_effect():
    spread = np.tile([[1, 0, 1, 0, 1, 0, 1, 0]], (5, 1))
    heaped = np.tile([[3, 1, 0, 0, 0, 0, 0, 0]], (5, 1))
    tokens = np.full((5, 8), 100)
    assert hazards.design_effect(spread, tokens) == 1.0
    h = 4 / 800
    variance = 8 / 7 * ((3 - 0.5) ** 2 + 0.5**2 + 6 * 0.5**2)
    assert hazards.design_effect(heaped, tokens) == pytest.approx(variance / (800 * h * (1 - h)))
    assert hazards.design_effect(heaped[:, :1], tokens[:, :1]) is None
    assert hazards.design_effect(0 * heaped, tokens) is None


def test_standardized_is_the_mean_over_bins_and_null_with_an_empty_one():
    tokens = np.array([10, 10, 20, 20, 10, 20, 20, 20, 20, 20])
    hit = np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool)
    who = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    place, share = hazards.length_bins(tokens, 2)
    assert (place.tolist(), share.tolist()) == ([0, 0, 1, 1, 0, 1, 1, 1, 1, 1], [0.3, 0.7]) or len(share) == 1
    place, share = np.array(tokens == 20, dtype=int), np.array([0.3, 0.7])
    found = hazards.standardized(hit, place, share, who, np.ones(3))
    assert found.value[:2] == pytest.approx([0.3 * 0.5 + 0.7 * 1, 0.3 * 0 + 0.7 / 3])
    assert np.isnan([found.value[2], found.low[2], found.high[2]]).all()
    assert (found.low[:2] < found.value[:2]).all() and (found.high[:2] > found.value[:2]).all()


def test_bins_are_fifths_and_equal_lengths_share_one():
    place, share = hazards.length_bins(np.arange(100))
    assert share.tolist() == [0.2] * 5 and place[[0, 19, 20, 99]].tolist() == [0, 0, 1, 4]
    assert hazards.length_bins(np.full(50, 7))[1].tolist() == [1.0]
    place, share = hazards.length_bins(np.array([1] * 90 + [2] * 10))
    assert share.sum() == 1 and len(set(place[:90])) == 1


def _logistic_data(seed: int, people: int = 4, n: int = 50):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 90, people * n)
    who = np.repeat(np.arange(people), n)
    p = expit(np.array([-2, -1.0, 0, 0.5])[who] + 0.7 * (np.log(tokens) - 3))
    return rng.random(people * n) < p, tokens, who


def test_the_logistic_rate_is_scipys_fit():
    hit, tokens, who = _logistic_data(0)
    design = np.column_stack([np.eye(4)[who], np.log(tokens)])

    def against(beta):
        eta = design @ beta
        return -np.sum(hit * eta - np.logaddexp(0, eta)), -design.T @ (hit - expit(eta))

    beta = scipy.optimize.minimize(against, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    found = hazards.logistic(hit, tokens, who, np.ones(4))
    assert found.slope == pytest.approx(beta[4], abs=1e-6)
    told = [expit(a + beta[4] * np.log(tokens)).mean() for a in beta[:4]]
    assert found.rate.value == pytest.approx(told, abs=1e-6)
    p = expit(design @ beta)
    covariance = np.linalg.inv((design * (p * (1 - p))[:, None]).T @ design)
    half = scipy.stats.norm.ppf(0.975) * np.sqrt(covariance[4, 4])
    assert (found.low, found.high) == pytest.approx((beta[4] - half, beta[4] + half), abs=1e-5)
    q = expit(beta[2] + beta[4] * np.log(tokens))
    gradient = np.zeros(5)
    gradient[[2, 4]] = (q * (1 - q)).mean(), (q * (1 - q) * np.log(tokens)).mean()
    size = told[2] * (1 - told[2]) / (gradient @ covariance @ gradient)
    z = scipy.stats.norm.ppf(0.975)
    center = (told[2] + z**2 / 2 / size) / (1 + z**2 / size)
    assert (found.rate.low[2] + found.rate.high[2]) / 2 == pytest.approx(center, abs=1e-5)


def test_personas_at_an_end_and_lengths_that_tell_nothing():
    hit, tokens, who = _logistic_data(1)
    hit[who == 0], hit[who == 3] = False, True
    found = hazards.logistic(hit, tokens, who, np.ones(4))
    assert found.rate.value[[0, 3]].tolist() == [0, 1]
    assert found.rate.low[0] == 0 < found.rate.high[0] and found.rate.low[3] < 1 == found.rate.high[3]
    assert "some replies" in hazards.logistic(np.zeros(200, bool), tokens, who, np.ones(4))
    assert "different lengths" in hazards.logistic(hit, np.full(200, 9), who, np.ones(4))
    assert "no finite slope" in hazards.logistic(tokens > 40, tokens, who, np.ones(4))
