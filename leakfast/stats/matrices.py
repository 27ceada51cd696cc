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

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from leakfast.stats import resample
from leakfast.stats.relabelling import relabel

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
    return qap_each(leakage[None], cosine, rows, permutations, seed, workers)[0]


def qap_each(
    leakage: np.ndarray,
    cosine: np.ndarray,
    rows: np.ndarray,
    permutations: int,
    seed: int,
    workers: int | None = None,
) -> list[Tested]:
    """`qap` of each of leakage (Y, S, P), all with the same relabellings."""
    near = np.stack([row_ranks(one, np.arange(len(one))) for one in cosine], axis=-1)
    sizes, out = (near * near).sum(1), {}
    for members, ry, held in _by_sources(leakage, rows):
        total, sources = relabel(held, list(ry[..., None]), [near], permutations, seed, workers)
        length = sum(
            (sizes[sources[:, s]] for s in range(len(held))), np.zeros((permutations, near.shape[2]))
        )
        own_length = (near[held] ** 2).sum((0, 1))
        for y, member in enumerate(members):
            size, own = float((ry[y] ** 2).sum()), (ry[y][:, :, None] * near[held]).sum((0, 1))
            rho = np.where(own_length * size > 0, _ratio(own, own_length, size), np.nan)
            p, p_max = _tail(np.abs(rho), np.abs(_ratio(total[:, y, 0], length, size)), 0.0)
            out[member] = Tested(rho, None, p, p_max, len(held) * (near.shape[0] - 1))
    return [out[y] for y in range(len(leakage))]


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
    return mrqap_each(leakage[None], [term, *others], rows, permutations, seed, workers)[0][0]


def mrqap_each(
    leakage: np.ndarray,
    terms: list[np.ndarray],
    rows: np.ndarray,
    permutations: int,
    seed: int,
    workers: int | None = None,
) -> list[list[Tested]]:
    """`mrqap` of each of leakage (Y, S, P) and each term given all others, with the same relabellings: [y][term].

    Ranks of leakage and terms are multiplied with relabelled ranks of terms once (`relabel`, whole numbers); what least
    squares take out is taken out of these products."""
    # a term given by one matrix is ranked once, and seen at every layer
    people = terms[0].shape[1]
    ranks = [np.stack([row_ranks(m, np.arange(people)) for m in one], axis=-1) for one in terms]
    out: dict[int, list[Tested]] = {}
    for members, ry, held in _by_sources(leakage, rows):
        left = [*ry[..., None], *(one[held] for one in ranks)]
        drawn = relabel(held, left, ranks, permutations, seed, workers)
        for j in range(len(terms)):
            tested = _one_term(ry, ranks, j, held, drawn)
            for member, found in zip(members, tested, strict=True):
                out.setdefault(member, []).append(found)
    return [out[y] for y in range(len(leakage))]


def _by_sources(leakage: np.ndarray, rows: np.ndarray) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(numbers of the y, their ranks (Y, S, P), rows (S,)) of leakages that vary under the same sources."""
    ranked = [row_ranks(values, rows) for values in leakage]
    alike: dict[bytes, list[int]] = {}
    for y, ry in enumerate(ranked):
        alike.setdefault(ry.any(1).tobytes(), []).append(y)
    for members in alike.values():
        varies = ranked[members[0]].any(1)
        yield members, np.stack([ranked[y][varies] for y in members]), np.asarray(rows)[varies]


def _one_term(
    ry: np.ndarray, ranks: list[np.ndarray], term: int, rows: np.ndarray, drawn: tuple[np.ndarray, np.ndarray]
) -> list[Tested]:
    """One term given all others, with each of ry (Y, S, P). ranks: (P, P, L) or (P, P, 1) of each term; drawn: what
    `relabel` gives of ry and the terms with the terms."""
    total, sources = drawn
    count, people, layers = len(ry), ranks[0].shape[0], max(one.shape[2] for one in ranks)
    wide = [np.broadcast_to(one, (people, people, layers)) for one in ranks]
    left = np.empty((people, people, layers))
    weights = np.zeros((count, len(rows), people, len(ranks), layers))
    size = np.empty((count, layers))
    own_share = np.zeros((len(ranks), layers))  # of the terms' ranks in ε
    basis_share = np.zeros((len(ranks) - 1, len(ranks), layers))  # and in each column of the basis
    y_share = np.zeros((count, len(ranks) - 1, layers))  # of the basis in y
    others = [j for j in range(len(ranks)) if j != term]
    for k in range(layers):
        rest = [wide[j][:, :, k] for j in others]
        left[:, :, k], own_share[others, k] = _residual(wide[term][:, :, k], rest)
        own_share[term, k] = 1.0
        basis = _basis([one[rows] for one in rest])
        for m, (column, made) in enumerate(basis):
            basis_share[m, others, k] = made
            weights[:, :, :, 1 + m, k] = column
        for y, values in enumerate(ry):
            shares = [(q * values).sum() for q, _ in basis]
            y_share[y, : len(basis), k] = shares
            rest_y = values - sum(
                (q * share for (q, _), share in zip(basis, shares, strict=True)), 0 * values
            )
            size[y, k], weights[y, :, :, 0, k] = (rest_y * rest_y).sum(), rest_y
    sizes = (left * left).sum(1)
    length = sum((sizes[sources[:, s]] for s in range(len(rows))), np.zeros((len(sources), layers)))
    with_left = np.einsum("ruvl,vl->rul", total, own_share)  # each left side's product with relabelled ε
    with_basis = np.einsum("mvl,rvl->rml", basis_share, with_left[:, count:])
    free = length - (with_basis**2).sum(1)
    out = []
    for y in range(count):
        moved = with_left[:, y] - (y_share[y] * with_basis).sum(1)
        out.append(_tested(weights[y], left[rows], size[y], np.abs(_ratio(moved, free, size[y]))))
    return out


def _tested(weights: np.ndarray, own_left: np.ndarray, size: np.ndarray, drawn: np.ndarray) -> Tested:
    """The observed value beside those of the relabellings, drawn (R, L). weights (S, P, columns, L): y's residuals and the
    others' basis; own_left (S, P, L): ε of the sources; size (L,): Σ of y's squared residuals."""
    sources, people = weights.shape[:2]
    own = np.einsum("sbmk,sbk->mk", weights, own_left)[None]
    whole = (own_left**2).sum((0, 1))
    free = whole[None] - (own[:, 1:] ** 2).sum(1)
    still = free[0] <= 1e-9 * np.maximum(1.0, whole)
    degrees = sources * (people - 1) - sources - weights.shape[2]
    r = np.where(still, np.nan, _ratio(own[:, 0], free, size)[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        t, slope = r * np.sqrt(degrees / ((1 + r) * (1 - r))), own[0, 0] / free[0]
    p, p_max = _tail(np.abs(r), drawn, _SAME)
    return Tested(np.where(still, np.nan, slope), t, p, p_max, sources * (people - 1))


def _ratio(total: np.ndarray, length: np.ndarray, size) -> np.ndarray:
    """total / √(length · size), 0 where a side does not vary."""
    whole = np.sqrt(np.maximum(length, 0.0) * size)
    return np.divide(total, whole, out=np.zeros(np.broadcast(total, whole).shape), where=whole > 0)


def _tail(observed: np.ndarray, drawn: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(p, p_max) of observed (L,) among drawn (R, L), both without sign; NaN stays."""
    top = np.max(drawn, axis=1, initial=0.0)[:, None]
    p, p_max = ((1 + (d >= observed - tolerance).sum(0)) / (1 + len(drawn)) for d in (drawn, top))
    return np.where(np.isnan(observed), np.nan, p), np.where(np.isnan(observed), np.nan, p_max)


def _basis(columns: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Orthonormal matrices that span `columns`, what depends on the others left out, each with its shares of them."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for j, column in enumerate(columns):
        shares = [(q * column).sum() for q, _ in found]
        rest = column - sum((q * s for (q, _), s in zip(found, shares, strict=True)), np.zeros_like(column))
        if (rest * rest).sum() > 1e-12 * max(1.0, (column * column).sum()):
            made = np.eye(len(columns))[j]
            made = made - sum(
                (one * s for (_, one), s in zip(found, shares, strict=True)), np.zeros_like(made)
            )
            length = np.linalg.norm(rest)
            found.append((rest / length, made / length))
    return found


def _residual(value: np.ndarray, columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What `columns` leave of `value`, and the (negative) share of each column in it."""
    basis = _basis(columns)
    shares = [(q * value).sum() for q, _ in basis]
    rest = value - sum((q * s for (q, _), s in zip(basis, shares, strict=True)), np.zeros_like(value))
    return rest, -sum((made * s for (_, made), s in zip(basis, shares, strict=True)), np.zeros(len(columns)))
