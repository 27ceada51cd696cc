"""Spearman's and Pearson's correlation of many columns with one, their p by the t distribution, and values ranked or
centered within blocks. Demands finite arrays; leaves resampling to `resample`."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtr

from leakfast.stats.ranking import average_ranks, ranks_within


def spearman_and_pearson(x, y) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Correlations of every column of x with y, and their two-sided p by the t distribution.

    x (n, K), y (n,) float64, finite. Returns (spearman, spearman_p, pearson, pearson_p), each (K,),
    NaN where a side does not vary. Equal to `scipy.stats.spearmanr` and `pearsonr` per column; ties
    get average ranks. Raises ValueError for fewer than 3 rows, or values that are not finite.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x must be (n, K) and y (n,), got {x.shape} and {y.shape}")
    if len(y) < 3:
        raise ValueError(f"a correlation needs at least 3 pairs, got {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a correlation needs finite values")
    # columns of ranks lie whole in memory, so that a sum over one is made in the same order whatever stands beside it
    spearman = np.clip(unit(average_ranks(x.T).T).T @ unit(average_ranks(y[None]).T)[:, 0], -1, 1)
    pearson = np.clip(unit(x).T @ unit(y[:, None])[:, 0], -1, 1)
    return spearman, p_by_t(spearman, len(y)), pearson, p_by_t(pearson, len(y))


def p_by_t(r, n: int) -> np.ndarray:
    """Two-sided p of a correlation r over n pairs: t = r·sqrt((n−2)/(1−r²)) with n−2 degrees of freedom.

    Exact for Pearson under a bivariate normal, an approximation for Spearman. At r = ±1 the formula gives 0, which no
    sample can show: it is then 2/n!, the smallest p of a permutation test of n pairs."""
    r = np.asarray(r, dtype=np.float64)
    least = 2 / math.gamma(n + 1) if n <= 170 else np.finfo(np.float64).tiny
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(r) * np.sqrt((n - 2) / ((1 + r) * (1 - r)))
    return np.where(np.abs(r) > 1 - 1e-12, least, 2 * stdtr(n - 2, -t))


def within(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Ranks of each column of values (n, K) among the rows of its own block, (rank − ½) / rows of the block: 0–1.

    block: (n,) codes, a source's bystanders each. Equal values share a rank."""
    out = np.empty_like(values)
    rank, size = ranks_within(values.T, block)
    out[...] = ((rank - 0.5) / size).T
    return out


def centered_within(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Each column of values (n, K) less its mean over the rows of its own block."""
    out = np.empty_like(values)
    for one in np.unique(block):
        mine = block == one
        out[mine] = values[mine] - values[mine].mean(axis=0)
    return out


def unit(columns: np.ndarray) -> np.ndarray:
    """Each column centered and of length 1; NaN for a column that does not vary."""
    low, spread = columns.min(axis=0), np.ptp(columns, axis=0)
    with np.errstate(invalid="ignore"):
        scaled = (columns - low) / spread  # 0/0 is NaN: what does not vary has no correlation
    scaled -= scaled.mean(axis=0)
    return scaled / np.linalg.norm(scaled, axis=0)
