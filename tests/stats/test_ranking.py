"""Average ranks equal scipy's to the bit, ties, infinities and blocks included; columns known in the same rows are found."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import rankdata

from leakfast.stats.ranking import alike, average_ranks, ranks_within


def _values(rng, kind: str, shape) -> np.ndarray:
    if kind == "continuous":
        return rng.normal(size=shape)
    values = rng.integers(-2, 3, shape) / 7.0
    if kind == "infinite":
        values[rng.random(shape) < 0.2] = -np.inf
        values[rng.random(shape) < 0.1] = np.inf
    values[values == 0] *= rng.choice([-1.0, 1.0], (values == 0).sum())  # 0 and −0 are equal
    return values


@pytest.mark.parametrize("kind", ["continuous", "tied", "infinite"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 110), (2, 661)])
def test_average_ranks_are_those_of_scipy(kind, shape):
    values = _values(np.random.default_rng(0), kind, shape)
    assert np.array_equal(average_ranks(values), rankdata(values, axis=1))
    assert np.array_equal(average_ranks(values.T.copy().T), rankdata(values, axis=1)), "any layout"


@pytest.mark.parametrize("kind", ["continuous", "tied", "infinite"])
def test_ranks_within_a_block_are_those_of_its_rows_alone(kind):
    rng = np.random.default_rng(1)
    values, block = _values(rng, kind, (4, 90)), rng.choice([7, 3, 11, -1], 90, p=[0.5, 0.3, 0.19, 0.01])
    rank, size = ranks_within(values, block)
    for one in np.unique(block):
        mine = block == one
        assert np.array_equal(rank[:, mine], rankdata(values[:, mine], axis=1))
        assert (size[mine] == mine.sum()).all()


def test_a_row_with_nan_has_no_ranks_and_its_neighbours_do():
    values = np.random.default_rng(2).normal(size=(3, 8))
    values[1, 4] = np.nan
    for found in (average_ranks(values), ranks_within(values, np.arange(8) % 2)[0]):
        assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()
    assert np.isnan(rankdata(values, axis=1)[1]).all()


def test_columns_known_in_the_same_rows():
    usable = np.ones((6, 5), dtype=bool)
    [(rows, columns)] = alike(usable)
    assert rows.all() and columns.tolist() == [0, 1, 2, 3, 4]
    usable[2, [1, 3]] = False
    found = {tuple(rows.tolist()): columns.tolist() for rows, columns in alike(usable)}
    assert sorted(found.values()) == [[0, 2, 4], [1, 3]]
    assert all((rows == usable[:, columns].T).all() for rows, columns in found.items())
    assert list(alike(usable[:, :0])) == []
