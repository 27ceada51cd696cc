"""Average ranks of many columns at once, among all rows or among those of the same block, and which columns are known in the
same rows. Demands float64 arrays; leaves correlations of ranks to `association`.

Ranks are whole or halves, so they are exact: equal to scipy.stats.rankdata's to the bit, which took a tenth of the
statistics of a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from leakfast.counters import compiled


@compiled
def _fill(values: np.ndarray, order: np.ndarray, rank: np.ndarray) -> None:
    """Average ranks of each row of values (K, n) whose ascending order is known."""
    n = values.shape[1]
    for k in range(values.shape[0]):
        at = 0
        while at < n:
            end, value = at + 1, values[k, order[k, at]]
            while end < n and values[k, order[k, end]] == value:
                end += 1
            for i in range(at, end):
                rank[k, order[k, i]] = 0.5 * (at + 1 + end)
            at = end


@compiled
def _fill_within(
    values: np.ndarray, order: np.ndarray, block: np.ndarray, blocks: int, rank: np.ndarray
) -> None:
    """The same among the rows of each row's own block, block (n,) codes below `blocks`."""
    n = values.shape[1]
    count, first = np.empty(blocks, np.int64), np.empty(blocks, np.int64)
    last = np.empty(blocks)
    for k in range(values.shape[0]):
        count[:] = 0
        for i in range(n):  # how many of the block stand before the first that is equal
            row = order[k, i]
            b, value = block[row], values[k, row]
            if count[b] == 0 or value != last[b]:
                first[b], last[b] = count[b], value
            count[b] += 1
            rank[k, row] = first[b]
        first[:] = -1
        for i in range(n - 1, -1, -1):  # and up to the last that is equal
            row = order[k, i]
            b, value = block[row], values[k, row]
            if first[b] < 0 or value != last[b]:
                first[b], last[b] = count[b], value
            count[b] -= 1
            rank[k, row] = 0.5 * (rank[k, row] + 1 + first[b])


def average_ranks(values: np.ndarray) -> np.ndarray:
    """(K, n) float64: ranks from 1 on along each row of values (K, n), equal ones their mean; a row with NaN is NaN.
    Equal to scipy.stats.rankdata(values, axis=1)."""
    values = np.ascontiguousarray(values, np.float64)
    rank = np.empty(values.shape)
    _fill(values, np.argsort(values, axis=1), rank)
    return _without_gaps(values, rank)


def ranks_within(values: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((K, n) float64, (n,)): `average_ranks` among the rows of the same block (n,), and how many those are. A block with
    NaN is not told apart: its whole row is NaN."""
    values = np.ascontiguousarray(values, np.float64)
    _, code, size = np.unique(block, return_inverse=True, return_counts=True)
    rank = np.empty(values.shape)
    _fill_within(values, np.argsort(values, axis=1), code.astype(np.int64), len(size), rank)
    return _without_gaps(values, rank), size[code]


def alike(usable: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows (n,) Boolean, columns) of each set of columns of usable (n, K) Boolean that are usable in the same rows."""
    if (
        usable.shape[1] and (usable == usable[:, :1]).all()
    ):  # as it mostly is, and np.unique would sort it all
        yield usable[:, 0], np.arange(usable.shape[1])
        return
    patterns, which = np.unique(usable, axis=1, return_inverse=True)
    for k in range(patterns.shape[1]):
        yield patterns[:, k], np.nonzero(which.ravel() == k)[0]


def _without_gaps(values: np.ndarray, rank: np.ndarray) -> np.ndarray:
    gaps = np.isnan(values).any(axis=1)
    if gaps.any():
        rank[gaps] = np.nan
    return rank
