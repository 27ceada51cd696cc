"""Spearman's ρ of many columns over many subsets of the same rows, ranked anew in each. Demands finite arrays whose rows
stand block by block; draws nothing: who is in a subset is told.

Columns are sorted once. In a subset a walk along that order gives twice a row's average rank, which is whole, and ranks of
several blocks are put in one order by counting, as fractions of whole numbers: no sum or comparison is ever rounded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from leakfast.counters import compiled
from leakfast.stats.resample import threads


@compiled
def _keys(
    order: np.ndarray,
    begins: np.ndarray,
    starts: np.ndarray,
    member: np.ndarray,
    key: np.ndarray,
    size: np.ndarray,
) -> None:
    """Fills key (n,): rows of the own block below, twice, and those equal; size (B,): members of each block."""
    for b in range(len(size)):
        below, at, stop = 0, starts[b], starts[b + 1]
        while at < stop:
            end, equal = at, 0
            while end < stop and (end == at or not begins[end]):
                equal += member[order[end]]
                end += 1
            for k in range(at, end):
                key[order[k]] = 2 * below + equal
            below += equal
            at = end
        size[b] = below


@compiled
def _ranks(
    key: np.ndarray,
    block: np.ndarray,
    rows: np.ndarray,
    size: np.ndarray,
    counts: np.ndarray,
    rank: np.ndarray,
) -> None:
    """Twice the centered ranks of the rows (N,): of one block by key, of several by key / size of the block."""
    n = len(rows)
    for i in range(n):
        rank[i] = key[rows[i]] - n
    if size.max() == n:
        return
    kinds = np.unique(size)
    for c in range(len(kinds)):
        counts[c, : 2 * kinds[c] + 1] = 0
    for i in range(n):
        counts[np.searchsorted(kinds, size[block[rows[i]]]), key[rows[i]]] += 1
    for c in range(len(kinds)):
        for v in range(1, 2 * kinds[c] + 1):
            counts[c, v] += counts[c, v - 1]
    for i in range(n):
        own, of = key[rows[i]], size[block[rows[i]]]
        total = 0
        for c in range(len(kinds)):
            if kinds[c] == 0:
                continue
            even = own * kinds[c]
            v = even // of
            up_to = counts[c, v]
            total += up_to + (counts[c, v - 1] if v * of == even else up_to)
        rank[i] = total - n


@compiled
def _part(
    orders: np.ndarray,
    begins: np.ndarray,
    starts: np.ndarray,
    block: np.ndarray,
    member: np.ndarray,
    out: np.ndarray,
) -> None:
    """The last columns, as many as out (M, Y, K) has y, against all others, for each row of member (M, n)."""
    n, several, columns = len(block), out.shape[1], out.shape[2]
    key, size = np.zeros(n, np.int64), np.zeros(len(starts) - 1, np.int64)
    counts = np.zeros((len(starts), 2 * n + 1), np.int64)
    length = np.empty(several)
    for m in range(len(member)):
        rows = np.nonzero(member[m])[0]
        a, b = np.empty(len(rows)), np.empty((several, len(rows)))
        for y in range(several):
            _keys(orders[columns + y], begins[columns + y], starts, member[m], key, size)
            _ranks(key, block, rows, size, counts, b[y])
            length[y] = (b[y] * b[y]).sum()
        for k in range(columns):
            _keys(orders[k], begins[k], starts, member[m], key, size)
            _ranks(key, block, rows, size, counts, a)
            own = (a * a).sum()
            for y in range(several):
                whole = np.sqrt(own * length[y])
                out[m, y, k] = max(-1.0, min(1.0, (a * b[y]).sum() / whole)) if whole > 0 else np.nan


def spearman_of_subsets(
    x: np.ndarray,
    y: np.ndarray,
    member: np.ndarray,
    block: np.ndarray | None = None,
    workers: int | None = None,
) -> np.ndarray:
    """(M, K) float64: ρ of each row of x (K, n) with y (n,) over the rows that member (M, n) Boolean names; (M, Y, K) of
    several y (Y, n), for which the columns of x are ranked once.

    block: (n,) codes in ascending order; where a subset has several blocks, ranks are taken within each first, as
    `association.within` does. Equal to `scipy.stats.spearmanr` of each subset, NaN where a side does not vary; the same bits
    for any number of workers. Raises ValueError for shapes that do not fit, values that are not finite, blocks out of order."""
    both = np.vstack([np.atleast_2d(x), y]).astype(np.float64)
    n = both.shape[1]
    block = np.zeros(n, np.int64) if block is None else np.asarray(block, np.int64)
    member = np.ascontiguousarray(member, dtype=np.bool_)
    if member.shape[1:] != (n,) or block.shape != (n,):
        raise ValueError(f"x and y {both.shape}, member {member.shape} and block {block.shape} do not fit")
    if not np.isfinite(both).all():
        raise ValueError("ranks need finite values")
    if (np.diff(block) < 0).any():
        raise ValueError("rows of a block must stand together, blocks in ascending order")
    block = np.unique(block, return_inverse=True)[1].astype(np.int64)
    starts = np.searchsorted(block, np.arange(int(block.max(initial=-1)) + 2))
    orders = np.array([np.lexsort((values, block)) for values in both], np.int64)
    value = np.take_along_axis(both, orders, 1)
    begins = np.ones(both.shape, np.bool_)
    begins[:, 1:] = value[:, 1:] != value[:, :-1]
    several = len(np.atleast_2d(y))
    out = np.empty((len(member), several, len(both) - several))
    count = max(1, min(threads(workers), len(member)))
    with ThreadPoolExecutor(count) as pool:
        parts = zip(np.array_split(member, count), np.array_split(out, count), strict=True)
        for done in [pool.submit(_part, orders, begins, starts, block, rows, into) for rows, into in parts]:
            done.result()
    return out[:, 0] if np.ndim(y) == 1 else out
