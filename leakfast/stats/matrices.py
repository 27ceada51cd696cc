"""Do source × bystander matrices of leakage follow the geometry of all personas? QAP and multiple-regression QAP, by
relabelling personas. Demands arrays without gaps beside the diagonal; leaves a run's tables to `matrix_tests`, ρ of single
sources to `correlations` and shuffles inside strata to `restricted`.

What is shuffled. Leakage Y is S × P: source s, bystander b, missing where s = b. The geometry C is P × P, for every persona
has a centroid, source or not. One bijection π relabels the personas of C, rows and columns together, and Y stays:

    Y[s, b] is set against C[π(s), π(b)].

This is QAP (Mantel 1967; Krackhardt 1988) for a matrix of which only S rows were measured. π(s) = π(b) only where s = b, so
no bystander meets its own diagonal. A source's row becomes another persona's whole row, so what a row of C is like (how
many near neighbours a persona has, how rows resemble one another) is kept, as is what Y is like (a persona that leaks
under every source does so in every shuffle). Not valid: shuffling rows and columns apart, which would set a source against
a cosine of 1 to itself; shuffling S rows among themselves alone, which has S! values and asks another question. With one
source, π sends its row to a row in an order that is uniform: the free permutation test of `correlations`, no more.

What the null is. The labels of the geometry say nothing about those of leakage: personas are exchangeable as a whole.
Leakage along one direction that has nothing to do with the source is not in this null (docs/tests.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leakfast.stats import resample

_SAME = 1e-12  # two t that differ by less (as correlations) are one


@dataclass(frozen=True)
class Tested:
    """Of L layers: rho (QAP), or coefficient and t (MRQAP); p and p_max two-sided. All (L,) float64, NaN where a value is
    not defined. `pairs`: how many the sums run over."""

    value: np.ndarray
    t: np.ndarray | None
    p: np.ndarray
    p_max: np.ndarray
    pairs: int


def row_ranks(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Twice the centered average rank of each value among the others of its row: (R, P) float64, whole numbers.

    values (R, P) float64; own (R,): the column that a row leaves out, which gets 0. Each row sums to 0."""
    rows, people = values.shape
    others = np.arange(people)[None, :] != own[:, None]
    out = np.zeros((rows, people))
    out[others] = resample.ordered(values[others].reshape(rows, people - 1)).rank.ravel()
    return out


def qap(
    leakage: np.ndarray,
    cosine: np.ndarray,
    rows: np.ndarray,
    permutations: int,
    seed: int,
    workers: int | None = None,
) -> Tested:
    """QAP of leakage (S, P) with cosine (L, P, P); rows (S,): the persona of each source.

        ρ_l = Σ_s Σ_b ry[s, b] · rc_l[s, b] / √(Σ ry² · Σ rc_l²)

    with ry the ranks of leakage among a source's bystanders and rc_l those of the cosine among the others of its row: the
    mean of the sources' Spearman ρ where nothing ties. p = (1 + #{|ρ*| ≥ |ρ|}) / (1 + R) over relabellings of all P
    personas (top of the module), p_max with the largest |ρ*| over layers. What leakage[s, rows[s]] holds is not read. A
    source whose leakage does not vary adds to no sum. Sums are of whole numbers, so equal statistics are equal. float64,
    finite. Resampling unit: the persona."""
    ry = row_ranks(leakage, rows)
    varies = ry.any(1)
    ry, rows = ry[varies], np.asarray(rows)[varies]
    near = np.stack([row_ranks(one, np.arange(len(one))) for one in cosine], axis=-1)
    weights = np.repeat(ry[:, :, None, None], near.shape[2], axis=3)
    size, pairs = float((ry * ry).sum()), len(rows) * (near.shape[0] - 1)
    own = (ry[:, :, None] * near[rows]).sum((0, 1))
    spread = (near[rows] ** 2).sum((0, 1)) * size
    rho = np.where(spread > 0, _ratio(own, (near[rows] ** 2).sum((0, 1)), size), np.nan)
    total, length = resample.relabel(rows, weights, near, permutations, seed, workers)
    p, p_max = _tail(np.abs(rho), np.abs(_ratio(total[:, 0], length, size)), 0.0)
    return Tested(rho, None, p, p_max, pairs)


def mrqap(
    leakage: np.ndarray,
    term: np.ndarray,
    others: list[np.ndarray],
    rows: np.ndarray,
    permutations: int,
    seed: int,
    workers: int | None = None,
) -> Tested:
    """MRQAP by double semi-partialing (Dekker, Krackhardt and Snijders 2007) of one term given others.

    leakage (S, P); term (L, P, P) or (1, P, P); others: the other terms, shaped alike, each 1 or L matrices; rows (S,).
    All are ranked within their row, which takes the sources' means out. ε: the residuals of the term's ranks after least
    squares on the others', over all ordered pairs of the P personas. Leakage's ranks are regressed on ε and the others
    over the S rows; t of ε's coefficient is set against that with ε[π(s), π(b)] in its place. The observed t and the
    coefficient (ranks of leakage a rank of the term) are those of the term itself. Two-sided, S(P − 1) − S − k degrees of
    freedom for k terms. Linear in ranks: a term that acts in another shape is not wholly taken out."""
    layers, people = max(len(one) for one in (term, *others)), term.shape[1]
    ry = row_ranks(leakage, rows)
    varies = ry.any(1)
    ry, rows = ry[varies], np.asarray(rows)[varies]
    # a term given by one matrix is ranked once, and seen at every layer
    ranks = [np.stack([row_ranks(m, np.arange(people)) for m in one], axis=-1) for one in (term, *others)]
    ranks = [np.broadcast_to(one, (people, people, layers)) for one in ranks]
    left = np.empty((people, people, layers))
    weights = np.empty((len(rows), people, 1 + len(others), layers))
    size = np.empty(layers)
    for k in range(layers):
        rest = [one[:, :, k] for one in ranks[1:]]
        left[:, :, k] = _residual(ranks[0][:, :, k], rest)
        basis = _basis([one[rows] for one in rest])
        y = ry - sum((q * (q * ry).sum() for q in basis), np.zeros_like(ry))
        size[k] = (y * y).sum()
        weights[:, :, :, k] = np.stack([y, *basis, *[np.zeros_like(y)] * (len(others) - len(basis))], axis=2)
    own = np.einsum("sbmk,sbk->mk", weights, left[rows])[None]
    free = (left[rows] ** 2).sum((0, 1))[None] - (own[:, 1:] ** 2).sum(1)
    still = free[0] <= 1e-9 * np.maximum(1.0, (left[rows] ** 2).sum((0, 1)))
    degrees = len(rows) * (people - 1) - len(rows) - 1 - len(others)
    r = np.where(still, np.nan, _ratio(own[:, 0], free, size)[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        t, slope = r * np.sqrt(degrees / ((1 + r) * (1 - r))), own[0, 0] / free[0]
    total, length = resample.relabel(rows, weights, left, permutations, seed, workers)
    drawn = np.abs(_ratio(total[:, 0], length - (total[:, 1:] ** 2).sum(1), size))
    p, p_max = _tail(np.abs(r), drawn, _SAME)
    return Tested(np.where(still, np.nan, slope), t, p, p_max, len(rows) * (people - 1))


def _ratio(total: np.ndarray, length: np.ndarray, size) -> np.ndarray:
    """total / √(length · size), 0 where a side does not vary."""
    whole = np.sqrt(np.maximum(length, 0.0) * size)
    return np.divide(total, whole, out=np.zeros(np.broadcast(total, whole).shape), where=whole > 0)


def _tail(observed: np.ndarray, drawn: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(p, p_max) of observed (L,) among drawn (R, L), both without sign; NaN stays."""
    top = np.max(drawn, axis=1, initial=0.0)[:, None]
    p, p_max = ((1 + (d >= observed - tolerance).sum(0)) / (1 + len(drawn)) for d in (drawn, top))
    return np.where(np.isnan(observed), np.nan, p), np.where(np.isnan(observed), np.nan, p_max)


def _basis(columns: list[np.ndarray]) -> list[np.ndarray]:
    """Orthonormal matrices that span `columns`, what depends on the others left out."""
    found: list[np.ndarray] = []
    for column in columns:
        rest = column - sum((q * (q * column).sum() for q in found), np.zeros_like(column))
        if (rest * rest).sum() > 1e-12 * max(1.0, (column * column).sum()):
            found.append(rest / np.linalg.norm(rest))
    return found


def _residual(value: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:
    return value - sum((q * (q * value).sum() for q in _basis(columns)), np.zeros_like(value))
