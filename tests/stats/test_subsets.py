"""ρ over subsets, ranked anew in each, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from leakfast.stats.association import within
from leakfast.stats.subsets import spearman_of_subsets


def drawn(n=47, columns=5, subsets=30, seed=0):
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(size=(columns, n)), 1)  # with ties
    return x, np.round(x[0] + rng.normal(size=n), 1), rng.random((subsets, n)) < 0.5


def test_every_subset_is_scipys():
    x, y, member = drawn()
    told = [[spearmanr(column[m], y[m])[0] for column in x] for m in member]
    assert np.allclose(spearman_of_subsets(x, y, member), told, atol=1e-14, rtol=0)


@pytest.mark.parametrize("sizes", [(20, 20), (13, 20, 7, 7), (1, 45, 1)])
def test_blocks_are_ranked_within_and_then_together(sizes):
    """Blocks of unlike sizes, some of one row: (rank − ½)/size of different blocks may be equal, and then ties."""
    n = sum(sizes)
    x, y, member = drawn(n)
    block = np.repeat(np.arange(len(sizes)), sizes)
    told = [
        [spearmanr(*(within(side[m][:, None], block[m])[:, 0] for side in (column, y)))[0] for column in x]
        for m in member
    ]
    assert np.allclose(spearman_of_subsets(x, y, member, block), told, atol=1e-14, rtol=0)


def test_a_subset_without_some_block_and_one_that_does_not_vary():
    x, y, _ = drawn(12, 2)
    block = np.repeat([0, 1, 2], 4)
    member = np.zeros((3, 12), bool)
    member[0, 4:8] = True
    member[1, [0, 1, 8, 9]] = True
    y[10:] = y[11]
    member[2, 10:] = True
    found = spearman_of_subsets(x, y, member, block)
    assert found[0] == pytest.approx([spearmanr(c[4:8], y[4:8])[0] for c in x])
    assert np.isfinite(found[1]).all() and np.isnan(found[2]).all()


def test_threads_change_no_bit_and_faulty_input_is_refused():
    x, y, member = drawn(60, 4, 33)
    assert (
        spearman_of_subsets(x, y, member, workers=1) == spearman_of_subsets(x, y, member, workers=3)
    ).all()
    with pytest.raises(ValueError, match="do not fit"):
        spearman_of_subsets(x, y, member[:, 1:])
    with pytest.raises(ValueError, match="ascending"):
        spearman_of_subsets(x, y, member, np.tile([0, 1], 30))
    y[3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        spearman_of_subsets(x, y, member)


def test_several_y_are_each_as_if_alone():
    x, y, member = drawn(60, 4, 33)
    ys, block = np.stack([y, np.round(2 * y), x[1]]), np.repeat([0, 1, 2], [25, 15, 20])
    found = spearman_of_subsets(x, ys, member, block)
    assert found.shape == (33, 3, 4)
    for k, one in enumerate(ys):
        assert np.array_equal(found[:, k], spearman_of_subsets(x, one, member, block))
