"""Do source × bystander matrices of leakage follow the geometry of all personas? QAP and multiple-regression QAP, by
relabelling personas. Demands pairs, the base model's centroids and who the personas are; leaves ρ of single sources to
`correlations` and shuffles inside strata to `restricted`.

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
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from leakfast.stats import confounds, resample, ties
from leakfast.stats.correlations import COSINES, MIN_PAIRS, YS
from leakfast.stats.rates import BASE
from leakfast.stats.restricted import Leaks, leaks
from leakfast.storage import schema
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.stats.collect import People

TERMS = ("words", "length")  # beside the cosine
_SAME = 1e-12  # two t that differ by less (as correlations) are one
_METHODS = {
    "qap": "Spearman of ranks within a source; personas of the geometry relabelled",
    "mrqap": "least squares on ranks within a source; double semi-partialing, personas relabelled",
}


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


@dataclass(frozen=True)
class _Matrices:
    """What one behavior and training seed is tested with. `leakage`: y → (S, P), the diagonal NaN; `cosine`: (L, P, P) of
    each kind; `terms`: the others that are known for all, (1, P, P); `lacking`: term → why it is not there."""

    rows: np.ndarray
    people: int
    leakage: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]
    terms: dict[str, np.ndarray]
    lacking: dict[str, str]


def table(
    pairs: pl.DataFrame,
    rates: pl.DataFrame,
    people: People,
    centroids: Centroids | None,
    permutations: int,
    seed: int = 0,
    workers: int | None = None,
) -> pl.DataFrame:
    """Schema `matrix_tests`: QAP of cosine and leakage, and MRQAP of cosine, words and length, at every layer.

    One row per behavior, training seed, layer, cosine, y, test and term. Terms of MRQAP: the cosine; `words`, the share of
    content words that two personas' prompts have in common (`confounds.covariates`: jaccard); `length`, the words in the
    bystander's prompt (its logarithm has the same ranks); `reply`, the unadapted model's reply tokens where `rates` has a
    column reply_tokens. Personas: those with a centroid at every layer and leakage under every source but themselves
    (and a prompt, for MRQAP); sources among them. Null with a reason where nothing can be tested."""
    rows: list[dict] = []
    for behavior, train_seed, whole in leaks(pairs):
        drawn = derive_seed("matrix tests", seed, behavior, train_seed)
        draws = (permutations, drawn, workers)
        for test in ("qap", "mrqap"):
            told = {
                "behavior": behavior,
                "seed": train_seed,
                "test": test,
                "resampling_unit": "persona",
                "method": _METHODS[test],
            }
            said = _said(whole, behavior, rates, people, centroids) if test == "mrqap" else None
            found = _matrices(whole, centroids, said)
            tests = _mrqap if test == "mrqap" else _qap
            for cosine in COSINES:
                for y_name in YS:
                    for cell in tests(found, cosine, y_name, draws, len(whole.layers)):
                        layer = whole.layers[cell.pop("at")]
                        rows.append(told | {"layer": layer, "cosine": cosine, "y": y_name} | cell)
    return schema.check(pl.DataFrame(rows, schema=schema.columns("matrix_tests")), "matrix_tests")


def _said(
    whole: Leaks, behavior: str, rates: pl.DataFrame, people: People, centroids: Centroids | None
) -> dict[str, np.ndarray]:
    """term → (P, P) over the personas of the centroids, NaN where it is not known."""
    names = [] if centroids is None else centroids.personas
    every = pl.DataFrame({"source": names}, schema={"source": pl.String}).join(
        pl.DataFrame({"persona": names}, schema={"persona": pl.String}), how="cross"
    )
    every = every.with_columns(behavior=pl.lit(behavior), adapter=pl.lit(BASE))
    told = confounds.covariates(every, rates, people)
    shape = (len(names), len(names))
    found = {
        "words": ties.floats(told["jaccard"]).reshape(shape),
        "length": ties.floats(told["prompt_words"]).reshape(shape),
    }
    if "reply_tokens" in rates.columns:
        base = dict(rates.filter(behavior=behavior, adapter=BASE).select("persona", "reply_tokens").rows())
        tokens = pl.Series([base.get(name) for name in names], dtype=pl.Float64)
        found["reply"] = np.broadcast_to(ties.floats(tokens), shape)
    return found


def _matrices(
    whole: Leaks, centroids: Centroids | None, said: dict[str, np.ndarray] | None
) -> _Matrices | str:
    """What is known for all of the same personas, or why nothing is."""
    if centroids is None:
        return "the run has no centroids, and relabelling needs the cosines of all pairs of personas"
    if twins := whole.twins():
        return f"{', '.join(twins)} has more than one adapter: a matrix takes one for each source"
    names = centroids.personas
    cosine = {kind: _cosines(centroids, whole.layers, kind) for kind in COSINES}
    usable = np.ones(len(names), dtype=bool)
    for near in cosine.values():  # of a kind that is not known at all, every one is left to say so
        known = np.isfinite(np.diagonal(near, axis1=1, axis2=2)).all(0)
        usable &= known if known.any() else True
    lacking = {}
    for term, values in (said or {}).items():
        known = np.isfinite(np.diagonal(values))
        if known.any():
            usable &= known
        else:
            lacking[term] = f"{term} of the personas' prompts are not known here"
    place = {name: i for i, name in enumerate(names)}
    leakage = {y: _wide(whole, y, place) for y in YS}
    sources, usable = _complete(list(leakage.values()), [place.get(s, -1) for _, s in whole.adapters], usable)
    if not len(sources) or usable.sum() < MIN_PAIRS + 1:
        return f"{usable.sum()} personas with all values under {len(sources)} sources; 5 and 1 are needed"
    at, number = np.nonzero(usable)[0], np.cumsum(usable) - 1
    order = [i for i, (_, s) in enumerate(whole.adapters) if place.get(s, -1) in sources]
    return _Matrices(
        rows=np.array([number[place[whole.adapters[i][1]]] for i in order]),
        people=len(at),
        leakage={y: values[np.ix_(order, at)] for y, values in leakage.items()},
        cosine={kind: near[:, at[:, None], at[None, :]] for kind, near in cosine.items()},
        terms={t: v[np.ix_(at, at)][None] for t, v in (said or {}).items() if t not in lacking},
        lacking=lacking,
    )


def _cosines(centroids: Centroids, layers: list[int], kind: str) -> np.ndarray:
    """(L, P, P) float64, NaN where there is none."""
    if kind == "centered" and len(centroids.metadata["centered_on"]) < 2:
        return np.full((len(layers), len(centroids.personas), len(centroids.personas)), np.nan)
    return np.stack(
        [centroids.cosine(layer, "centered" if kind == "centered" else "raw") for layer in layers]
    )


def _wide(whole: Leaks, y_name: str, place: dict[str, int]) -> np.ndarray:
    """(adapters, P) leakage, NaN where it is not known."""
    out = np.full((len(whole.adapters), len(place)), np.nan)
    for adapter, name, value in zip(whole.adapter, whole.persona, whole.y[y_name], strict=True):
        if name in place:
            out[adapter, place[name]] = value
    return out


def _complete(
    leakage: list[np.ndarray], sources: list[int], usable: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Sources and personas such that each source has leakage of each other persona, by every y that is known at all."""
    while True:
        rows = [i for i, source in enumerate(sources) if source >= 0 and usable[source]]
        kept = usable.copy()
        for values in leakage:
            if not np.isfinite(values).any():
                continue
            for i in rows:
                known = np.isfinite(values[i])
                known[sources[i]] = True
                kept &= known
        if (kept == usable).all():
            return [sources[i] for i in rows], usable
        usable = kept


def _qap(
    found: _Matrices | str, cosine: str, y_name: str, draws: tuple[int, int, int | None], layers: int
) -> Iterator[dict]:
    if (why := _why(found, cosine, y_name)) is not None or isinstance(found, str):
        yield from ({"at": k, "term": "cosine", "reason": why} for k in range(layers))
        return
    tested = qap(found.leakage[y_name], found.cosine[cosine], found.rows, *draws)
    yield from _told(found, y_name, "cosine", tested, draws, layers)


def _mrqap(
    found: _Matrices | str, cosine: str, y_name: str, draws: tuple[int, int, int | None], layers: int
) -> Iterator[dict]:
    names = ["cosine", *TERMS]
    if (why := _why(found, cosine, y_name)) is not None or isinstance(found, str):
        yield from ({"at": k, "term": term, "reason": why} for term in names for k in range(layers))
        return
    terms = {"cosine": found.cosine[cosine], **found.terms}
    lacking = dict(found.lacking)
    for name, values in found.terms.items():
        if not row_ranks(values[0][found.rows], found.rows).any():
            lacking[name] = f"{name} does not vary between bystanders"
    terms = {name: values for name, values in terms.items() if name not in lacking}
    for name in dict.fromkeys([*names, *found.terms]):
        if name in lacking:
            yield from ({"at": k, "term": name, "reason": lacking[name]} for k in range(layers))
            continue
        others = [values for other, values in terms.items() if other != name]
        tested = mrqap(found.leakage[y_name], terms[name], others, found.rows, *draws)
        yield from _told(found, y_name, name, tested, draws, layers)


def _why(found: _Matrices | str, cosine: str, y_name: str) -> str | None:
    if isinstance(found, str):
        return found
    if not np.isfinite(found.cosine[cosine]).all():
        return f"there is no {cosine} cosine: no mean to take away"
    ry = found.leakage[y_name]
    others = np.arange(found.people)[None, :] != found.rows[:, None]
    if not np.isfinite(ry[others]).all():
        return f"{y_name} is not known"
    if not row_ranks(ry, found.rows).any():
        return f"{y_name} does not vary between the bystanders of any source"
    return None


def _told(
    found: _Matrices, y_name: str, term: str, tested: Tested, draws: tuple[int, int, int | None], layers: int
) -> Iterator[dict]:
    """One cell a layer; a term of one matrix alone, with others of one, is the same at every layer."""
    varies = row_ranks(found.leakage[y_name], found.rows).any(1)
    for k in range(layers):
        j = min(k, len(tested.value) - 1)
        told = {"at": k, "term": term, "sources": int(varies.sum()), "personas": found.people}
        told["n"] = tested.pairs
        if np.isnan(tested.value[j]):
            yield told | {"reason": f"{term} does not vary, or follows from the other terms"}
            continue
        name = "rho" if tested.t is None else "coefficient"
        told[name] = float(tested.value[j])
        if tested.t is not None:
            told["t"] = float(tested.t[j]) if np.isfinite(tested.t[j]) else None
        if not draws[0]:
            yield told | {"reason": "no permutation was asked for"}
            continue
        told |= {"p": float(tested.p[j]), "permutations": draws[0], "permutation_seed": draws[1]}
        if term == "cosine":
            told["p_max"] = float(tested.p_max[j])
        yield told
