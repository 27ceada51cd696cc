"""Personas in a plane and in a row, from the cosines of their centroids: what a picture of the geometry shows, with how
much of it the picture keeps. Demands centroids; leaves drawing to `figures`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import pdist, squareform

from leakfast.geometry import Centroids
from leakfast.stats.restricted import distances

NEIGHBOURS = 10


@dataclass(frozen=True)
class PersonaMap:
    """points: persona, x, y (Float64, in units of distance), a row a persona with a direction at the layer.

    stress: Kruskal's stress-1 (0: every distance kept). variance: share of the positive eigenvalues' sum that the two
    axes hold. kept: mean share of a persona's k nearest (by cosine) that are among its k nearest in the plane; by
    chance it is k / (P − 1). left_out: personas whose centroid has no direction."""

    points: pl.DataFrame
    layer: int
    cosine: str
    stress: float
    variance: float
    neighbours: int
    kept: float
    left_out: tuple[str, ...]

    def caption(self) -> str:
        """Method, stress, variance and neighbours kept, in words."""
        by_chance = self.neighbours / (self.points.height - 1)
        told = (
            f"Classical multidimensional scaling of the {self.cosine} cosines of {self.points.height} personas' "
            f"centroids, layer {self.layer} (distance √(2 − 2 cos)): stress {self.stress:.2f}, two axes hold "
            f"{100 * self.variance:.0f} % of the variance, {100 * self.kept:.0f} % of the {self.neighbours} nearest "
            f"neighbours are kept (by chance {100 * by_chance:.0f} %)."
        )
        return told + (f" Without a direction: {', '.join(self.left_out)}." if self.left_out else "")


def persona_map(centroids: Centroids, layer: int, cosine: str = "centered") -> PersonaMap:
    """Classical (Torgerson 1952) scaling of P personas to two dimensions from their (P, P) cosines C at a layer.

    Squared distance d² = 2 − 2C, that of unit vectors; B = −½ J d² J = J C J with J = I − 1/P; coordinates are the two
    leading eigenvectors of B times the root of their eigenvalues, each axis turned so that its largest coordinate in
    size is positive. Stress-1 = √(Σ (d − d̂)² / Σ d²) over pairs (Kruskal 1964), without a scale fitted. A picture of the
    base model's geometry: no estimate, no sampling error. Raises ValueError for fewer than 4 personas with a direction,
    for another layer or cosine."""
    near = centroids.cosine(layer, "raw" if cosine == "raw" else "centered")
    if cosine not in ("centered", "raw"):
        raise ValueError(f"cosine must be centered or raw, not {cosine!r}")
    known = np.isfinite(np.diag(near))
    names = [name for name, there in zip(centroids.personas, known, strict=True) if there]
    if len(names) < 4:
        raise ValueError(f"{len(names)} personas have a direction at layer {layer}; a map needs 4")
    near = near[np.ix_(known, known)]
    near = (near + near.T) / 2
    centred = near - near.mean(0) - near.mean(1)[:, None] + near.mean()
    sizes, axes = np.linalg.eigh(centred)
    sizes, axes = sizes[::-1], axes[:, ::-1]
    at = axes[:, :2] * np.sqrt(np.maximum(sizes[:2], 0))
    largest = at[np.abs(at).argmax(0), [0, 1]]
    at *= np.where(largest < 0, -1.0, 1.0)
    apart = np.sqrt(np.maximum(2 - 2 * squareform(near, checks=False), 0))
    shown = pdist(at)
    k = min(NEIGHBOURS, len(names) - 2)
    return PersonaMap(
        points=pl.DataFrame({"persona": names, "x": at[:, 0], "y": at[:, 1]}),
        layer=layer,
        cosine=cosine,
        stress=float(np.sqrt(((apart - shown) ** 2).sum() / (apart**2).sum())),
        variance=float(sizes[:2].clip(0).sum() / sizes.clip(0).sum()),
        neighbours=k,
        kept=_kept(squareform(apart), squareform(shown), k),
        left_out=tuple(name for name, there in zip(centroids.personas, known, strict=True) if not there),
    )


def _kept(apart: np.ndarray, shown: np.ndarray, k: int) -> float:
    """Mean share of the k nearest by one distance that are among the k nearest by the other; the earlier of equals."""
    nearest = []
    for distance in (apart, shown):
        distance = distance.copy()
        np.fill_diagonal(distance, np.inf)
        nearest.append(np.argsort(distance, axis=1, kind="stable")[:, :k])
    both = [len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True)]
    return float(np.mean(both) / k)


def in_a_row(centroids: Centroids) -> list[str]:
    """The personas so that near ones stand together: leaves of an average-linkage tree of 1 − centered cosine, averaged
    over all layers (the distance that `restricted.clusters` cuts), in the order with the least sum of neighbours'
    distances (Bar-Joseph et al. 2001). A persona without a direction comes last."""
    if len(centroids.personas) < 3 or len(centroids.metadata["centered_on"]) < 2:
        return list(centroids.personas)
    known, flat = distances(centroids)
    names = np.array(centroids.personas, dtype=object)
    if known.sum() < 3:
        return list(centroids.personas)
    tree = optimal_leaf_ordering(linkage(flat, "average"), flat)
    return [*names[known][leaves_list(tree)], *names[~known]]
