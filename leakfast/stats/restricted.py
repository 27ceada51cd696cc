"""Does ρ outlast shuffles that stay among alike personas: of one category, or of one cluster of the geometry? Demands pairs,
and the base model's centroids for clusters; leaves the shuffles to `resample` and matrices of all pairs to `matrices`.

A free shuffle takes personas as exchangeable. Their centroids have few effective dimensions, so leakage along ANY
direction of that space lies along the cosine to some source by chance, far more often than free shuffles say. Shuffles
inside a stratum keep the strata's means where they are and ask about the order within. What they do not answer: a
direction that differs inside strata too (docs/tests.md has how often each test is fooled)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import scipy  # loads its parts when they are used

from leakfast.stats import resample
from leakfast.stats.association import spearman_and_pearson, within
from leakfast.stats.correlations import MIN_PAIRS, POOLED
from leakfast.stats.ranking import alike
from leakfast.stats.wide import COSINES, YS, Leaks, leaks
from leakfast.storage import schema
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids

HEIGHT = 0.5  # cosine distance at which the tree of personas is cut
WITHIN = ("category", "cluster")
_METHOD = "permutation of personas inside strata, two-sided about the mean of ρ over such shuffles"


def distances(centroids: Centroids) -> tuple[np.ndarray, np.ndarray]:
    """(P,) which personas have a direction at every layer, and the condensed distances of those (scipy's pdist): 1 − their
    centered cosine, averaged over all layers."""
    near = np.mean([centroids.cosine(layer, "centered") for layer in centroids.layers], axis=0)
    known = np.isfinite(np.diag(near))
    apart = np.clip(1 - near[np.ix_(known, known)], 0, 2)
    return known, scipy.spatial.distance.squareform((apart + apart.T) / 2, checks=False)


def clusters(centroids: Centroids, height: float = HEIGHT) -> dict[str, int]:
    """Persona → cluster: average linkage of cosine distance, the tree cut at `height` (scipy's fcluster, `distance`).

    The distance of two personas is 1 − their centered cosine, averaged over all layers: one grouping for all, since a p
    that pays for the best layer needs one and the same shuffle everywhere, and one that no look at leakage has chosen.
    It is the cosine distance of unit-length centroids of all layers laid end to end. A persona whose centroid has length
    0 at a layer is a cluster of its own. Raises ValueError for a height that is not above 0."""
    if not height > 0:
        raise ValueError(f"height {height}: a cosine distance above 0 is needed, at most 2")
    if len(centroids.metadata["centered_on"]) < 2:
        return {name: number for number, name in enumerate(centroids.personas)}
    known, apart = distances(centroids)
    own = {name: -1 - number for number, name in enumerate(centroids.personas)}
    if known.sum() > 1:
        tree = scipy.cluster.hierarchy.linkage(apart, "average")
        found = scipy.cluster.hierarchy.fcluster(tree, height, "distance")
        names = np.array(centroids.personas, dtype=object)[known]
        own |= {name: int(code) for name, code in zip(names, found, strict=True)}
    return own


def correlate_within(
    pairs: pl.DataFrame,
    centroids: Centroids | None,
    permutations: int,
    seed: int = 0,
    workers: int | None = None,
    height: float = HEIGHT,
) -> pl.DataFrame:
    """Schema `restricted`: ρ of cosine and leakage with p of shuffles inside categories, and inside clusters.

    One row per behavior, training seed, source (and `pooled`: one shuffle moves a persona's rates under all sources),
    layer, cosine, y and `within`. `rho` is Spearman's over all bystanders (pooled, of ranks within each source); `expected` its
    exact mean over such shuffles
    (what the strata's means alone give); `p` and `p_max` are of the distance between the two (`resample.permute_within`).
    Null hypothesis: within a stratum, which persona has which leakage is exchangeable; strata may differ in any way.
    Resampling unit: the persona, inside its stratum. `movable`: personas that have another in their stratum; below 4 all
    is null with a reason. A persona without a category is a stratum of its own. `height` and `sizes` say what the
    clusters are (`clusters`). Same pairs and seed, same bits, whatever the order of rows and the number of threads."""
    grouped = None if centroids is None else clusters(centroids, height)
    rows: list[dict] = []
    for behavior, train_seed, whole in leaks(pairs):
        scopes: list[tuple[str | None, str, np.ndarray]] = [
            (adapter, source, whole.adapter == code) for code, (adapter, source) in enumerate(whole.adapters)
        ]
        scopes.append((None, POOLED, np.ones(len(whole.adapter), dtype=bool)))
        for adapter, source, inside in scopes:
            for kind in WITHIN:
                strata = _strata(whole, kind, grouped)
                drawn = derive_seed("restricted", seed, behavior, train_seed, adapter or POOLED, kind)
                told = {
                    "behavior": behavior,
                    "seed": train_seed,
                    "source": source,
                    "adapter": adapter,
                    "within": kind,
                    "height": height if kind == "cluster" and grouped is not None else None,
                    "resampling_unit": "persona inside its " + kind,
                    "method": _METHOD,
                }
                why = None
                if source == POOLED and (twins := whole.twins()):
                    why = f"{', '.join(twins)} has more than one adapter: a pool takes one for each source"
                if strata is None:
                    why = "the run has no centroids to make clusters of"
                for cell in _cells(whole, inside, strata, (permutations, drawn, workers), why):
                    rows.append(told | cell)
    columns = schema.columns("restricted")
    return schema.check(pl.DataFrame(rows, schema=columns), "restricted")


def _strata(whole: Leaks, kind: str, grouped: dict[str, int] | None) -> np.ndarray | None:
    """(n,) codes; None for clusters without centroids. What has no stratum is one of its own."""
    if kind == "cluster" and grouped is None:
        return None
    kinds = (
        whole.category
        if kind == "category"
        else [None if (g := grouped.get(p)) is None else g for p in whole.persona]
    )
    named = [f"in {k}" if k is not None else f"alone {p}" for k, p in zip(kinds, whole.persona, strict=True)]
    return np.unique(np.array(named), return_inverse=True)[1]


def _cells(
    whole: Leaks,
    inside: np.ndarray,
    strata: np.ndarray | None,
    draws: tuple[int, int, int | None],
    why: str | None,
) -> Iterator[dict]:
    """Every layer × cosine × y over the rows `inside`; layers known for the same rows are solved together."""
    for cosine in COSINES:
        tested: dict[tuple, tuple] = {}
        for y_name in YS:
            x, y = whole.x[cosine], whole.y[y_name]
            usable = np.isfinite(x) & (np.isfinite(y) & inside)[:, None]
            solved: dict[int, dict] = {}
            for mask, members in alike(usable):
                rows = np.nonzero(mask)[0]
                key = (mask.tobytes(), members.tobytes(), y[rows].tobytes())
                sides = (x[np.ix_(rows, members)], (y_name, y[rows]))
                cells, tested[key] = _solve(whole, rows, sides, strata, draws, why, tested.get(key))
                solved.update(zip(members.tolist(), cells, strict=True))
            for j, layer in enumerate(whole.layers):
                yield {"layer": layer, "cosine": cosine, "y": y_name, **solved[j]}


def _solve(
    whole: Leaks,
    rows: np.ndarray,
    sides: tuple[np.ndarray, tuple[str, np.ndarray]],
    strata: np.ndarray | None,
    draws: tuple[int, int, int | None],
    why: str | None,
    tested: tuple | None,
) -> tuple[list[dict], tuple | None]:
    """The values of some layers, all over the same rows. sides: x (n, K), the name and values of y; tested: what was found for
    another y of these values, None for nothing yet. Gives that back beside the cells."""
    permutations, seed, workers = draws
    x, (name, values) = sides
    told: dict = {"n": len(rows)}
    if why is None and len(rows) < MIN_PAIRS:
        why = f"{len(rows)} pairs with both values; at least {MIN_PAIRS} are needed"
    if why is None and np.ptp(values) == 0:
        why = f"{name} is {values[0]:g} for all {len(rows)} bystanders"
    if why is not None or strata is None:
        return [told | {"reason": why}] * x.shape[1], None
    people = np.unique(whole.persona[rows], return_inverse=True)[1]
    one_each = np.unique(people, return_index=True)[1]
    sizes = np.sort(np.unique(strata[rows][one_each], return_counts=True)[1])[::-1]
    block = whole.adapter[rows]
    if len(np.unique(block)) > 1:  # pooled: of ranks within each source, as in the correlations
        x, values = within(x, block), within(values[:, None], block)[:, 0]
    told |= {"personas": len(one_each), "strata": len(sizes), "sizes": _listed(sizes)}
    if tested is None:
        tested = (
            spearman_and_pearson(x, values)[0],
            resample.permute_within(
                x.T,
                values,
                permutations,
                seed,
                stratum=strata[rows],
                person=people,
                block=block,
                workers=workers,
            ),
        )
    rho, found = tested
    told["movable"] = found.movable
    out = []
    for j in range(x.shape[1]):
        if np.isnan(rho[j]):
            out.append(told | {"reason": f"the cosine is the same for all {len(rows)} bystanders"})
            continue
        cell = told | {"rho": float(rho[j]), "expected": float(found.expected[j])}
        if found.movable < MIN_PAIRS:
            cell["reason"] = f"{found.movable} personas can move; at least {MIN_PAIRS} are needed"
        elif np.isnan(found.p[j]):
            cell["reason"] = f"cosine and {name} vary together inside no stratum"
        elif not permutations:
            cell["reason"] = "no permutation was asked for"
        else:
            cell |= {"p": float(found.p[j]), "p_max": float(found.p_max[j])}
            cell |= {"permutations": permutations, "permutation_seed": seed}
        out.append(cell)
    return out, tested


def _listed(sizes: np.ndarray) -> str:
    """Sizes, largest first: `22, 11, 7 × 3, 1 × 30`."""
    return ", ".join(f"{size} × {n}" if n > 1 else f"{size}" for size, n in Counter(sizes.tolist()).items())
