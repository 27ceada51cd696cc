"""Intervals, combinations and designs in closed form: rates over questions, differences, ρ on Fisher's z
scale, many tests at once. Demands counts or estimates; draws nothing at random."""

from __future__ import annotations

from functools import cache

import numpy as np
import polars as pl
import scipy  # loads its parts when they are used
from scipy.special import ndtr, ndtri, stdtrit

CONFIDENCE = 0.95
TOO_FEW_DRAWS = 0.05  # share of resamples without a value from which an interval is not given


def question_icc(hits, total, persona) -> float | None:
    """How alike two samples of one question are, beyond what the persona's rate explains (0 to 1).

    hits, total: (G,) integer counts of one question of one persona each; persona: (G,) codes. The
    analysis-of-variance estimator of the intraclass correlation of a beta-binomial (Donner 1986), sums of
    squares pooled over personas, so it assumes one correlation for all of them; below 0 it is 0.
    None where no question has two samples or no persona two questions."""
    hits, total = np.asarray(hits, np.float64), np.asarray(total, np.float64)
    some = total > 0
    hits, total, persona = hits[some], total[some], np.asarray(persona)[some]
    if not len(hits):
        return None
    _, code = np.unique(persona, return_inverse=True)
    people = code.max() + 1
    drawn, asked = np.bincount(code, total), np.bincount(code)
    mean = np.bincount(code, hits) / drawn
    rate = hits / total
    between = np.bincount(code, total * (rate - mean[code]) ** 2).sum()
    within = (total * rate * (1 - rate)).sum()
    free_between, free_within = (asked - 1).sum(), (total - 1).sum()
    if free_between <= 0 or free_within <= 0:
        return None
    size = (drawn - np.bincount(code, total**2, people) / drawn).sum() / free_between
    ms_between, ms_within = between / free_between, within / free_within
    bottom = ms_between + (size - 1) * ms_within
    return float(max(0.0, (ms_between - ms_within) / bottom)) if bottom > 0 else 0.0


def effective_total(total, squares, icc: float) -> np.ndarray:
    """Independent samples worth the same as `total` samples in questions whose totals' squares sum to
    `squares`: total / (1 + (squares/total − 1)·icc)."""
    total, squares = np.asarray(total, np.float64), np.asarray(squares, np.float64)
    return total / (1 + (squares / total - 1) * icc)


def wilson_share(share, total, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval for shares over `total` independent samples, which need not be whole numbers."""
    p, n = np.asarray(share, np.float64), np.asarray(total, np.float64)
    z = float(ndtri(0.5 + confidence / 2))
    center, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = np.where(p <= 0, 0.0, np.clip((center - half) / scale, 0, 1))
    return low, np.where(p >= 1, 1.0, np.clip((center + half) / scale, 0, 1))


def difference(a, a_low, a_high, b, b_low, b_high, r=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Interval of a − b from the intervals of two estimates whose errors correlate by r, none of them left out.

    Square-and-add (Newcombe 1998, method 10; with r, Zou and Donner 2008): with d = a − a_low and e = b_high − b,
    a − b − √(d² + e² − 2rde), and its mirror."""
    a, a_low, a_high, b, b_low, b_high, r = (
        np.asarray(v, np.float64) for v in (a, a_low, a_high, b, b_low, b_high, r)
    )

    def half(one, other):
        return np.sqrt(np.maximum(one * one + other * other - 2 * r * one * other, 0.0))

    return a - b - half(a - a_low, b_high - b), a - b + half(a_high - a, b - b_low)


def paired_r(one, other, group) -> float:
    """Correlation of two means over the same questions: of the questions' values one and other (G,), each less its mean
    within the group (G,) codes, over all groups together; 0 where a side does not vary."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    _, code = np.unique(np.asarray(group), return_inverse=True)
    count = np.bincount(code)
    x, y = (side - (np.bincount(code, side) / count)[code] for side in (one, other))
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip(x @ y / size, -1, 1)) if size > 0 else 0.0


def spearman_z_se(rho, n, controls: int = 0) -> np.ndarray:
    """Standard error of atanh(ρ): √((1 + ρ²/2) / (n − 3 − controls)) (Bonett and Wright 2000).

    Assumes n independent pairs, roughly bivariate normal after a monotone change of either side."""
    return np.sqrt((1 + np.asarray(rho, np.float64) ** 2 / 2) / (np.asarray(n) - 3 - controls))


def z_interval(rho, se, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """tanh(atanh(ρ) ± z·se)."""
    half, center = ndtri(0.5 + confidence / 2) * np.asarray(se), np.arctanh(rho)
    return np.tanh(center - half), np.tanh(center + half)


def bootstrap_z(rho, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(se of atanh(ρ), share of draws without a value) from bootstrap draws (R, K).

    se is NaN where it would mean nothing: more than 5 % of the draws have no value, ρ or a draw is ±1
    (atanh is infinite there), or the draws do not vary."""
    if len(draws) < 2:
        return np.full(draws.shape[1], np.nan), np.ones(draws.shape[1])
    gone = np.isnan(draws)
    lost, holes = gone.mean(axis=0), gone.any()
    at_edge = (np.abs(draws) >= 1 - 1e-12).any(axis=0) | (np.abs(np.asarray(rho)) >= 1 - 1e-12)
    z = np.arctanh(np.clip(draws, -1 + 1e-12, 1 - 1e-12))
    count = len(draws) - gone.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = z - (np.where(gone, 0.0, z) if holes else z).sum(axis=0) / count
        apart *= apart
        spread = np.sqrt((np.where(gone, 0.0, apart) if holes else apart).sum(axis=0) / (count - 1))
    bad = (lost > TOO_FEW_DRAWS) | at_edge | ~(spread > 0)
    return np.where(bad, np.nan, spread), lost


def t_half(se, df, confidence: float = CONFIDENCE):
    """Half the width of the t interval of a mean with standard error `se` and `df` degrees of freedom; arrays
    alike. NaN where df is below 1."""
    return stdtrit(df, 0.5 + confidence / 2) * se


def of_mean(values: np.ndarray) -> tuple[float, float | None, float | None, str | None]:
    """(mean, low, high, why there is no interval) of independent values (n,), n ≥ 1: the t interval of their mean."""
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, None, None, "one persona: no spread to judge by"
    half = float(t_half(values.std(ddof=1) / np.sqrt(n), n - 1))
    return mean, mean - half, mean + half, None


def of_mean_over(
    values: np.ndarray, persona: np.ndarray
) -> tuple[float, float | None, float | None, str | None]:
    """As `of_mean`, of values (n,) of which those of one persona (n,) go together: under several sources, say.

    se² = G/(G−1) · Σ_g (Σ_{i in g} (value_i − mean))² / n² over the G personas, with G − 1 degrees of freedom (the
    cluster-robust variance of a mean); of one value each, that of `of_mean`. Resampling unit: the persona."""
    mean, n = float(values.mean()), len(values)
    _, code = np.unique(persona, return_inverse=True)
    people = int(code.max()) + 1
    if people < 2:
        return mean, None, None, "one persona: no spread to judge by"
    apart = np.bincount(code, values - mean)
    half = float(t_half(np.sqrt(people / (people - 1) * (apart @ apart)) / n, people - 1))
    return mean, mean - half, mean + half, None


def columns(name: str, low: np.ndarray, high: np.ndarray) -> list[pl.Series]:
    """Columns `name`_low and `name`_high of an interval, null where it is NaN."""
    return [pl.Series(f"{name}_{end}", side).fill_nan(None) for end, side in (("low", low), ("high", high))]


def percentiles(draws: np.ndarray, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Equal-tailed percentile interval of each column of bootstrap draws (R, K), NaN draws left out.

    A column of NaN alone gives NaN."""
    tails = [0.5 - confidence / 2, 0.5 + confidence / 2]
    out = np.full((2, draws.shape[1]), np.nan)
    rows = np.ascontiguousarray(draws.T)
    whole = ~np.isnan(rows).any(axis=1)
    if whole.any() and len(draws):
        out[:, whole] = np.quantile(rows[whole], tails, axis=1)
    for k in np.nonzero(~whole)[0]:
        kept = rows[k][~np.isnan(rows[k])]
        if len(kept):
            out[:, k] = np.quantile(kept, tails)
    return out[0], out[1]


def of_spearman(drawn: np.ndarray) -> dict[str, float | int]:
    """Columns spearman_ci_low, spearman_ci_high and bootstraps from bootstrap draws (R, 1) of one ρ; none where
    too many draws have no value."""
    if np.isnan(drawn).mean() > TOO_FEW_DRAWS:
        return {}
    low, high = percentiles(drawn)
    return {"spearman_ci_low": float(low[0]), "spearman_ci_high": float(high[0]), "bootstraps": len(drawn)}


@cache
def detectable(n: int, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest ρ that a two-sided test at level alpha over n pairs finds with this power.

    Solves Φ((atanh ρ − z_{1−α/2}/√(n−3)) / se(ρ)) = power with the standard error above. None below
    n = 5 or where no ρ below 0.999 suffices."""
    if n < 5:
        return None
    bar = ndtri(1 - alpha / 2) / np.sqrt(n - 3)

    def short(rho: float) -> float:
        return float(ndtr((np.arctanh(rho) - bar) / spearman_z_se(rho, n))) - power

    return float(scipy.optimize.brentq(short, 0.0, 0.999, xtol=1e-14)) if short(0.999) > 0 else None


def benjamini_hochberg(p) -> np.ndarray:
    """Adjusted p-values of one family (Benjamini and Hochberg 1995); `scipy.stats.false_discovery_control`.

    Raises ValueError for values outside 0 to 1."""
    p = np.asarray(p, np.float64)
    return scipy.stats.false_discovery_control(p, method="bh") if len(p) else p
