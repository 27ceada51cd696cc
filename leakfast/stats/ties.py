"""Differences that keep exact ties: changes of rates as correctly rounded fractions of counts, and values that differ
by less than floats can tell made one. Demands counts below 2²⁶ a cell; leaves ranking to `resample` and scipy.

hits/total − hits₀/total₀ as a difference of two floats has up to 2 units of rounding in it, so that 3/10 − 1/10 and
7/10 − 5/10 get different ranks. The same change as one division of whole numbers,
(hits·total₀ − hits₀·total) / (total·total₀), is the float nearest to the exact fraction: equal changes are equal."""

from __future__ import annotations

import numpy as np
import polars as pl

_WHOLE = float(2**53)  # whole numbers below are exact in float64
UNITS = 8  # in the last place of the largest value around: closer than this is the same value


def difference(hits, total, base_hits, base_total) -> np.ndarray:
    """hits/total − base_hits/base_total, each the float64 nearest to the exact fraction; NaN for a total of 0.

    Integer (or whole float64, NaN where not known) arrays that broadcast. Raises ValueError for counts whose products
    float64 does not hold exactly (totals beyond 2²⁶ each)."""
    h, n, h0, n0 = (np.asarray(v, dtype=np.float64) for v in (hits, total, base_hits, base_total))
    over, under = h * n0 - h0 * n, n * n0
    for part in (h * n0, h0 * n, under):
        if np.any(np.abs(part) > _WHOLE):
            raise ValueError(
                "difference: the counts are too large for an exact difference; totals below 2²⁶ are needed"
            )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(under > 0, over / under, np.nan)


def merged(values, scale) -> np.ndarray:
    """`values` (n,) float64 with those that differ by rounding alone made equal: sorted, a value no further than
    UNITS · eps · scale above the one before it is taken for it. NaN stays.

    scale: the largest magnitude that went into the values (a difference of means is rounded as these are). It is a
    tolerance, for values without counts (judged means, stored shares); counts have `difference`."""
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    if known.sum() < 2:
        return values.copy()
    order = np.argsort(values[known], kind="stable")
    ascending = values[known][order]
    begins = np.ones(len(ascending), dtype=bool)
    begins[1:] = np.diff(ascending) > UNITS * np.finfo(np.float64).eps * float(scale)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(ascending)), 0))
    settled, out = np.empty(len(ascending)), values.copy()
    settled[order] = ascending[first]
    out[known] = settled
    return out


def floats(series: pl.Series) -> np.ndarray:
    """A column of numbers as float64, NaN where it is null."""
    return series.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def deltas(frame: pl.DataFrame, base: tuple[str, str, str], key: list[str]) -> pl.Series:
    """rate − baseline of every row of a table with hits, total and rate: `difference` where both were counted, else
    of the rates, ties `merged` within each group of `key`. base: the columns of the other side's hits, total and
    rate. Float64, null where one of them is."""
    names = ("hits", "total", *base[:2])
    out = difference(*(floats(frame[name]) for name in names))
    rate, other = (floats(frame[name]) for name in ("rate", base[2]))
    stated = np.isnan(out) & np.isfinite(rate) & np.isfinite(other)
    if stated.any():
        groups = frame.select(pl.struct(key).rank("dense")).to_series().fill_null(0).to_numpy()
        for group in np.unique(groups[stated]):
            mine = stated & (groups == group)
            scale = max(np.abs(rate[mine]).max(), np.abs(other[mine]).max())
            out[mine] = merged(rate[mine] - other[mine], scale)
    return pl.Series("delta", out).fill_nan(None)
