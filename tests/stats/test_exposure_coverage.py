"""Simulations of exposure: whether length alone is told from the cosine, which rate is right where, and coverage of the
95 % intervals. Slow tier."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from exposed import PEOPLE, QUESTIONS, SAMPLES, by_length_alone, paired, rated, replies
from scipy.special import expit

from leakfast.stats import exposure, exposure_correlations, hazards, intervals

pytestmark = [pytest.mark.long, pytest.mark.slow]
N = QUESTIONS * SAMPLES


def _found(made: pl.DataFrame, cosine: np.ndarray) -> dict[tuple[str, str], float | None]:
    rates = rated(made)
    table = exposure_correlations.correlated(paired(rates, cosine), exposure.table(made, rates, PEOPLE))
    mine = table.filter(source="p0", y=pl.col("y"))
    return {(y, control): rho for y, control, rho in mine.select("y", "control", "partial").rows()}


def _means(runs: list[dict]) -> dict[tuple[str, str], float]:
    return {
        key: float(np.mean([run[key] for run in runs]))
        for key in runs[0]
        if None not in {r[key] for r in runs}
    }


def test_leakage_that_follows_length_alone_has_no_rho_with_length_out():
    found = _means([_found(*by_length_alone(seed)) for seed in range(200)])
    assert 0.70 < found["rate", "none"] < 0.80
    for key in (("rate", "reply_tokens"), ("rate", "all"), ("hazard", "none"), ("logistic", "none")):
        assert abs(found[key]) < 0.05, (key, found[key])
    assert found["rate", "prompt_length"] > 0.70  # that one explains nothing here
    print({key: round(value, 3) for key, value in found.items()})


def _marker_at_the_end(seed: int, slope: float) -> tuple[pl.DataFrame, np.ndarray]:
    """The marker closes a reply as the cosine says, whatever its length; lengths follow slope · cosine."""
    rng = np.random.default_rng(seed)
    people = 111
    cosine = rng.normal(size=people)
    typical = np.log(35) + 0.3 * (slope * cosine + np.sqrt(1 - slope**2) * rng.normal(size=people))
    length = np.maximum(1, np.exp(typical[:, None] + 0.5 * rng.normal(size=(people, N)))).astype(int)
    rate = expit(-1.5 + 0.8 * cosine + 0.6 * rng.normal(size=people))
    return replies(length, rng.random((people, N)) < rate[:, None]), cosine


@pytest.mark.parametrize("slope", [-0.8, 0.0, 0.8])
def test_a_marker_at_the_end_is_no_matter_of_length(slope):
    """The logistic rate keeps the plain ρ; the hazard, whose model is wrong here, moves it with the length."""
    found = _means([_found(*_marker_at_the_end(seed, slope)) for seed in range(40)])
    print(slope, {key: round(value, 3) for key, value in found.items()})
    assert found["logistic", "none"] == pytest.approx(found["rate", "none"], abs=0.02)
    moved = found["hazard", "none"] - found["rate", "none"]
    assert abs(moved) > 0.04 and (moved > 0) == (slope < 0)


def _share(inside: list) -> float:
    share = float(np.mean(np.concatenate([np.ravel(part) for part in inside])))
    print(f"{share:.4f}")
    return share


# so that 10 to 90 % of the replies show it
@pytest.mark.parametrize("hazard", [0.003, 0.01, 0.05])
def test_a_constant_hazard_is_recovered(hazard):
    rng = np.random.default_rng(1)
    inside, people, trials = [], 20, 100  # 2,000 intervals
    for _ in range(trials):
        length = np.maximum(1, rng.lognormal(np.log(40), 0.5, (people, N))).astype(int)
        first = rng.geometric(hazard, size=(people, N))
        hits = (first <= length).reshape(people, QUESTIONS, SAMPLES).sum(2)
        at_risk = np.minimum(first, length).reshape(people, QUESTIONS, SAMPLES).sum(2)
        effect = hazards.design_effect(hits, at_risk)
        found = hazards.hazard(hits.sum(1), at_risk.sum(1), effect)
        inside.append((found.low <= hazard) & (hazard <= found.high))
        within = hazards.within(found, 40.0)
        truth = 1 - (1 - hazard) ** 40
        assert (((within.low <= truth) & (truth <= within.high)) == inside[-1]).all()
    assert 0.93 <= _share(inside) <= 0.97


@pytest.mark.parametrize("spread", [0.3, 0.6])
def test_a_hazard_that_differs_between_questions(spread):
    """Hazards of questions vary, so replies to one are alike: the design effect keeps the coverage."""
    rng = np.random.default_rng(2)
    inside, people = [], 40
    for _ in range(60):
        length = np.maximum(1, rng.lognormal(np.log(40), 0.5, (people, QUESTIONS, SAMPLES))).astype(int)
        odds = rng.lognormal(-(spread**2) / 2, spread, (people, QUESTIONS, 1))
        first = rng.geometric(np.minimum(0.01 * odds, 1.0), size=length.shape)
        hits, at_risk = (first <= length).sum(2), np.minimum(first, length).sum(2)
        found = hazards.hazard(hits.sum(1), at_risk.sum(1), hazards.design_effect(hits, at_risk))
        truth = 0.01 * _slowed(spread)
        inside.append((found.low <= truth) & (truth <= found.high))
    assert 0.93 <= _share(inside) <= 0.97


def _slowed(spread: float) -> float:
    """What hits / tokens at risk comes to, over the mean hazard: those at high risk leave early."""
    rng = np.random.default_rng(3)
    length = np.maximum(1, rng.lognormal(np.log(40), 0.5, 2_000_000)).astype(int)
    first = rng.geometric(np.minimum(0.01 * rng.lognormal(-(spread**2) / 2, spread, length.size), 1.0))
    return float((first <= length).sum() / np.minimum(first, length).sum() / 0.01)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.7])
def test_hits_per_token(rate):
    """Over 20 questions of 3 replies; few hits make the log scale's interval a little wide."""
    rng = np.random.default_rng(4)
    length = np.maximum(1, rng.lognormal(np.log(40), 0.5, (4000, QUESTIONS, SAMPLES))).astype(int)
    hits = (rng.random(length.shape) < rate).sum(2)
    found = hazards.per_tokens(hits, length.sum(2))
    truth = rate / np.maximum(1, rng.lognormal(np.log(40), 0.5, 4_000_000)).astype(int).mean()
    known = np.isfinite(found.low)
    assert 0.93 <= _share([((found.low <= truth) & (truth <= found.high))[known]]) <= 0.97


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_rates_at_one_length(slope):
    """Personas of one level and different lengths: the logistic and the standardized rate hold the same true rate."""
    rng = np.random.default_rng(5)
    inside: dict[str, list] = {"logistic": [], "standardized": []}
    people = 60
    for _ in range(40):
        typical = rng.normal(np.log(35), 0.2, (people, 1))
        length = np.maximum(1, np.exp(typical + 0.5 * rng.normal(size=(people, N)))).astype(int)
        shown = expit(-1 + slope * (np.log(length) - np.log(35)))
        hit, who = (rng.random(length.shape) < shown).ravel(), np.repeat(np.arange(people), N)
        place, share = hazards.length_bins(length.ravel())
        worth = np.ones(people)
        logistic = hazards.logistic(hit, length.ravel(), who, worth)
        assert not isinstance(logistic, str)
        truth = float(shown.mean())
        for name, found in (
            ("logistic", logistic.rate),
            ("standardized", hazards.standardized(hit, place, share, who, worth)),
        ):
            known = np.isfinite(found.low)
            inside[name].append(((found.low <= truth) & (truth <= found.high))[known])
    assert 0.93 <= _share(inside["logistic"]) <= 0.97
    assert 0.93 <= _share(inside["standardized"]) <= 0.97


def test_worth_of_alike_samples_keeps_the_logistic_coverage():
    """Samples of a question alike (beta-binomial, 0.2): with the worth that `intervals` gives them."""
    rng = np.random.default_rng(6)
    inside, people = [], 60
    for _ in range(40):
        length = np.maximum(1, rng.lognormal(np.log(35), 0.5, (people, QUESTIONS, SAMPLES))).astype(int)
        p = rng.beta(0.3 * 4, 0.7 * 4, (people, QUESTIONS, 1))
        hit = rng.random(length.shape) < p
        n = np.full((people, QUESTIONS), SAMPLES)
        icc = intervals.question_icc(hit.sum(2).ravel(), n.ravel(), np.repeat(np.arange(people), QUESTIONS))
        worth = intervals.effective_total(n.sum(1), np.square(n).sum(1), icc) / n.sum(1)
        who = np.repeat(np.arange(people), N)
        found = hazards.logistic(hit.ravel(), length.ravel(), who, worth)
        inside.append((found.rate.low <= 0.3) & (found.rate.high >= 0.3))
    assert 0.93 <= _share(inside) <= 0.97
