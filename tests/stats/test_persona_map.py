"""The plane of personas: distances that fit a plane come back exactly, stress and neighbours kept by their definitions,
and the row puts near ones together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from leakfast.geometry import Centroids
from leakfast.stats.persona_map import in_a_row, persona_map


def _centroids(means: np.ndarray) -> Centroids:
    names = [f"p{i}" for i in range(len(means))]
    told = {"centered_on": names, "personas": names, "layers": [3]}
    return Centroids(names, [3], told, {3: np.asarray(means, np.float32)})


def test_a_geometry_of_two_dimensions_is_kept_whole():
    """Unit vectors around a full circle sum to zero, so centering leaves them, and their chords lie in a plane."""
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    found = persona_map(_centroids(np.column_stack([np.cos(angle), np.sin(angle)])), 3)
    assert found.stress == pytest.approx(0, abs=1e-6)
    assert found.variance == pytest.approx(1)
    assert found.kept == pytest.approx(1)
    chords = pdist(np.column_stack([np.cos(angle), np.sin(angle)]))
    assert pdist(found.points.select("x", "y").to_numpy()) == pytest.approx(chords, abs=1e-6)


def test_stress_and_neighbours_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    centroids = _centroids(rng.normal(size=(30, 12)))
    found = persona_map(centroids, 3)
    near = centroids.cosine(3)
    apart = np.sqrt(np.maximum(2 - 2 * near, 0))
    at = found.points.select("x", "y").to_numpy()
    shown = np.linalg.norm(at[:, None] - at[None], axis=-1)
    pairs = np.triu_indices(30, 1)
    assert found.stress == pytest.approx(
        np.sqrt(((apart - shown)[pairs] ** 2).sum() / (apart[pairs] ** 2).sum())
    )
    kept = []
    for i in range(30):
        others = [j for j in range(30) if j != i]
        nearest = [set(sorted(others, key=lambda j, d=d, i=i: d[i, j])[:10]) for d in (apart, shown)]
        kept.append(len(nearest[0] & nearest[1]) / 10)
    assert found.kept == pytest.approx(np.mean(kept))
    assert 0 < found.variance < 1
    assert f"stress {found.stress:.2f}" in found.caption()
    assert f"{100 * found.kept:.0f} % of the 10 nearest" in found.caption()
    assert "by chance 34 %" in found.caption()


def test_a_persona_without_a_direction_is_left_out_and_named():
    means = np.random.default_rng(1).normal(size=(8, 5))
    means[2] = np.nan
    found = persona_map(_centroids(means), 3)
    assert found.left_out == ("p2",)
    assert found.points["persona"].to_list() == [f"p{i}" for i in range(8) if i != 2]
    assert "p2" in found.caption()
    with pytest.raises(ValueError, match="a map needs 4"):
        persona_map(_centroids(np.eye(3)), 3)
    with pytest.raises(ValueError, match="cosine must be"):
        persona_map(_centroids(np.eye(5)), 3, "cosine")


def test_near_personas_stand_together_in_the_row():
    rng = np.random.default_rng(2)
    middles = 5 * np.eye(3, 6)
    kind = rng.permutation(np.repeat([0, 1, 2], 6))
    row = in_a_row(_centroids(middles[kind] + 0.1 * rng.normal(size=(18, 6))))
    order = [int(kind[int(name[1:])]) for name in row]
    assert sum(a != b for a, b in zip(order, order[1:], strict=False)) == 2
    assert sorted(row) == sorted(f"p{i}" for i in range(18))
