"""The source's place among all personas put in its stead."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from leakfast.geometry import Centroids
from leakfast.stats import specificity
from leakfast.stats.correlations import POOLED


def geometry(rng, people: int, dims: int = 8, width: int = 64, layers=(0,)) -> Centroids:
    """Centroids in a few effective dimensions, as those of personas are."""
    names = [f"p{i}" for i in range(people)]
    means = {}
    for layer in layers:
        low = rng.normal(size=(people, dims)) * np.geomspace(3, 1, dims)
        means[layer] = (low @ rng.normal(size=(dims, width)) + 0.1 * rng.normal(size=(people, width))).astype(
            "f4"
        )
    return Centroids(names, list(layers), {"centered_on": names}, means)


def pairs_of(centroids: Centroids, sources, leak, seed=None) -> pl.DataFrame:
    """leak: source's name → (P,) rate of every persona under its adapter."""
    rows = []
    for source in sources:
        for layer in centroids.layers:
            cos = {
                kind: centroids.cosine(layer, kind)[centroids.personas.index(source)]
                for kind in ("centered", "raw")
            }
            for i, name in enumerate(centroids.personas):
                if name != source:
                    rate = float(leak[source][i])
                    rows.append(
                        (
                            "marker",
                            source,
                            name,
                            None,
                            layer,
                            *(float(cos[k][i]) for k in cos),
                            rate,
                            None,
                            seed,
                            source,
                        )
                    )
    names = (
        "behavior source persona category layer cosine_centered cosine_raw rate delta seed adapter".split()
    )
    types = {"category": pl.String, "layer": pl.Int32, "delta": pl.Float64, "seed": pl.Int64}
    return pl.DataFrame(rows, schema=names, orient="row", schema_overrides=types)


def made(centroids, sources, leak, bootstraps=0, related=None):
    table = specificity.table(pairs_of(centroids, sources, leak), centroids, related or {}, bootstraps)
    return table.filter(y="rate", cosine="centered")


def test_each_candidates_rho_is_scipys_over_the_bystanders_but_itself():
    rng = np.random.default_rng(0)
    cosines, y = geometry(rng, 20).cosine(0), rng.integers(0, 6, 20) / 6.0
    found = specificity.candidate_rhos(cosines, y, 3)
    for candidate in range(20):
        kept = [i for i in range(20) if i not in (3, candidate)]
        assert found[candidate] == pytest.approx(spearmanr(cosines[candidate][kept], y[kept])[0], abs=1e-12)


def test_leakage_along_another_persona_is_large_and_not_specific():
    rng = np.random.default_rng(1)
    centroids = geometry(rng, 60, dims=3)
    cosines = centroids.cosine(0)
    other = int(np.argsort(-cosines[0])[2])  # near the source
    row = made(centroids, ["p0"], {"p0": 0.5 + 0.4 * cosines[other]}).row(0, named=True)
    assert row["spearman"] > 0.6 and row["best_other"] == f"p{other}" and row["rank"] > 1
    assert row["best_other_spearman"] == pytest.approx(1.0)
    own = made(centroids, ["p0"], {"p0": 0.5 + 0.4 * cosines[0]}).row(0, named=True)
    assert (own["rank"], own["rank_signed"], own["candidates"]) == (1, 1, 60)
    assert own["p_source"] == pytest.approx(1 / 60) and own["spearman"] == pytest.approx(1.0)


def test_related_candidates_are_told_apart_and_mirror_images_are_signed():
    rng = np.random.default_rng(2)
    centroids = geometry(rng, 30, dims=3)
    near = centroids.cosine(0)[0]
    twin, mirror = f"p{np.argsort(-near)[1]}", f"p{np.argsort(near)[0]}"
    leak = {"p0": 0.5 + 0.4 * near + 0.02 * rng.normal(size=30)}
    row = made(centroids, ["p0"], leak, related={twin: ("p0",)}).row(0, named=True)
    assert row["unrelated"] == 29 and row["rank_unrelated"] <= row["rank"]
    both = made(centroids, ["p0"], leak, related={"p0": (mirror,)}).row(0, named=True)
    assert both["unrelated"] == 29
    assert row["rank_signed"] <= row["rank"]


def test_picking_a_layer_is_paid_for_and_ties_count_against_the_source():
    rng = np.random.default_rng(3)
    centroids = geometry(rng, 40, layers=(0, 1, 2))
    table = made(centroids, ["p0"], {"p0": rng.random(40)})
    assert table["layers_tested"].to_list() == [3, 3, 3]
    assert (table["p_source_max"] >= table["p_source"] - 1e-12).all()
    best = table.sort(pl.col("spearman").abs(), descending=True).row(0, named=True)
    assert best["p_source_max"] < 1
    alike = Centroids(
        centroids.personas, [0], {"centered_on": centroids.personas}, {0: centroids.means[0].copy()}
    )
    alike.means[0][1:] = alike.means[0][1]  # every other persona at one place
    row = made(alike, ["p0"], {"p0": rng.random(40)}).row(0, named=True)
    assert row["spearman"] is None and "same for all bystanders" in row["reason"]


def test_the_interval_of_the_difference_holds_it_and_is_over_the_bystanders_of_both():
    rng = np.random.default_rng(4)
    centroids = geometry(rng, 60)
    near = centroids.cosine(0)
    row = made(centroids, ["p0"], {"p0": near[0] + 0.2 * rng.normal(size=60)}, bootstraps=500).row(
        0, named=True
    )
    y = pairs_of(centroids, ["p0"], {"p0": np.zeros(60)})
    assert y.height == 59
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert row["bootstraps"] == 500 and row["ci_reason"] is None


def test_pooled_adds_the_sources_ps():
    rng = np.random.default_rng(5)
    centroids = geometry(rng, 50)
    near = centroids.cosine(0)
    sources = ["p0", "p7", "p21"]
    leak = {s: near[int(s[1:])] + 0.1 * rng.normal(size=50) for s in sources}
    table = made(centroids, sources, leak)
    single, pooled = table.filter(pl.col("source") != POOLED), table.filter(source=POOLED).row(0, named=True)
    total = single["p_source"].sum()
    assert pooled["p_source"] == pytest.approx(total**3 / 6)  # the sum is below 1
    assert pooled["spearman"] == pytest.approx(single["spearman"].mean())
    assert made(centroids, ["p0"], leak).filter(source=POOLED).is_empty()


def test_edgington_is_the_distribution_of_a_sum_of_uniforms():
    assert specificity.edgington(np.array([0.3])) == pytest.approx(0.3)
    assert specificity.edgington(np.array([0.6, 0.9])) == pytest.approx(1 - 0.5**2 / 2)
    assert specificity.edgington(np.full(12, 0.5)) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    sums = rng.random((200_000, 25)).sum(1)
    for p in (0.4, 0.45):  # more sources than the exact sum can bear
        assert specificity.edgington(np.full(25, p)) == pytest.approx((sums <= 25 * p).mean(), abs=4e-3)
    twenty = np.full(20, 0.42)
    assert specificity.edgington(twenty) == pytest.approx(
        (rng.random((200_000, 20)).sum(1) <= 8.4).mean(), abs=4e-3
    )


def test_a_source_without_a_direction_says_so():
    rng = np.random.default_rng(6)
    centroids = geometry(rng, 12)
    without = Centroids(
        centroids.personas[1:], [0], {"centered_on": centroids.personas[1:]}, {0: centroids.means[0][1:]}
    )
    pairs = pairs_of(centroids, ["p0"], {"p0": rng.random(12)})
    table = specificity.table(pairs, without, {}, 0)
    assert table.height == 4 and set(table["reason"]) == {"the source has no centroid"}


@pytest.mark.slow
@pytest.mark.parametrize("null", ["random direction", "another persona"])
@pytest.mark.parametrize("sources", [1, 5])
def test_type_one_error_with_sources_drawn_uniformly(null, sources):
    """p_source and p_source_max over 5,000 trials each; the free permutation rejects in most of them."""
    rng = np.random.default_rng(7)
    trials, people = 5_000, 111
    centroids = geometry(rng, people, layers=(0, 1, 2))
    centered = [centroids.means[k] - centroids.means[k].mean(0) for k in (0, 1, 2)]
    cosines = [centroids.cosine(k) for k in (0, 1, 2)]
    ranked = [[specificity.ranks_without(c, source) for c in cosines] for source in range(people)]
    hits = dict.fromkeys(("single", "max"), 0)
    for _ in range(trials):
        singles, best, at = [], [], rng.integers(3)  # the pattern lies in one of three layers
        if null == "random direction":
            way = centered[at] @ rng.normal(size=centered[at].shape[1])
            pattern = way / way.std()
        else:
            pattern = cosines[at][rng.integers(people)] / cosines[at].std()
        for source in rng.choice(people, sources, replace=False):
            y = pattern + 0.5 * rng.normal(size=people)
            ours = specificity.ranks_without(np.broadcast_to(y, (people, people)), source)
            rho = np.abs([specificity.rank_rhos(x, ours) for x in ranked[source]])
            singles.append((rho[1] >= rho[1][source] - 1e-12).mean())
            top = rho.max(0)
            best.append((top >= top[source] - 1e-12).mean())
        hits["single"] += specificity.edgington(np.array(singles)) <= 0.05
        hits["max"] += specificity.edgington(np.array(best)) <= 0.05
    shares = {name: count / trials for name, count in hits.items()}
    print(null, sources, shares)
    assert all(0.035 <= share <= 0.06 for share in shares.values()), shares
