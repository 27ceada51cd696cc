"""A logistic curve between two known ends, fitted again in every resample of personas: loops that numba compiles. Demands
float64 arrays; knows nothing of tables."""

from __future__ import annotations

import numpy as np

from leakfast.counters import compiled
from leakfast.stats.compiled import below, stream

_STEPS = 60  # of Fisher scoring, at most
_HALVINGS = 30
_SMALL = 1e-12


@compiled
def _likelihood(s, y, weight, ends, alpha, beta):
    """Σ weight · (y log p + (1 − y) log(1 − p)), p = floor + (ceiling − floor) / (1 + exp(−(alpha + beta s)))."""
    total = 0.0
    for i in range(len(s)):
        if weight[i] > 0.0:
            p = ends[0] + (ends[1] - ends[0]) / (1.0 + np.exp(-(alpha + beta * s[i])))
            p = min(max(p, _SMALL), 1.0 - _SMALL)
            total += weight[i] * (y[i] * np.log(p) + (1.0 - y[i]) * np.log(1.0 - p))
    return total


@compiled
def fit(s, y, weight, ends):
    """(alpha, beta) of the curve of y (0–1) on s, standardised s best, by Fisher scoring with halved steps; from beta 0.

    Quasi-likelihood: the binomial's, of shares, whatever their variance."""
    floor, ceiling = ends[0], ends[1]
    mass, mean = 0.0, 0.0
    for i in range(len(s)):
        mass += weight[i]
        mean += weight[i] * y[i]
    start = min(max((mean / mass - floor) / (ceiling - floor), 0.01), 0.99)
    alpha, beta = np.log(start / (1.0 - start)), 0.0
    here = _likelihood(s, y, weight, ends, alpha, beta)
    for _ in range(_STEPS):
        u0, u1, i00, i01, i11 = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(len(s)):
            if weight[i] > 0.0:
                q = 1.0 / (1.0 + np.exp(-(alpha + beta * s[i])))
                p = min(max(floor + (ceiling - floor) * q, _SMALL), 1.0 - _SMALL)
                slope = (ceiling - floor) * q * (1.0 - q)
                pull = weight[i] * slope / (p * (1.0 - p))
                u0 += pull * (y[i] - p)
                u1 += pull * (y[i] - p) * s[i]
                i00 += pull * slope
                i01 += pull * slope * s[i]
                i11 += pull * slope * s[i] * s[i]
        i00, i11 = i00 + 1e-9, i11 + 1e-9
        det = i00 * i11 - i01 * i01
        if det <= 0.0:
            break
        by_alpha, by_beta = (i11 * u0 - i01 * u1) / det, (i00 * u1 - i01 * u0) / det
        size, there = 1.0, here
        for _ in range(_HALVINGS):
            there = _likelihood(s, y, weight, ends, alpha + size * by_alpha, beta + size * by_beta)
            if there >= here:
                break
            size *= 0.5
        if there < here:
            break
        alpha, beta = alpha + size * by_alpha, beta + size * by_beta
        gained, here = there - here, there
        if gained < 1e-10 * mass or abs(beta) > 1e3:
            break
    return alpha, beta


@compiled
def midpoint(s, y, weight, ends):
    """The s at which the rising curve is half way between its ends: −inf where a curve that does not rise is above that,
    inf where it is below."""
    alpha, beta = fit(s, y, weight, ends)
    if beta > 1e-9:
        return -alpha / beta
    mass, mean = 0.0, 0.0
    for i in range(len(s)):
        mass += weight[i]
        mean += weight[i] * y[i]
    return -np.inf if mean / mass > 0.5 * (ends[0] + ends[1]) else np.inf


@compiled
def resampled(s, y, totals, ends, source, seed, first, out):
    """Fills out (count, 2): the midpoint, and the share of the personas drawn that lie at or beyond it, of each resample of
    rows with replacement. totals: the weight of each row; source: (hits, replies), of which as many are drawn again for the
    ceiling; inf where that is not above the floor."""
    n = len(s)
    both = ends.copy()
    weight = np.empty(n)
    for k in range(out.shape[0]):
        start = stream(seed, first + k)
        weight[:] = 0.0
        for place in range(n):
            weight[below(start, place, n)] += 1.0
        right = 0
        for place in range(source[1]):
            right += below(start, n + place, source[1]) < source[0]
        both[1] = right / source[1]
        inside = 0.0
        times = weight.copy()
        for i in range(n):
            weight[i] *= totals[i]
        at = midpoint(s, y, weight, both) if both[1] > both[0] else np.inf
        for i in range(n):
            if s[i] >= at:
                inside += times[i]
        out[k, 0] = at
        out[k, 1] = inside / n
