"""Shuffles inside strata against all permutations of a tiny case, the free test and the replayed draws; clusters of the
geometry against scipy; the table's reasons."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations, product

import numpy as np
import polars as pl
import pytest
import scipy.stats
from scipy.cluster.hierarchy import average, fcluster
from scipy.spatial.distance import pdist

from leakfast.geometry import Centroids
from leakfast.stats import compiled, resample, restricted
from leakfast.stats.pairs import table as pair_table


def _doubled(values) -> list[int]:
    return [int(2 * r) for r in scipy.stats.rankdata(values)]


def _all_within(stratum: np.ndarray):
    """Every order of the rows that keeps each in its stratum."""
    members = [np.nonzero(stratum == g)[0] for g in np.unique(stratum)]
    for orders in product(*(permutations(m) for m in members)):
        moved = np.arange(len(stratum))
        for mine, order in zip(members, orders, strict=True):
            moved[mine] = order
        yield moved


def _exact(x, y, stratum) -> tuple[Fraction, Fraction]:
    """(exact p over all permutations inside strata, mean of Σ rank·rank over them), of doubled centered ranks."""
    a, b = ([r - (len(y) + 1) for r in _doubled(v)] for v in (x, y))
    sums = [sum(p * b[j] for p, j in zip(a, moved, strict=True)) for moved in _all_within(stratum)]
    mean = Fraction(sum(sums), len(sums))
    own = abs(sum(p * q for p, q in zip(a, b, strict=True)) - mean)
    return Fraction(sum(abs(s - mean) >= own for s in sums), len(sums)), mean


@pytest.mark.parametrize("seed", range(6))
def test_p_is_that_of_all_permutations_inside_the_strata(seed):
    """Strata of 4, 3 and 1 with ties in y: 144 permutations, each equally likely."""
    rng = np.random.default_rng(seed)
    stratum = np.array([0, 1, 0, 2, 1, 0, 1, 0])
    x, y = rng.normal(size=8), rng.integers(0, 4, 8).astype(float)
    exact, mean = _exact(x, y, stratum)
    found = resample.permute_within(x[None], y, 40_000, seed, stratum=stratum)
    assert abs(found.p[0] - float(exact)) < 5 * np.sqrt(0.25 / 40_000)
    ranks = [np.array(_doubled(v)) - 9 for v in (x, y)]
    size = np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    assert found.expected[0] == float(mean) / size
    assert found.movable == 7
    assert scipy.stats.spearmanr(x, y).statistic == pytest.approx((ranks[0] @ ranks[1]) / size)


def test_numpys_permutation_test_agrees():
    """scipy's, over all orders, with one stratum: the free test, two-sided about 0."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=7), rng.normal(size=7)
    told = scipy.stats.permutation_test(
        (y,), lambda v: scipy.stats.spearmanr(x, v).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    found = resample.permute_within(x[None], y, 40_000, 1, stratum=np.zeros(7, int))
    assert abs(found.p[0] - told.pvalue) < 5 * np.sqrt(0.25 / 40_000)


def test_one_stratum_is_the_free_test_to_the_bit():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(5, 60)), np.round(rng.normal(size=60), 1)
    free = resample.permute_spearman(x, y, 3_000, 9, workers=1)
    for workers in (1, 3):
        one = resample.permute_within(x, y, 3_000, 9, stratum=np.zeros(60, int), workers=workers)
        assert np.array_equal(one.p, free.p) and np.array_equal(one.p_max, free.p_max)
        assert (one.expected == 0).all() and one.movable == 60


def test_every_shuffle_keeps_strata_and_is_drawn_as_often():
    own = np.array([1, 0, 0, 1, 0])
    members, starts = np.argsort(own, kind="stable"), np.array([0, 3, 5])
    sent, seen = np.empty(5, np.int64), {}
    for number in range(6_000):
        compiled.shuffle_within(np.uint64(3), number, members, starts, sent)
        assert (own[sent] == own).all() and sorted(sent) == list(range(5))
        seen[tuple(sent)] = seen.get(tuple(sent), 0) + 1
    assert len(seen) == 12
    assert scipy.stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_a_source_that_is_no_bystander_of_itself_is_passed_over_in_its_block():
    """Pooled over two sources, each absent from its own block: the exact p over all shuffles of six personas in two
    strata, one shuffle for both blocks."""
    rng = np.random.default_rng(2)
    own = np.array([0, 0, 0, 1, 1, 1])
    block, person = np.nonzero(np.arange(6)[None, :] != np.array([[0], [3]]))
    x, y = rng.normal(size=10), rng.integers(0, 5, 10).astype(float)
    position = resample.positions(person, block)
    a, b = (np.array(_doubled(v)) - 11 for v in (x, y))
    sums, rows = [], np.empty(10, np.int64)
    for sent in _all_within(own):
        compiled.follow(sent, person, block, position, rows)
        assert (own[person[rows]] == own[person]).all() and (block[rows] == block).all()
        sums.append(Fraction(int(a @ b[rows])))
    mean = sum(sums) / len(sums)
    exact = np.mean([abs(s - mean) >= abs(int(a @ b) - mean) for s in sums])
    found = resample.permute_within(x[None], y, 40_000, 4, stratum=own[person], person=person, block=block)
    assert found.expected[0] == pytest.approx(float(mean) / np.sqrt((a @ a) * (b @ b)), abs=1e-15)
    assert abs(found.p[0] - exact) < 5 * np.sqrt(0.25 / 40_000)


def test_what_does_not_vary_together_inside_a_stratum_has_no_p():
    stratum = np.repeat([0, 1], 5)
    x = np.stack([np.arange(10.0), stratum.astype(float)])
    found = resample.permute_within(x, np.arange(10.0)[::-1].copy(), 99, 0, stratum=stratum)
    alone = resample.permute_within(x[:1], np.arange(10.0)[::-1].copy(), 99, 0, stratum=stratum)
    assert np.isnan(found.p[1]) and np.isnan(found.p_max[1])
    assert found.p_max[0] == alone.p_max[0], "a layer that cannot move is no rival"
    with pytest.raises(ValueError, match="two strata"):
        resample.permute_within(x, np.arange(10.0), 9, 0, stratum=np.arange(10), person=np.arange(10) // 2)


# ---------------------------------------------------------------- clusters and the table


def _centroids(layers: int = 2, people: int = 24, seed: int = 0) -> Centroids:
    rng = np.random.default_rng(seed)
    middle = np.repeat(rng.normal(size=(4, 8)), people // 4, axis=0)
    named = [f"p{i:02d}" for i in range(people)]
    means = {k: (middle + 0.4 * rng.normal(size=middle.shape)).astype(np.float32) for k in range(layers)}
    return Centroids(named, list(range(layers)), {"centered_on": named}, means)


def test_clusters_are_scipys_of_all_layers_laid_end_to_end():
    made = _centroids(3)
    unit = []
    for layer in made.layers:
        c = made.layer(layer).astype(np.float64)
        c -= c.mean(0)
        unit.append(c / np.linalg.norm(c, axis=1, keepdims=True))
    told = fcluster(average(pdist(np.hstack(unit), "cosine")), 0.5, "distance")
    found = restricted.clusters(made)
    ours = [found[name] for name in made.personas]
    assert len(set(zip(told, ours, strict=True))) == len(set(told)) == len(set(ours)) > 2
    assert len(set(restricted.clusters(made, 2.0).values())) == 1
    with pytest.raises(ValueError, match="height 0"):
        restricted.clusters(made, 0)


def test_a_centroid_without_direction_is_a_cluster_of_its_own():
    made = _centroids()
    made.metadata["centered_on"] = made.personas[:2]
    made.means[1][1], made.means[1][5] = -made.means[1][0], 0.0
    found = restricted.clusters(made)
    assert np.isnan(made.cosine(1)[5, 5]) and np.isfinite(np.delete(np.diag(made.cosine(1)), 5)).all()
    assert len(found) == 24 and sum(code == found["p05"] for code in found.values()) == 1


def _rates(made: Centroids, categories: dict[str, str | None], seed: int = 1) -> pl.DataFrame:
    rng, rows = np.random.default_rng(seed), []
    for source in made.personas[:2]:
        for name in made.personas:
            role = "source" if name == source else "bystander"
            rate = float(rng.integers(0, 40)) / 40
            rows.append(
                ("marker", f"marker-{source}", source, 42, name, categories[name], role, rate, 0.0, rate)
            )
    names = "behavior adapter source seed persona category role rate baseline delta".split()
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(
        pl.col("category").cast(pl.String),
        *[pl.lit(None, pl.Float64).alias(c) for c in ("ci_low", "ci_high")],
    )


def test_the_table_says_what_was_shuffled():
    made = _centroids()
    kinds = {name: f"kind {i % 3}" for i, name in enumerate(made.personas)}
    pairs = pair_table(_rates(made, kinds), made)
    found = restricted.correlate_within(pairs, made, 199, 5, 1)
    assert found.height == 3 * 2 * 2 * 2 * 2  # scopes, kinds of strata, layers, cosines, ys
    assert found["p"].null_count() == 0 and (found["p_max"] >= found["p"]).all()
    whole = found.filter(source="p00", within="category", layer=0, cosine="centered", y="rate").row(
        0, named=True
    )
    assert (whole["strata"], whole["sizes"], whole["movable"]) == (3, "8 × 2, 7", 23)
    assert whole["height"] is None and found.filter(within="cluster")["height"].unique().to_list() == [0.5]
    shuffled = pairs.sample(fraction=1, shuffle=True, seed=1)
    keys = ["source", "within", "layer", "cosine", "y"]
    again = restricted.correlate_within(shuffled, made, 199, 5, 2)
    assert again.sort(keys).equals(found.sort(keys)), "neither rows' order nor threads change a bit"


def test_too_few_that_can_move_and_no_centroids_are_reasons():
    made = _centroids()
    alone = {name: name if i > 3 else "same" for i, name in enumerate(made.personas)}
    pairs = pair_table(_rates(made, alone), made)
    found = restricted.correlate_within(pairs, None, 49, 0, 1)
    kept = found.filter(within="category", source="p00")
    assert kept["reason"].unique().to_list() == ["3 personas can move; at least 4 are needed"]
    assert kept["p"].null_count() == kept.height and kept["rho"].null_count() == 0
    grouped = found.filter(within="cluster")
    assert grouped["reason"].unique().to_list() == ["the run has no centroids to make clusters of"]
    unnamed = pair_table(_rates(made, dict.fromkeys(made.personas)), made)
    none = restricted.correlate_within(unnamed, made, 49, 0, 1).filter(within="category")
    assert none["movable"].unique().to_list() == [0], "a persona without a category is one of its own"
