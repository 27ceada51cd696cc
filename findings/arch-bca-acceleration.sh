#!/usr/bin/env bash
# arch 8.0.0: BCa intervals of several means from one function, of leakage and of accuracy over the same bystanders, say. Each
# interval depends on what else the function returns, and on its unit.
# Guess beforehand: at the same resamples, each is the interval of that mean alone. Seen: with accuracy beside it, leakage of 20
# skewed bystanders loses the correction for its skewness, which is what the method is for, and gets one of a fixed size instead.
#   mean leakage 0.127: alone 0.068 to 0.279; with accuracy beside it 0.064 to 0.259; the same with leakage in percent 0.056 to 0.233
# Methods "percentile", "bc" and "basic" give each mean its own interval.
# Cause: the acceleration takes one mean over the jackknife values of all numbers, where each has its own; what is far from it gets
# plus or minus 1 / (6 sqrt(n)), whatever its replies.
# Versions: arch 8.0.0, numpy 2.4.6; where: arch/bootstrap/base.py, _get_acceleration.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile arch==8.0.0 numpy==2.4.6
venv/bin/python - <<'PY'
import warnings

import numpy as np
from arch.bootstrap import IIDBootstrap
from scipy.stats import norm

PERSONAS, RESAMPLES = 20, 4000
rng = np.random.default_rng(0)
leakage = np.round(rng.exponential(0.15, PERSONAS) ** 1.5, 2).clip(0, 1)
accuracy = (0.9 + 0.03 * rng.normal(size=PERSONAS)).round(2)
data = np.column_stack([leakage, accuracy])


def intervals(function, method="bca"):
    return IIDBootstrap(data, seed=7).conf_int(function, reps=RESAMPLES, method=method).T


def by_hand():
    """BCa interval of mean leakage, from the same resamples."""
    means = IIDBootstrap(data, seed=7).apply(lambda rows: rows[:, 0].mean(), RESAMPLES).ravel()
    left_out = (leakage.sum() - leakage) / (PERSONAS - 1)
    apart = left_out.mean() - left_out
    acceleration = np.power(apart, 3).sum() / (6 * np.square(apart).sum() ** 1.5)
    bias = norm.ppf((means < leakage.mean()).mean())
    shifted = bias + norm.ppf([0.025, 0.975])
    return np.quantile(means, norm.cdf(bias + shifted / (1 - acceleration * shifted))), acceleration


with warnings.catch_warnings():
    warnings.simplefilter("error")
    right, acceleration = by_hand()
    alone = intervals(lambda rows: rows[:, 0].mean())[0]
    beside = intervals(lambda rows: rows.mean(axis=0))[0]
    percent = intervals(lambda rows: rows.mean(axis=0) * [100, 1])[0] / 100
    others = {
        method: (intervals(lambda rows: rows[:, 0].mean(), method)[0], intervals(lambda rows: rows.mean(axis=0), method)[0])
        for method in ("percentile", "bc", "basic")
    }
for name, (low, high) in {
    "by hand": right, "alone": alone, "with accuracy beside it": beside, "the same, leakage in percent": percent
}.items():
    print(f"mean leakage {leakage.mean():.3f}, {name}: {low:.3f} to {high:.3f}")
print(f"acceleration {acceleration:.3f}, 1 / (6 sqrt(n)) {1 / (6 * PERSONAS**0.5):.3f}")
for method, (one, two) in others.items():
    print(method, "alone", one.round(3).tolist(), "beside", two.round(3).tolist())
    assert np.allclose(one, two)
assert np.allclose(alone, right)
assert alone[1] - beside[1] > 0.01 and beside[1] - percent[1] > 0.01, "each number has its own acceleration now"
PY
echo "as stated"
