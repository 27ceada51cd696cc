"""Directions from centroids of which one is not finite: it is left out of means, and refused where it is named."""

from __future__ import annotations

import numpy as np
import pytest

from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.steering.directions import of_centroids

NAMES = ["villain", "comedian", "poet", "broken"]


def centroids(names, means):
    told = {"centered_on": list(names), "model_fingerprint": "f"}
    return Centroids(list(names), [1], told, {1: np.array(means, np.float32)})


@pytest.mark.parametrize("kind", ["source-mean", "contrast", "difference"])
def test_a_centroid_that_is_not_finite_is_left_out_of_means_and_lengths(kind):
    """A strength in residual lengths was no number, and so was every state that was steered by it."""
    rows = [[3.0, 4.0], [0.0, 5.0], [6.0, 8.0], [np.nan, 1.0]]
    against = ["comedian"] if kind == "difference" else []
    found = of_centroids(centroids(NAMES, rows), kind, "villain", against)
    alone = of_centroids(centroids(NAMES[:3], rows[:3]), kind, "villain", against)
    assert np.array_equal(found.vectors[1], alone.vectors[1])
    assert found.residual_norms == alone.residual_norms == {1: 20 / 3}


@pytest.mark.parametrize("against", [["broken"], ["comedian", "broken"]])
def test_one_that_is_named_is_refused(against):
    rows = [[3.0, 4.0], [0.0, 5.0], [6.0, 8.0], [np.nan, 1.0]]
    with pytest.raises(InputError, match="NaN"):
        of_centroids(centroids(NAMES, rows), "contrast", "villain", against)
