"""The table of matrix tests: which personas, sources and terms a run knows completely, each test at every layer. Demands
pairs, the base model's centroids and who the personas are; leaves the tests themselves to `matrices`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from leakfast.stats import confounds, ties
from leakfast.stats.correlations import MIN_PAIRS
from leakfast.stats.matrices import Tested, mrqap_each, qap_each, row_ranks
from leakfast.stats.rates import BASE
from leakfast.stats.wide import COSINES, YS, Leaks, leaks
from leakfast.storage import schema
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.stats.people import People

TERMS = ("words", "length")  # beside the cosine
_METHODS = {
    "qap": "Spearman of ranks within a source; personas of the geometry relabelled",
    "mrqap": "least squares on ranks within a source; double semi-partialing, personas relabelled",
}


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
    bystander's prompt (its logarithm has the same ranks). Personas: those with a centroid at every layer and leakage under
    every source but themselves (and a prompt, for MRQAP); sources among them. Null with a reason where nothing can be
    tested."""
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
            ys = YS[:1] if _same_ranks(found) else YS
            for cosine in COSINES:
                cells = tests(found, cosine, ys, draws, len(whole.layers))
                for y_name in YS:
                    here = told | {"cosine": cosine, "y": y_name}
                    at = cells.get(y_name, cells[YS[0]])
                    rows += [here | {**cell, "layer": whole.layers[cell["at"]]} for cell in at]
    for row in rows:
        row.pop("at")
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
    return {
        "words": ties.floats(told["jaccard"]).reshape(shape),
        "length": ties.floats(told["prompt_words"]).reshape(shape),
    }


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


def _same_ranks(found: _Matrices | str) -> bool:
    """Whether rate and delta rank the bystanders alike (a baseline of 0, say), so that one test is both's."""
    if isinstance(found, str):
        return False
    one, other = (row_ranks(np.nan_to_num(found.leakage[y]), found.rows) for y in YS)
    return bool(one.any() and np.array_equal(one, other) and np.isfinite(found.leakage[YS[1]]).any())


def _qap(
    found: _Matrices | str, cosine: str, ys: tuple[str, ...], draws: tuple[int, int, int | None], layers: int
) -> dict[str, list[dict]]:
    """y → its cells."""
    why = {y: _why(found, cosine, y) for y in ys}
    cells = {y: [{"at": k, "term": "cosine", "reason": why[y]} for k in range(layers)] for y in ys if why[y]}
    usable = [y for y in ys if not why[y]]
    if isinstance(found, str) or not usable:
        return cells
    leakage = np.stack([found.leakage[y] for y in usable])
    each = qap_each(leakage, found.cosine[cosine], found.rows, *draws)
    for y, tested in zip(usable, each, strict=True):
        cells[y] = list(_told(found, y, "cosine", tested, draws, layers))
    return cells


def _mrqap(
    found: _Matrices | str, cosine: str, ys: tuple[str, ...], draws: tuple[int, int, int | None], layers: int
) -> dict[str, list[dict]]:
    names = ["cosine", *TERMS]
    why = {y: _why(found, cosine, y) for y in ys}
    cells = {
        y: [{"at": k, "term": term, "reason": why[y]} for term in names for k in range(layers)]
        for y in ys
        if why[y]
    }
    usable = [y for y in ys if not why[y]]
    if isinstance(found, str) or not usable:
        return cells
    lacking = dict(found.lacking)
    for name, values in found.terms.items():
        if not row_ranks(values[0][found.rows], found.rows).any():
            lacking[name] = f"{name} does not vary between bystanders"
    terms = {"cosine": found.cosine[cosine], **found.terms}
    terms = {name: values for name, values in terms.items() if name not in lacking}
    leakage = np.stack([found.leakage[y] for y in usable])
    each = mrqap_each(leakage, list(terms.values()), found.rows, *draws)
    for y, tested in zip(usable, each, strict=True):
        by_term, cells[y] = dict(zip(terms, tested, strict=True)), []
        for name in names:
            if name in lacking:
                cells[y] += [{"at": k, "term": name, "reason": lacking[name]} for k in range(layers)]
            else:
                cells[y] += _told(found, y, name, by_term[name], draws, layers)
    return cells


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
