"""Permutation tests and bootstraps of Spearman's ρ, many columns at once. Demands finite arrays and
codes for who is the same persona; leaves intervals from the draws to `intervals`.

Ranks are made once for permutations and anew in each bootstrap resample. The same seed gives the same
bits for any number of threads: a resample is a function of (seed, its number) alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

_PART = 1_024  # resamples a thread takes at a time, a multiple of the lanes


@dataclass(frozen=True)
class Ordered:
    """Columns sorted once: `order` (K, n) rows ascending, `begins` (K, n) where a new value begins,
    `tied` (K,) whether any value stands twice, `rank` (K, n) twice the centered average rank."""

    order: np.ndarray
    begins: np.ndarray
    tied: np.ndarray
    rank: np.ndarray


def ordered(columns: np.ndarray, tolerance: float = 0.0) -> Ordered:
    """Sort each row of `columns` (K, n) float64; a value that is no more than `tolerance` above the one before it ties
    with it. Raises ValueError for values that are not finite."""
    columns = np.atleast_2d(np.asarray(columns, dtype=np.float64))
    if not np.isfinite(columns).all():
        raise ValueError("ranks need finite values")
    n = columns.shape[1]
    order = np.argsort(columns, axis=1, kind="stable")
    value = np.take_along_axis(columns, order, 1)
    begins = np.ones(columns.shape, dtype=bool)
    begins[:, 1:] = value[:, 1:] - value[:, :-1] > tolerance
    first = np.maximum.accumulate(np.where(begins, np.arange(n), 0), axis=1)
    ends = np.ones(columns.shape, dtype=bool)
    ends[:, :-1] = begins[:, 1:]
    last = np.minimum.accumulate(np.where(ends, np.arange(n), n)[:, ::-1], axis=1)[:, ::-1]
    rank = np.empty(columns.shape)
    np.put_along_axis(rank, order, (first + last + 1 - n).astype(np.float64), 1)
    return Ordered(order, begins, ~begins.all(axis=1), rank)


def threads(asked: int | None = None) -> int:
    """Threads to use: `asked`, else the cores this process may run on."""
    if asked is not None:
        return max(1, asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bootstrap_spearman(
    x: np.ndarray,
    y: np.ndarray,
    resamples: int,
    seed: int,
    *,
    person: np.ndarray | None = None,
    workers: int | None = None,
) -> np.ndarray:
    """ρ of each row of x with y in `resamples` bootstrap samples: (R, K) float64, ranks made anew.

    x (K, n), y (n,) float64. The resampling unit is the person: `person` (n,) integer codes, by default
    every row its own; as many persons as there are get drawn with replacement, each with all its rows.
    All columns see the same resamples. NaN where a side does not vary in a resample.
    Equal to `scipy.stats.spearmanr` of each resampled column. Raises ValueError for shapes that do not fit.
    """
    x, y = np.atleast_2d(np.asarray(x, dtype=np.float64)), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 1:
        raise ValueError(f"x must be (K, n) and y (n,), got {x.shape} and {y.shape}")
    return bootstrap_each(x[None], y[None, None], resamples, seed, person=person, workers=workers)[:, 0, 0]


def bootstrap_each(
    x: np.ndarray,
    ys: np.ndarray,
    resamples: int,
    seed: int,
    *,
    person: np.ndarray | None = None,
    workers: int | None = None,
) -> np.ndarray:
    """`bootstrap_spearman` of every row of x (G, K, n) with every row of ys (G, Y, n) of its group: (R, G, Y, K) float64.

    All see the same resamples, which are those that one of them alone would see: row i is of the same person everywhere."""
    from leakfast.stats.compiled import bootstrap

    x, ys = np.asarray(x, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if x.ndim != 3 or ys.ndim != 3 or x.shape[::2] != ys.shape[::2] or not x.shape[2]:
        raise ValueError(f"x must be (G, K, n) and ys (G, Y, n), n ≥ 1; got {x.shape} and {ys.shape}")
    codes = _codes("person", person, x.shape[2])
    columns, others = (ordered(side.reshape(-1, side.shape[2])) for side in (x, ys))
    of_x = (
        columns.order.reshape(x.shape),
        columns.begins.reshape(x.shape),
        columns.tied.reshape(x.shape[:2]),
    )
    of_y = (others.order.reshape(ys.shape), others.begins.reshape(ys.shape))
    out, people = np.empty((resamples, len(x), ys.shape[1], x.shape[1])), int(codes.max()) + 1

    def part(first: int, count: int) -> None:
        bootstrap(of_x, of_y, codes, people, word(seed), first, out[first : first + count])

    spread(part, resamples, workers, x.size)
    return out


@dataclass(frozen=True)
class Permuted:
    """Two-sided permutation p-values of K columns: (1 + #{|ρ*| ≥ |ρ|}) / (1 + R), and with the largest
    |ρ*| over the column's family in place of its own: a p that has paid for picking the best of them."""

    p: np.ndarray
    p_max: np.ndarray


def permute_spearman(
    x: np.ndarray,
    y: np.ndarray,
    resamples: int,
    seed: int,
    *,
    person: np.ndarray | None = None,
    block: np.ndarray | None = None,
    family: np.ndarray | None = None,
    workers: int | None = None,
) -> Permuted:
    """Permutation test of ρ of each row of x (K, n) with y (n,), shuffling who has which y.

    `person`, `block`: (n,) integer codes; one shuffle of the persons moves y inside every block alike
    (Mantel 1967 for one block; a block is a source's bystanders). `family`: (K,) codes below K of the
    columns among which one would pick (the layers); one family without it. The comparison is exact,
    because doubled ranks are integers. A column that does not vary has p NaN.
    """
    return permute_each(
        x, np.asarray(y)[None], resamples, seed, person=person, block=block, family=family, workers=workers
    )[0]


def permute_each(
    x: np.ndarray,
    ys: np.ndarray,
    resamples: int,
    seed: int,
    *,
    person: np.ndarray | None = None,
    block: np.ndarray | None = None,
    family: np.ndarray | None = None,
    workers: int | None = None,
) -> list[Permuted]:
    """`permute_spearman` of x (K, n) with each row of ys (Y, n), all by the same shuffles."""
    from leakfast.stats.compiled import moved_ranks, tally

    x, ys, codes, blocks = _checked(x, ys, person, block)
    xs, ranks = ordered(x).rank, ordered(ys).rank
    family = np.zeros(len(xs), np.int64) if family is None else np.asarray(family, np.int64)
    position = positions(codes, blocks)
    products = [np.sqrt((xs * xs).sum(1) * (one @ one)) for one in ranks]
    usable = np.array(products) > 0
    scale = 1 / np.where(usable, products, 1.0)
    observed = np.where(usable, np.abs([xs @ one for one in ranks]) * scale, np.inf)
    tries = -(-resamples // _PART)
    single, best = (np.zeros((tries, *usable.shape), np.int64) for _ in range(2))

    def part(first: int, count: int) -> None:
        k, moved = first // _PART, np.empty((count, *ranks.shape))
        moved_ranks(ranks, codes, blocks, position, word(seed), first, moved)
        # sums of whole numbers below 2⁵³, so exact in whatever order the matrix product adds them
        total = (moved.reshape(-1, moved.shape[2]) @ xs.T).reshape(count, *usable.shape)
        for y in range(len(ranks)):
            tally(total[:, y], scale[y], family, observed[y], single[k, y], best[k, y])

    with one_blas_thread():
        spread(part, resamples, workers, x.size)
    p, p_max = (np.where(usable, (1 + n.sum(0)) / (1 + resamples), np.nan) for n in (single, best))
    return [Permuted(*one) for one in zip(p, p_max, strict=True)]


def permute_alone(
    xs: np.ndarray, ys: np.ndarray, resamples: int, seed: int, *, workers: int | None = None
) -> np.ndarray:
    """(C,) p of `permute_spearman` of each row of xs (C, n) with its own of ys (C, n), all by the same shuffles."""
    from leakfast.stats.compiled import permuted_alone

    one, other = (ordered(side).rank for side in (xs, ys))
    if one.shape != other.shape:
        raise ValueError(f"xs and ys must be alike, got {one.shape} and {other.shape}")
    length = np.sqrt((one * one).sum(1) * (other * other).sum(1))
    usable = length > 0
    scale = 1 / np.where(usable, length, 1.0)
    observed = np.where(usable, np.abs((one * other).sum(1)) * scale, np.inf)
    found = np.zeros((-(-resamples // _PART), len(one)), np.int64)

    def part(first: int, count: int) -> None:
        permuted_alone(one, other, word(seed), first, count, scale, observed, found[first // _PART])

    spread(part, resamples, workers, one.size)
    return np.where(usable, (1 + found.sum(0)) / (1 + resamples), np.nan)


@dataclass(frozen=True)
class Within:
    """A test whose shuffles stay inside strata. `expected` (K,): mean of ρ over such shuffles, what the means of strata
    (and of blocks) alone give; p and p_max (K,) are of the distance of ρ from it; `movable`: persons that have someone to
    change with."""

    p: np.ndarray
    p_max: np.ndarray
    expected: np.ndarray
    movable: int


def permute_within(
    x: np.ndarray,
    y: np.ndarray,
    resamples: int,
    seed: int,
    *,
    stratum: np.ndarray,
    person: np.ndarray | None = None,
    block: np.ndarray | None = None,
    workers: int | None = None,
) -> Within:
    """`permute_spearman` with shuffles inside strata: persons of one stratum are exchangeable, others are not.

    `stratum` (n,) integer codes, one for all rows of a person; a stratum of one does not move. Two-sided about what the
    strata alone give: p = (1 + #{|ρ* − ρ̄| ≥ |ρ − ρ̄|}) / (1 + R), where ρ̄ = `expected` is the exact mean over all such
    shuffles (ρ* scatters around it and not around 0, as the strata's means stay where they are); p_max with the largest
    |ρ* − ρ̄| over all columns. Ranks are over all rows, doubled and whole, and ρ̄ is made of fractions, so that equal
    distances are equal. A column that varies together with y inside no stratum has p NaN.
    Assumes that within a stratum y is exchangeable (Good 2005, ch. 3: restricted randomization; Winkler et al. 2015).
    Raises ValueError for a person in two strata, and as `permute_spearman` does."""
    from leakfast.stats.compiled import moved_within, tally

    x, y, codes, blocks = _checked(x, y, person, block)
    kinds = np.unique(np.asarray(stratum), return_inverse=True)[1].astype(np.int64)
    if kinds.shape != y.shape:
        raise ValueError(f"stratum must be ({len(y)},), got {kinds.shape}")
    own = np.zeros(int(codes.max()) + 1, np.int64)
    own[codes] = kinds
    if (own[codes] != kinds).any():
        raise ValueError("a person stands in two strata")
    cells = (codes, blocks, positions(codes, blocks))
    strata = np.argsort(own, kind="stable"), np.searchsorted(np.sort(own), np.arange(own.max() + 2))
    xs, ys = ordered(x).rank, ordered(y).rank[0]
    length = np.sqrt((xs * xs).sum(1) * (ys @ ys))
    expected, usable, several = _within(xs, ys, blocks * (int(kinds.max()) + 1) + kinds)
    scale = 1 / np.where(usable, length, 1.0)
    observed = np.where(usable, np.abs(xs @ ys - expected) * scale, np.inf)
    scale[~usable] = 0.0  # a column that cannot move is no rival for the largest
    tries = -(-resamples // _PART)
    single, best = np.zeros((tries, len(xs)), np.int64), np.zeros((tries, len(xs)), np.int64)
    family = np.zeros(len(xs), np.int64)

    def part(first: int, count: int) -> None:
        k, moved = first // _PART, np.empty((count, len(ys)))
        moved_within(ys, cells, strata, word(seed), first, moved)
        tally(moved @ xs.T - expected, scale, family, observed, single[k], best[k])

    with one_blas_thread():
        spread(part, resamples, workers, x.shape[0] * x.shape[1])
    p, p_max = ((1 + counts.sum(0)) / (1 + resamples) for counts in (single, best))
    mean = np.divide(expected, length, out=np.full(len(xs), np.nan), where=length > 0)
    movable = len(np.unique(codes[several]))
    return Within(np.where(usable, p, np.nan), np.where(usable, p_max, np.nan), mean, movable)


def _within(xs: np.ndarray, ys: np.ndarray, cell: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of doubled ranks xs (K, n), ys (n,) and the stratum in a block of each row: (K,) mean of Σ xs·ys over shuffles
    inside the cells, the float next to Σ_cells Σxs·Σys / n; (K,) whether xs and ys vary together in one of them; (n,)
    whether a row has another in its cell."""
    cell = np.unique(cell, return_inverse=True)[1]
    size = np.bincount(cell)
    whole = np.zeros((len(size), len(cell)), np.int64)
    whole[cell, np.arange(len(cell))] = 1
    a, b = xs.astype(np.int64), ys.astype(np.int64)
    sums, spread = a @ whole.T, size * ((a * a) @ whole.T)
    own, own_spread = whole @ b, size * (whole @ (b * b))
    usable = ((spread > sums * sums) & (own_spread > own * own)).any(1)
    products = {int(n): (sums[:, size == n] @ own[size == n]).tolist() for n in np.unique(size)}
    mean = [
        float(sum((Fraction(found[k], n) for n, found in products.items()), Fraction()))
        for k in range(len(xs))
    ]
    return np.array(mean), usable, size[cell] > 1


def joint_permutations(seed: int, person: np.ndarray, block: np.ndarray, count: int) -> np.ndarray:
    """`count` shuffles of persona identity, the same one in every block: (count, n) row indices.

    `person`, `block`: (n,) integer codes; a persona stands at most once in a block (a block is one
    source's bystanders). Row j of the result maps position i to the position, in i's own block, of the
    persona that i's persona is sent to. Where that persona is absent from the block (a source is not
    its own bystander) the shuffle is followed on to the next one present, which keeps the map a
    bijection and, for any single block, uniform over all of them. Raises ValueError for a persona that
    stands twice in a block.
    """
    from leakfast.stats.compiled import follow, shuffle

    _, codes = np.unique(person, return_inverse=True)
    _, blocks = np.unique(block, return_inverse=True)
    position = positions(codes, blocks)
    sent, out = np.empty(position.shape[1], np.int64), np.empty((count, len(codes)), np.int64)
    for number in range(count):
        shuffle(word(seed), number, sent)
        follow(sent, codes, blocks, position, out[number])
    return out


def positions(person: np.ndarray, block: np.ndarray) -> np.ndarray:
    """(blocks, people) row of each person in each block, −1 where absent."""
    table = np.full((int(block.max()) + 1, int(person.max()) + 1), -1, dtype=np.int64)
    table[block, person] = np.arange(len(person))
    if (table >= 0).sum() != len(person):
        raise ValueError("a persona stands twice in one block")
    return table


def kendall_tau(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's τ-b of each row of x (K, n) with y (n,): (K,), NaN where a side does not vary.

    Equal to `scipy.stats.kendalltau` per row. Raises ValueError for values that are not finite."""
    from leakfast.stats.compiled import kendall

    x, y, _, _ = _checked(x, y, None)
    out = np.empty(len(x))
    kendall(np.ascontiguousarray(x), y, out)
    return out


def _checked(x, y, person, block=None):
    x = np.ascontiguousarray(np.atleast_2d(np.asarray(x, dtype=np.float64)))
    y = np.ascontiguousarray(np.asarray(y, dtype=np.float64))
    n = y.shape[-1] if y.ndim else 0
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[1] != n or n == 0:
        raise ValueError(f"x must be (K, n) and y (n,), n ≥ 1; got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("resampling needs finite values")
    blocks = np.zeros(n, np.int64) if block is None else _codes("block", block, n)
    return x, y, _codes("person", person, n), blocks


def _codes(name: str, given, n: int) -> np.ndarray:
    """(n,) codes from 0 on; each row its own where none are given."""
    codes = np.arange(n) if given is None else np.unique(np.asarray(given), return_inverse=True)[1]
    if codes.shape != (n,):
        raise ValueError(f"{name} must be ({n},), got {codes.shape}")
    return codes.astype(np.int64)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def one_blas_thread() -> AbstractContextManager[Any]:
    """Inside, BLAS starts no threads: they are ours."""
    return _blas().limit(limits=1, user_api="blas")


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="resample")


def word(seed: int) -> np.uint64:
    """A seed as the counter streams take it."""
    return np.uint64(int(seed) & 0xFFFFFFFFFFFFFFFF)


def spread(part: Callable[[int, int], None], total: int, workers: int | None, size: int) -> None:
    """Call part(first, count) over `total` resamples in steps of _PART, in threads where it pays (size: values that a
    resample goes through). The threads are kept for the next call."""
    tries = [(first, min(_PART, total - first)) for first in range(0, total, _PART)]
    workers = min(threads(workers), len(tries))
    if workers < 2 or size * total < 2_000_000:
        for first, count in tries:
            part(first, count)
        return
    list(_pool(workers).map(lambda one: part(*one), tries))
