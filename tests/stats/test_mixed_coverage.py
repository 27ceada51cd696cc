"""Simulations of the logistic mixed model: bias and coverage of the 95 % intervals of coefficients and of each source's
slope, 1,000 trials a world. Slow tier."""

from __future__ import annotations

import numpy as np
import pytest
from mixed_worlds import world

from leakfast.stats.logistic_mixed import fit, interval, slope_df

pytestmark = [pytest.mark.long, pytest.mark.slow]
TRIALS = 1000
WORLDS = {
    "five sources": {},
    "five sources, few hits": {"drawn": 3, "beta": (-4.0, 2.0, 0.3, 0.0)},
    "five sources, 30 items": {"asked": 30, "drawn": 1, "beta": (0.5, 2.0, 0.3, 0.0)},
    "one source": {"sources": 1},
}


@pytest.mark.parametrize("name", WORLDS)
def test_intervals_hold_what_they_should(name):
    rng, inside, off = np.random.default_rng(7), [], []
    for _ in range(TRIALS):
        counts, beta, slope = world(rng, **WORLDS[name])
        found = fit(counts)
        low, high = interval(found.beta, found.beta_se, found.beta_df)
        own = interval(found.slope, found.slope_se, slope_df(counts, found))
        slopes = np.mean((own[0] <= slope) & (slope <= own[1]))
        inside.append([*((low <= beta) & (beta <= high)), slopes])
        off.append([found.beta[1] - slope.mean(), found.beta[2] - beta[2]])
    share, bias = np.mean(inside, axis=0), np.mean(off, axis=0)
    print(name, "intercept, cosine, term, term, slopes:", share.round(3), "bias:", bias.round(3))
    assert (share[2:] >= 0.92).all() and (share[2:] <= 0.97).all()
    if name != "one source":  # whose coefficients are its own, not a mean over sources
        assert (share[:2] >= 0.93).all()
    assert np.abs(bias[0]) < 0.06 and np.abs(bias[1]) < 0.03
