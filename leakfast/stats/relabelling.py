"""Matrices of pairs whose personas are relabelled, rows and columns by one bijection: the sums that QAP and
multiple-regression QAP are made of. Demands arrays without gaps; leaves the tests themselves to `matrices`.

Every pair of matrices is multiplied once, and of what a regression takes out only the coefficients are needed: the product
with a residual is the residual of the products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leakfast.stats import resample

_SINGLE = float(2**24)  # whole numbers below are exact in float32


def relabel(
    rows: np.ndarray,
    left: Sequence[np.ndarray],
    near: Sequence[np.ndarray],
    resamples: int,
    seed: int,
    workers: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of products of U matrices with V whose personas are relabelled by one bijection π:

        total[r, u, v, l] = Σ_s Σ_b left_u[s, b, l] · near_v[π(rows[s]), π(b), l]   (R, U, V, L)

    and sources (R, S), the persona π(rows[s]) that each source becomes. rows (S,): persona of each source, no two the same;
    left: (S, P, L) or (S, P, 1) each; near: (P, P, L) or (P, P, 1) each, the diagonal 0; a matrix of one layer is the same
    at all. π(s) = π(b) only where s = b, so a source never meets itself. Sums of whole numbers below 2⁵³ are exact (in
    float32, which is quicker, where none can reach 2²⁴). The same bits for any number of threads.
    Raises ValueError for shapes that do not fit, values that are not finite and a diagonal that is not 0."""
    rows, left, near = _checked(rows, left, near)
    layers = max(one.shape[2] for one in (*left, *near))
    kind = _kind(rows, left, near)
    parts = [np.ascontiguousarray(one, dtype=kind) for one in near]
    sources = np.empty((resamples, len(rows)), np.int64)
    total = np.empty((resamples, len(left), len(near), layers))
    alike = [u for u, one in enumerate(left) if one.shape[2] == 1]
    other = [u for u, one in enumerate(left) if one.shape[2] > 1]
    single = _beside([left[u] for u in alike], rows, near[0], kind, 1)[..., 0]
    layered = _beside([left[u] for u in other], rows, near[0], kind, layers)
    stack = np.concatenate([single, layered.reshape(*single.shape[:2], -1)], axis=2)
    stack = stack.reshape(-1, stack.shape[2])  # (S·P, all columns)

    def part(first: int, count: int) -> None:
        from leakfast.stats.compiled import relabelled, relabelled_rows

        here, word = total[first : first + count], resample.word(seed)
        moved = np.empty((count, len(rows), parts[0].shape[0]), kind)
        for v, one in enumerate(parts):
            if v == 0 or one.shape[2] == 1:
                relabelled_rows(rows, one[..., 0].copy(), word, first, sources[first : first + count], moved)
            if one.shape[2] > 1:
                found = np.empty((count, len(left), layers), kind)
                relabelled(rows, single, layered, one, word, first, found)
                here[:, [*alike, *other], v] = found
                continue
            flat = moved.reshape(count, -1) @ stack
            here[:, alike, v] = flat[:, : len(alike), None]
            here[:, other, v] = flat[:, len(alike) :].reshape(count, len(other), layers)

    with resample.one_blas_thread():
        resample.spread(part, resamples, workers, sum(one.size for one in left) * len(near) * layers)
    return total, sources


def _checked(rows, left, near) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    rows = np.asarray(rows, np.int64)
    left, near = ([np.asarray(one, np.float64) for one in side] for side in (left, near))
    people, layers = near[0].shape[0], {one.shape[2] for one in (*left, *near)} - {1}
    fits = all(one.shape[:2] == (people, people) for one in near) and len(layers) < 2
    if not fits or any(one.shape[:2] != (len(rows), people) for one in left):
        shapes = [one.shape for one in (*left, *near)]
        raise ValueError(
            f"left must be (S, P, L) or (S, P, 1) each, near (P, P, L) or (P, P, 1), got {shapes}"
        )
    if len(np.unique(rows)) != len(rows) or not ((rows >= 0) & (rows < people)).all():
        raise ValueError("rows must be personas of the matrix, each once")
    diagonals = any(one[np.diag_indices(people)].any() for one in near)
    if diagonals or not all(np.isfinite(one).all() for one in (*left, *near)):
        raise ValueError("relabelling needs finite values, and 0 where a persona meets itself")
    return rows, left, near


def _kind(rows: np.ndarray, left: Sequence[np.ndarray], near: Sequence[np.ndarray]):
    """float32 where every value is whole and no sum can reach 2²⁴, else float64."""
    whole = all((one == np.rint(one)).all() for one in (*left, *near))
    tops = [max(np.abs(one).max(initial=0.0) for one in side) for side in (left, near)]
    return np.float32 if whole and tops[0] * tops[1] * len(rows) * len(near[0]) < _SINGLE else np.float64


def _beside(matrices: list[np.ndarray], rows: np.ndarray, near: np.ndarray, kind, layers: int) -> np.ndarray:
    """(S, P, U, layers) of (S, P, layers) each; U may be 0."""
    if not matrices:
        return np.zeros((len(rows), len(near), 0, layers), kind)
    return np.ascontiguousarray(np.stack(matrices, axis=2), dtype=kind)
