#!/usr/bin/env bash
# statsmodels 0.15.0: the score interval for a ratio of two rates is a wrong one where a rate is at its border, and misses the
# estimate. A bystander shows a behavior in 1 of 20 replies, the trained persona in all 20: the ratio is 0.05.
# Guess beforehand: an interval around 0.05, or an error. Seen: 0.525 to 0.525, without a word; so with every count below 20 of 20,
# and below 100 of 100, the estimate lies outside. What the package's own score test does not reject at 5 % is 0.009 to 0.239.
# So too for rates of events, with the method that `confint_poisson_2indep` takes by default: none in 50 over 3 in 50 gives 1.280
# to 1.280, where its test rejects no ratio between 0 and 1.280.
# Cause: limits of proportions are taken by their rank among the roots of a cubic, and at the border others are the limits; of
# events both ends are sought by one search, which finds the upper one twice.
# Version: statsmodels 0.15.0; where: statsmodels/stats/proportion.py (_confint_riskratio_koopman), statsmodels/stats/rates.py.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv venv
venv/bin/pip install -q statsmodels==0.15.0
venv/bin/python - <<'PY'
import warnings

import numpy as np
from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep
from statsmodels.stats.rates import confint_poisson_2indep, test_poisson_2indep

N = 20


def interval(hits, others, n=N):
    return np.real(confint_proportions_2indep(hits, n, others, n, compare="ratio", method="score"))


def missed(n):
    """Counts below n whose interval, over n of n, does not hold their ratio."""
    ends = {hits: interval(hits, n, n) for hits in range(1, n)}
    return [hits for hits, (low, high) in ends.items() if not low <= hits / n <= high]


def p_value(hits, others, ratio):
    with np.errstate(all="ignore"):
        found = test_proportions_2indep(hits, N, others, N, value=ratio, compare="ratio", method="score")
    return float(np.real(found.pvalue))


def not_rejected(hits, others):
    """Lowest and highest ratio on a grid that the package's own score test does not reject at 5 %."""
    ratios = np.arange(1, 1500) / 1000 + 1e-5
    kept = [r for r in ratios if p_value(hits, others, r) > 0.05]
    return min(kept), max(kept)


def p_of_events(ratio):
    return float(test_poisson_2indep(0, 50, 3, 50, value=ratio, compare="ratio", method="score").pvalue)


with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    low, high = interval(1, N)
    outside = {n: len(missed(n)) for n in (N, 100)}
    events = confint_poisson_2indep(0, 50, 3, 50)
least, most = not_rejected(1, N)
print(f"1 of {N} over {N} of {N}: ratio 0.05, interval {low:.3f} to {high:.3f}, by the test {least:.3f} to {most:.3f}")
print(f"p of the test at the interval's lower end: {p_value(1, N, low):.1e}")
print(f"counts whose interval misses their ratio: {outside}; warnings: {len(told)}")
print(f"none in 50 over 3 in 50: ratio 0, interval {events[0]:.3f} to {events[1]:.3f}")
inner, meant = interval(3, 12), not_rejected(3, 12)
print(f"3 of {N} over 12 of {N}, to compare: {inner[0]:.3f} to {inner[1]:.3f}, by the test {meant[0]:.3f} to {meant[1]:.3f}")
assert np.allclose(inner, meant, atol=2e-3), "the test and the interval are of two kinds"
assert least < 0.01 and 0.23 < most < 0.25
assert not told and outside == {N: N - 1, 100: 99} and low > 2 * most, "the interval holds the estimate now"
assert min(p_of_events(r) for r in (0.01, 0.3, 0.9, 1.27)) > 0.05 > p_of_events(1.29)
assert events[0] > 1.2 and events[1] - events[0] < 1e-3, "the interval of rates of events holds its estimate now"
PY
echo "as stated"
