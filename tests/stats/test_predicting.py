"""Predictions of sources that nobody trained: the fit against a known answer, what moves the interval, what it says of itself,
and how often it holds a new source's bystanders."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, norm, t

from leakfast.stats import predicting
from leakfast.stats.predicting import Line, line, predict

PEOPLE = 110


def source(rng, x, persona, *, total=200, middle=-2.0, slope=1.5, apart=(0.8, 0.6), spread=0.7):
    """One source's bystanders: (rates, hits); its line is drawn, `persona` (P,) leaks alike under all sources."""
    a, b = middle + apart[0] * rng.normal(), slope + apart[1] * rng.normal()
    rate = expit(a + b * x + persona + spread * rng.normal(size=len(x)))
    return rate, rng.binomial(total, rate).astype(float)


def test_the_fit_of_a_source_finds_its_line_and_spread():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 0.2, 4000)
    rate = expit(-13 + 4 * x + 0.8 * rng.normal(size=4000))
    found = line("s", x, rng.binomial(300, rate).astype(float), np.full(4000, 300.0))
    assert isinstance(found, Line) and found.n == 4000
    assert found.slope == pytest.approx(4, abs=0.3) and found.spread == pytest.approx(0.8, abs=0.05)
    assert found.intercept + 3 * found.slope == pytest.approx(-1, abs=0.05)


def test_what_cannot_be_fitted_says_why():
    x, n = np.linspace(0, 1, 20), np.full(20, 30.0)
    assert "no reply shows" in str(line("s", x, np.zeros(20), n))
    assert "the same for all" in str(line("s", np.ones(20), n / 2, n))
    assert "5 bystanders" in str(line("s", x[:5], n[:5] / 2, n[:5]))
    with pytest.raises(ValueError, match="finite"):
        line("s", x * np.nan, n / 2, n)
    with pytest.raises(ValueError, match="level"):
        predict([Line("s", 0, 1, 1, 9)], x, 10, level=1.0)


def test_without_scatter_the_interval_is_the_t_interval_of_one_more_line():
    rng, x = np.random.default_rng(1), np.array([-1.0, 0.0, 2.0])
    lines = [Line(f"s{i}", a, b, 1e-9, 50) for i, (a, b) in enumerate(rng.normal(size=(4, 2)))]
    found = predict(lines, x, 100, level=0.8)
    each = np.array([one.intercept + one.slope * x for one in lines])
    half = t.ppf(0.9, 3) * each.std(0, ddof=1) * np.sqrt(1 + 1 / 4)
    assert np.allclose(found.low, expit(each.mean(0) - half)), "exact for normal lines"
    assert np.allclose(found.high, expit(each.mean(0) + half))


def test_with_lines_alike_the_interval_is_the_scatter_and_the_expected_rate_its_mean():
    x = np.array([0.0, 1.0])
    lines = [Line(f"s{i}", -1.0, 0.5, 0.9, 100_000) for i in range(3)]
    found = predict(lines, x, 1000)
    middle = -1 + 0.5 * x
    assert np.allclose(found.low, expit(middle + 0.9 * norm.ppf(0.05)), atol=1e-6)
    nodes, weight = np.polynomial.hermite_e.hermegauss(60)
    mean = (expit(middle[:, None] + 0.9 * nodes) * weight).sum(1) / weight.sum()
    assert np.allclose(found.expected, mean, atol=1e-3)


def test_the_interval_of_a_share_is_the_binomials_where_the_rate_is_known():
    lines = [Line(f"s{i}", np.log(0.2 / 0.8), 0.0, 1e-9, 100) for i in range(3)]
    found = predict(lines, np.zeros(1), 60)
    assert found.measured_low[0] * 60 == binom.ppf(0.05, 60, 0.2)
    assert found.measured_high[0] * 60 == binom.ppf(0.95, 60, 0.2)
    assert found.low[0] == pytest.approx(0.2) and found.high[0] == pytest.approx(0.2)


def test_adapters_of_one_source_are_no_sources_of_their_own():
    x, twice = np.zeros(1), [Line("a", 0, 1, 0.5, 99), Line("a", 1, 1, 0.5, 99), Line("b", 3, 1, 0.5, 99)]
    found = predict(twice, x, 50)
    once = predict([Line("a", 0.5, 1, 0.5, 198), Line("b", 3, 1, 0.5, 99)], x, 50)
    assert found.low == pytest.approx(once.low, rel=1e-3), "but for a degree of freedom of hundreds"
    alone = predict(twice[:2], x, 50)
    assert np.isnan(alone.low).all() and np.isnan(alone.measured_high).all(), "one source has no spread"
    assert alone.expected[0] == pytest.approx(expit(0.5))
    three = predict([*twice, Line("c", 1.5, 1, 0.5, 99)], x, 50)
    assert three.high - three.low < found.high - found.low, "two sources say little of a third"


def test_a_smaller_level_is_inside_a_larger_one():
    rng = np.random.default_rng(3)
    lines = [Line(f"s{i}", a, b, 0.7, 99) for i, (a, b) in enumerate(rng.normal(size=(5, 2)))]
    wide, narrow = (predict(lines, np.linspace(-2, 2, 9), 60, level) for level in (0.95, 0.5))
    assert (wide.low < narrow.low).all() and (narrow.high < wide.high).all()
    assert (wide.measured_low <= narrow.measured_low).all() and (narrow.expected == wide.expected).all()


WORLDS = {
    "three sources": (3, {}),
    "five sources": (5, {}),
    "ten sources": (10, {}),
    "five sources, few hits": (5, {"middle": -4.0, "total": 60}),
    "five sources, lines alike": (5, {"apart": (0.0, 0.0)}),
    "five sources, lines far apart": (5, {"apart": (1.5, 1.0), "spread": 0.3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_coverage_of_a_new_sources_bystanders(name):
    """1,000 new sources in each world: the share of their bystanders whose true rate, and whose measured share, the 90 %
    interval holds."""
    sources, settings = WORLDS[name]
    rng, held = np.random.default_rng(11), []
    total = settings.get("total", 200)
    for _ in range(1_000):
        persona, lines = 0.4 * rng.normal(size=PEOPLE), []
        for s in range(sources):
            x = rng.normal(size=PEOPLE)
            _, hits = source(rng, x, persona, **settings)
            made = line(f"s{s}", x, hits, np.full(PEOPLE, float(total)))
            lines += [made] if isinstance(made, Line) else []
        x = rng.normal(size=PEOPLE)
        rate, hits = source(rng, x, persona, **settings)
        found = predict(lines, x, total)
        true = np.mean((found.low <= rate) & (rate <= found.high))
        held.append([true, predicting.held(found, hits, np.full(PEOPLE, total))[0]])
    share, error = np.mean(held, 0), np.std(held, 0) / np.sqrt(len(held))
    print(
        f"{name}: true rate {share[0]:.4f} ± {error[0]:.4f}, measured share {share[1]:.4f} ± {error[1]:.4f}"
    )
    assert 0.87 <= share[0] <= 0.93
    assert 0.87 <= share[1] <= 0.97, "few possible shares make the interval wider"
