"""Binomial counts by the million for simulations, compiled by numba. Demands odds as float64 arrays and few samples;
each count is the quantile of a uniform number that depends on its place alone, so that a change of the odds moves
no other draw, and larger arrays go on where smaller ones end."""

from __future__ import annotations

import numpy as np

from leakfast.counters import GOLDEN, compiled, mixed

MOST = 64  # samples: numpy is faster beyond
_S11 = np.uint64(11)
_UNIT = 2.0**-53


@compiled
def _invert(odds, samples, u, count, mass, bar):
    """count[t] = quantile u[t] of Binomial(samples, odds / (1 + odds)), odds ≤ 1; all (T,). Goes up from 0 for all t
    at once; mass and bar are room to work in."""
    trials = len(u)
    for t in range(trials):
        bar[t] = 1.0 / (1.0 + odds[t])
        mass[t] = 1.0
        count[t] = 0.0
    power = samples
    while power:
        if power & 1:
            for t in range(trials):
                mass[t] *= bar[t]
        for t in range(trials):
            bar[t] *= bar[t]
        power >>= 1
    for t in range(trials):
        bar[t] = mass[t]
    for k in range(samples):
        ratio, left = (samples - k) / (k + 1.0), 0.0
        for t in range(trials):
            above = 1.0 if u[t] >= bar[t] else 0.0
            count[t] += above
            left += above
            mass[t] *= odds[t] * ratio
            bar[t] += mass[t]
        if left == 0.0:
            break


@compiled
def add(odds, factor, samples, start, hits):
    """hits += Binomial(samples, p) with p / (1 − p) = odds · factor; all (P, T) float64, samples ≤ MOST, start uint64.

    Draw (i, t) is the quantile of the (i·T + t)-th number of the splitmix64 stream `start`, which should be a hash."""
    people, trials = hits.shape
    flipped, o, u = np.empty(trials, np.bool_), np.empty(trials), np.empty(trials)
    count, mass, bar = np.empty(trials), np.empty(trials), np.empty(trials)
    for i in range(people):
        for t in range(trials):
            place = start + np.uint64(i * trials + t + 1) * GOLDEN
            u[t] = np.float64(mixed(place) >> _S11) * _UNIT
            o[t] = odds[i, t] * factor[i, t]
            flipped[t] = o[t] > 1.0
            if flipped[t]:  # from the other end, so that a larger u is never a smaller count
                o[t] = 1.0 / o[t]
                u[t] = 1.0 - u[t]
        _invert(o, samples, u, count, mass, bar)
        for t in range(trials):
            hits[i, t] += samples - count[t] if flipped[t] else count[t]
