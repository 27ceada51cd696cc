"""Gradient fits: the likelihood against scipy's beta-binomial, its gradient against differences, known
curves found again, falling and shapeless data, the test of widths."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit

from leakfast.stats import gradients


def _draw(rng, n=110, far=0.05, near=0.9, mid=0.5, width=0.5, icc=0.02, total=200):
    cosine = rng.uniform(-0.2, 1.0, n)
    p = far + (near - far) * expit(gradients.WIDTH / width * (cosine - mid))
    rate = rng.beta(p * (1 / icc - 1), (1 - p) * (1 / icc - 1)) if icc else p
    return cosine, rng.binomial(total, rate), np.full(n, total)


def test_the_likelihood_is_scipys_beta_binomial():
    cosine, hits, total = _draw(np.random.default_rng(0), n=30)
    curve = gradients.Curve(cosine, hits, total)
    theta = np.array([-2.5, 0.6, 1.7, -0.8, -3.0])
    at = (cosine - cosine.min()) / np.ptp(cosine)
    p = expit(-2.5) + (expit(1.7) - expit(-2.5)) * expit(gradients.WIDTH / np.exp(-0.8) * (at - 0.6))
    size = np.exp(3.0)
    told = scipy.stats.betabinom.logpmf(hits, total, p * size, (1 - p) * size).sum()
    assert -curve.loss(theta)[0] == pytest.approx(told, rel=1e-10)


def test_its_gradient_is_the_difference_quotient():
    curve = gradients.Curve(*_draw(np.random.default_rng(1), n=40))
    for theta in ([-2.5, 0.6, 1.7, -0.8, -3.0], [1.0, 0.2, -2.0, 0.3, -1.0]):
        theta, step = np.array(theta), 1e-6
        told = [
            (curve.loss(theta + step * unit)[0] - curve.loss(theta - step * unit)[0]) / (2 * step)
            for unit in np.eye(5)
        ]
        assert curve.loss(theta)[1] == pytest.approx(told, rel=1e-5, abs=1e-4)


def test_a_known_curve_is_found_again():
    found = gradients.fit(*_draw(np.random.default_rng(2), total=2000, icc=0.005))
    assert found.midpoint == pytest.approx(0.5, abs=0.03)
    assert found.width == pytest.approx(0.5, abs=0.1)
    assert (found.far, found.near) == (pytest.approx(0.05, abs=0.02), pytest.approx(0.9, abs=0.03))
    assert found.overdispersion == pytest.approx(0.005, abs=0.003)
    for name in ("midpoint", "width", "far", "near"):
        low, high = found.intervals[name]
        assert low < getattr(found, name) < high


def test_an_interval_ends_where_the_profile_meets_the_bar():
    curve = gradients.Curve(*_draw(np.random.default_rng(6)))
    found, (loss, theta) = gradients.fit_curve(curve), curve.found
    for name, index in (("midpoint", 1), ("width", 3)):
        for side, end in zip((-1, 1), found.intervals[name], strict=True):
            at = (end - curve.start) / curve.span if name == "midpoint" else np.log(end / curve.span)
            inner, outer = (
                2 * (curve.best(theta, {index: at + side * step})[0] - loss) for step in (-3e-3, 3e-3)
            )
            assert inner < gradients.CRITICAL < outer


def test_turning_the_cosine_turns_the_curve():
    cosine, hits, total = _draw(np.random.default_rng(3))
    up, down = gradients.fit(cosine, hits, total), gradients.fit(-cosine, hits, total)
    assert up.near > up.far and down.near < down.far
    assert down.midpoint == pytest.approx(-up.midpoint, abs=1e-3)
    assert down.width == pytest.approx(up.width, rel=1e-2)
    scaled = gradients.fit(3 * cosine + 1, hits, total, with_intervals=False)
    assert scaled.width == pytest.approx(3 * up.width, rel=1e-2)


def test_where_there_is_no_curve_the_reason_is_told():
    cosine = np.linspace(0, 1, 20)
    assert "at least 12" in gradients.fit(cosine[:5], [1] * 5, [9] * 5)
    assert "misses" in gradients.fit(cosine, [9] * 20, [9] * 20)
    assert "the same" in gradients.fit([0.3] * 20, list(range(20)), [20] * 20)
    flat = gradients.fit(cosine, [5, 4] * 10, [10] * 20)
    assert None in [side for ends in flat.intervals.values() for side in ends], "no gradient, no bound"
    for bad in (([np.nan, 1.0], [1, 1], [2, 2]), ([0.1, 0.2], [3, 1], [2, 2]), ([0.1], [0, 0], [1, 1])):
        with pytest.raises(ValueError, match="gradient"):
            gradients.Curve(*bad)


def test_equal_widths_are_not_told_apart_and_unequal_ones_are():
    rng = np.random.default_rng(4)
    same = [gradients.Curve(*_draw(rng, mid=mid, near=near)) for mid, near in ((0.4, 0.9), (0.6, 0.8))]
    found = gradients.width_test(same)
    assert found["degrees"] == 1 and found["p"] > 0.01
    assert found["common_width"] == pytest.approx(0.5, abs=0.2)
    unlike = [gradients.Curve(*_draw(rng, width=width)) for width in (0.15, 0.9)]
    assert gradients.width_test(unlike)["p"] < 1e-3
    with pytest.raises(ValueError, match="two sources"):
        gradients.width_test(same[:1])


def test_isotonic_follows_the_data_both_ways():
    cosine, hits, total = _draw(np.random.default_rng(5))
    x, fitted = gradients.isotonic(cosine, hits / total, total)
    assert (np.diff(x) >= 0).all() and (np.diff(fitted) >= 0).all()
    _, falling = gradients.isotonic(-cosine, hits / total, total)
    assert np.allclose(np.sort(falling), np.sort(fitted))
