#!/usr/bin/env bash
# polars_statistics 0.8.0: `eb_shrink` pulls personas' noisy rates towards their mean, "matching" metafor's rma() and blup().
# Rates, mean and variance between personas are theirs; the standard error of a rate is not, unless that variance is exactly zero.
# Guess beforehand: a shrunken rate is known hardly better than the mean to which it is shrunken. Seen: the less personas differ,
# the smaller the standard error, down to nothing; where they do not differ at all, it is that of the mean.
#   eight personas, standard error of their mean 0.029; of a shrunken rate, variance between personas 0.0001: 0.010 (0.031 is
#   right), 0.000001: 0.001 (0.029), 0: 0.029
# With the variance as estimated, where that is between 0 and 0.001: 71 % of the rates lie within 1.96 standard errors of theirs,
# 95 % within 1.96 of the right ones.
# Cause: the mean's own variance, times (1 - weight)², is left out; variance zero is a case of its own.
# Versions: polars_statistics 0.8.0, polars 2.1.0.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q --no-compile polars_statistics==0.8.0 polars==2.1.0 numpy==2.4.6
venv/bin/python - <<'PY'
import warnings

import numpy as np
import polars as pl
import polars_statistics as ps

warnings.simplefilter("error")
rng = np.random.default_rng(0)
PERSONAS, MEAN, SPREAD = 8, 0.3, 0.02


def shrunken(rates, errors, between=None):
    """Shrunken rates and their standard errors, weights, the mean's standard error and the variance between personas."""
    found = pl.DataFrame({"rate": rates, "error": errors}).select(
        ps.eb_shrink("rate", "error", tau_squared=between).alias("eb")
    ).unnest("eb")
    return [found[name].to_numpy() for name in ("shrunken", "shrunken_se", "weight", "mu_se", "tau_squared")]


def by_hand(rates, errors, between):
    """Best linear unbiased predictions and their standard errors, given the variance between personas."""
    precision = 1 / (between + np.square(errors))
    mean, weight = precision @ rates / precision.sum(), between * precision
    variance = weight * np.square(errors) + np.square(1 - weight) / precision.sum()
    return weight * rates + (1 - weight) * mean, np.sqrt(variance)


def drawn():
    errors = rng.uniform(0.05, 0.15, PERSONAS)
    truth = MEAN + SPREAD * rng.normal(size=PERSONAS)
    return truth, truth + errors * rng.normal(size=PERSONAS), errors


truth, rates, errors = drawn()
for between in (0.01, 1e-3, 1e-4, 1e-6, 0.0):
    (estimate, error, weight, mean_error, _), (meant, right) = shrunken(rates, errors, between), by_hand(rates, errors, between)
    print(f"variance between personas {between:g}: standard error of the mean {mean_error[0]:.4f}, of the first persona's rate "
          f"{error[0]:.4f}, right {right[0]:.4f}")
    assert np.allclose(estimate, meant)
    if between:
        assert np.allclose(error, np.sqrt(weight) * errors), "the standard error has changed"
        assert not np.allclose(error, right, rtol=0.03), "the mean's uncertainty is in it now"
    else:
        assert np.allclose(error, right)

held = np.zeros((2, 2))
counted = np.zeros(2)
for _ in range(2000):
    truth, rates, errors = drawn()
    estimate, error, _, _, between = shrunken(rates, errors)
    if between[0] > 0:
        meant, right = by_hand(rates, errors, between[0])
        assert np.allclose(estimate, meant)
        few = int(between[0] < 1e-3)
        counted[few] += PERSONAS
        held[few] += [(np.abs(estimate - truth) <= 1.96 * width).sum() for width in (error, right)]
for few, which in enumerate(("above", "below")):
    found, right = held[few] / counted[few]
    print(f"variance {which} 0.001, {counted[few] / PERSONAS:.0f} data sets: "
          f"intervals hold {found:.3f} of the rates, by hand {right:.3f}")
assert right > 0.9 and found < 0.8, "intervals hold the rates now"
PY
echo "as stated"
