"""Each source's cosines in the place of every other's, where no centroids are known."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from leakfast.stats import among_sources, specificity
from leakfast.storage import schema

SOURCES = ["p0", "p1", "p2", "p3"]


def world(rng, people=40, layers=2, sources=SOURCES):
    """pairs of sources that lie among the personas, and cosines (layers, P, P)."""
    names = [f"p{i}" for i in range(people)]
    near = np.empty((layers, people, people))
    frames = []
    rates = {source: rng.random(people).round(2) for source in sources}
    for layer in range(layers):
        states = rng.normal(size=(people, 5))
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        near[layer] = states @ states.T
        for source in sources:
            k = names.index(source)
            rate = (rates[source] + 0.3 * near[0, k]).clip(0, 1)
            frame = {"behavior": "marker", "source": source, "seed": 42, "persona": names, "category": None}
            frame |= {"layer": layer, "cosine_centered": near[layer, k], "cosine_raw": None}
            frame |= {"rate": rate, "delta": None}
            made = pl.DataFrame(frame, schema=schema.columns("pairs")).with_columns(
                adapter=pl.lit(f"a-{source}")
            )
            frames.append(made.filter(pl.col("persona") != source))
    return pl.concat(frames), near


def made(pairs, related=None, bootstraps=0):
    return among_sources.table(pairs, related or {}, bootstraps, workers=1).filter(
        cosine="centered", y="rate"
    )


def test_ranks_are_those_of_scipy_and_of_the_candidates_among_all_personas():
    pairs, near = world(np.random.default_rng(0))
    table = made(pairs, {"p1": ("p0",)})
    assert table.height == 2 * 5 and set(table["candidates"]) == {4}
    for layer in (0, 1):
        for k, source in enumerate(SOURCES):
            y = np.full(40, np.nan)
            for name, rate in pairs.filter(layer=layer, source=source).select("persona", "rate").rows():
                y[int(name[1:])] = rate
            told = []
            for j in range(4):
                kept = np.array([b not in (j, k) for b in range(40)])
                told.append(spearmanr(near[layer, j][kept], y[kept])[0])
            assert told == pytest.approx(
                specificity.candidate_rhos(near[layer], np.nan_to_num(y), k)[:4], abs=1e-12
            )
            row = table.filter(layer=layer, source=source).row(0, named=True)
            size = np.abs(told)
            assert row["spearman"] == pytest.approx(told[k]) and row["n"] == 39
            assert row["rank"] == (size >= size[k] - 1e-12).sum() and row["p_source"] == row["rank"] / 4
            others = [j for j in range(4) if j != k]
            best = others[int(np.argmax(size[others]))]
            assert (row["best_other"], row["best_other_related"]) == (SOURCES[best], {k, best} == {0, 1})
    pooled = table.filter(source="pooled", layer=0).row(0, named=True)
    singles = table.filter(pl.col("source") != "pooled", layer=0)
    assert pooled["rank"] == singles["rank"].mean()
    assert pooled["p_source"] == pytest.approx(specificity.edgington(singles["p_source"].to_numpy()))


def test_the_difference_has_an_interval_and_what_lacks_says_so():
    pairs, _ = world(np.random.default_rng(1))
    row = made(pairs, bootstraps=200).row(0, named=True)
    assert row["difference_low"] < row["difference"] < row["difference_high"] and row["bootstraps"] == 200
    alone = made(pairs.filter(source="p0"))
    assert alone["rank"].null_count() == alone.height and "no other source" in alone["reason"][0]
    raw = among_sources.table(pairs, {}, 0).filter(cosine="raw")
    assert raw["spearman"].null_count() == raw.height and raw["reason"].null_count() == 0
    key = ["source", "layer", "cosine", "y"]
    one, again = (
        among_sources.table(frame, {}, 50, workers=workers).filter(pl.col("source") != "pooled").sort(key)
        for frame, workers in ((pairs, 2), (pairs.sample(fraction=1, shuffle=True, seed=3), 1))
    )
    assert one.equals(again), "the order of rows and the number of threads change no bit"
