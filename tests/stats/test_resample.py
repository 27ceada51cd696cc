"""Resampling of Spearman's ρ: every draw replayed against scipy, the same bits for any number of threads,
exact permutation counts, ties, constants, clusters."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast.stats import compiled, resample

_sizes = st.tuples(st.integers(4, 30), st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**63 - 1))


def _case(n: int, columns: int, levels: int, seed: int):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, (columns, n)) / levels
    x[0] = rng.normal(size=n)  # one column without ties
    return x, rng.integers(0, levels, n) / levels


def _weights(seed: int, first: int, person: np.ndarray) -> np.ndarray:
    out = np.empty((len(person), compiled.LANES))
    compiled.draw_weights(np.uint64(seed), first, int(person.max()) + 1, person, out)
    return out.astype(int)


def _rho(x, y) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return scipy.stats.spearmanr(x, y).statistic


@settings(max_examples=30, deadline=None)
@given(_sizes, st.booleans())
def test_each_bootstrap_value_is_scipys_of_that_resample(size, clustered):
    x, y = _case(*size)
    n, seed = size[0], size[3]
    person = np.arange(n) // 2 if clustered else np.arange(n)
    drawn = resample.bootstrap_spearman(x, y, 20, seed, person=person)
    weights = [_weights(seed, first, person) for first in (0, compiled.LANES)]
    for r in (0, 3, 15, 16, 19):
        times = weights[r // compiled.LANES][:, r % compiled.LANES]
        assert times.sum() >= 1 and (not clustered or n % 2 or times.sum() == n)
        rows = np.repeat(np.arange(n), times)
        for k in range(len(x)):
            told = _rho(x[k, rows], y[rows]) if len(rows) > 1 else float("nan")
            assert drawn[r, k] == pytest.approx(told, abs=1e-12, nan_ok=True)


def test_resampled_rows_are_drawn_uniformly():
    weights = np.concatenate(
        [_weights(7, at, np.arange(9)) for at in range(0, 8_000, compiled.LANES)], axis=1
    )
    assert (weights.sum(0) == 9).all()
    assert scipy.stats.chisquare(weights.sum(1)).pvalue > 1e-4
    counts = np.bincount(weights.ravel(), minlength=10)[:6]
    told = scipy.stats.binom.pmf(np.arange(6), 9, 1 / 9) * weights.size
    assert np.abs(counts - told).max() < 5 * np.sqrt(told.max())


def test_threads_change_no_bit():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, 110)), np.round(rng.normal(size=110), 1)
    one = resample.bootstrap_spearman(x, y, 5_000, 3, workers=1)
    p = resample.permute_spearman(x, y, 5_000, 3, workers=1)
    for workers in (2, 3, 7):
        assert np.array_equal(one, resample.bootstrap_spearman(x, y, 5_000, 3, workers=workers))
        again = resample.permute_spearman(x, y, 5_000, 3, workers=workers)
        assert np.array_equal(p.p, again.p) and np.array_equal(p.p_max, again.p_max)
    assert np.array_equal(one[:100], resample.bootstrap_spearman(x, y, 100, 3)), "fewer is a prefix of more"
    assert not np.array_equal(one, resample.bootstrap_spearman(x, y, 5_000, 4))


@settings(max_examples=30, deadline=None)
@given(_sizes, st.booleans())
def test_permutation_p_is_the_count_over_the_replayed_shuffles(size, two_blocks):
    x, y = _case(*size)
    n, seed = size[0], size[3]
    block = np.arange(n) % 2 if two_blocks else np.zeros(n, int)
    person = np.arange(n) // 2 if two_blocks else np.arange(n)
    found = resample.permute_spearman(
        x, y, 40, seed, person=person, block=block, family=np.zeros(len(x), int)
    )
    moved = y[resample.joint_permutations(seed, person, block, 40)]
    observed = np.array([abs(_rho(column, y)) for column in x])
    drawn = np.array([[abs(_rho(column, one)) for column in x] for one in moved])
    top = np.nanmax(np.where(np.isnan(drawn), -1, drawn), axis=1)
    for k in range(len(x)):
        if np.isnan(observed[k]):
            assert np.isnan(found.p[k]) and np.isnan(found.p_max[k])
            continue
        assert found.p[k] == (1 + (drawn[:, k] >= observed[k] - 1e-12).sum()) / 41
        assert found.p_max[k] == (1 + (top >= observed[k] - 1e-12).sum()) / 41
        assert found.p_max[k] >= found.p[k]


def test_the_largest_over_layers_is_paid_for():
    """Null data, 12 nearly independent layers: the best layer's own p is below 0.05 in about half of the
    trials, its family-wise p in about 5 %."""
    rng = np.random.default_rng(2)
    own, paid = 0, 0
    for trial in range(200):
        found = resample.permute_spearman(rng.normal(size=(12, 40)), rng.normal(size=40), 199, trial)
        own += found.p.min() <= 0.05
        paid += found.p_max.min() <= 0.05
    assert own > 60
    assert scipy.stats.binomtest(int(paid), 200, 0.05).pvalue > 1e-3


def test_families_are_apart():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 30)), rng.normal(size=30)
    both = resample.permute_spearman(x, y, 99, 1, family=np.array([0, 0, 0, 1, 1, 1]))
    first = resample.permute_spearman(x[:3], y, 99, 1)
    assert np.array_equal(both.p_max[:3], first.p_max)


@settings(max_examples=40, deadline=None)
@given(_sizes)
def test_kendall_is_scipys(size):
    x, y = _case(*size)
    for found, column in zip(resample.kendall_tau(x, y), x, strict=True):
        told = scipy.stats.kendalltau(column, y).statistic
        assert found == pytest.approx(told, abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(_sizes)
def test_ranks_are_scipys(size):
    x, _ = _case(*size)
    told = 2 * (scipy.stats.rankdata(x, axis=1) - (x.shape[1] + 1) / 2)
    assert np.array_equal(resample.ordered(x).rank, told)


def test_what_is_no_number_is_refused():
    good = np.arange(5.0)
    for bad in (np.nan, np.inf, -np.inf):
        broken = good.copy()
        broken[2] = bad
        for pair in ((broken, good), (good, broken)):
            for function in (resample.kendall_tau, lambda x, y: resample.bootstrap_spearman(x, y, 5, 0)):
                with pytest.raises(ValueError, match="finite"):
                    function(*pair)
    with pytest.raises(ValueError, match="stands twice"):
        resample.permute_spearman(good, good, 5, 0, person=np.zeros(5))
    with pytest.raises(ValueError, match="must be"):
        resample.kendall_tau(good, good[:3])


def test_a_constant_side_has_no_value():
    x = np.array([[1.0] * 6, list(range(6))])
    drawn = resample.bootstrap_spearman(x, np.arange(6.0), 50, 0)
    assert np.isnan(drawn[:, 0]).all() and np.isfinite(drawn[:, 1]).any()
    assert np.isnan(resample.permute_spearman(x, np.arange(6.0), 20, 0).p[0])


def test_columns_of_their_own_have_the_p_that_each_has_alone():
    rng = np.random.default_rng(12)
    xs, ys = rng.normal(size=(5, 30)), rng.integers(0, 4, size=(5, 30)).astype(float)
    ys[1] += xs[1]
    ys[3] = 2.0  # does not vary
    for workers in (1, 2):
        found = resample.permute_alone(xs, ys, 3_000, 7, workers=workers)
        told = [
            resample.permute_spearman(x, y, 3_000, 7, workers=1).p[0] for x, y in zip(xs, ys, strict=True)
        ]
        np.testing.assert_array_equal(found, told)
    assert np.isnan(found[3]) and found[1] < 0.05 < np.nanmax(found)
    with pytest.raises(ValueError, match="alike"):
        resample.permute_alone(xs, ys[:, :20], 10, 0)
