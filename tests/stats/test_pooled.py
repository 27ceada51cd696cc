"""What is pooled over sources, and what a pool must not mix in."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import scipy.stats

from leakfast.stats import correlations
from tests.rates_made import made_pairs, one_row


def test_what_differs_between_sources_is_no_part_of_the_pooled_rho():
    """Five sources with ρ near 0 each, whose cosines and rates differ in level: plain ρ is large."""
    rng = np.random.default_rng(8)
    levels = np.linspace(0, 0.8, 5)
    frames = [
        made_pairs(
            level + 0.05 * rng.normal(size=60),
            np.clip(level + 0.05 * rng.normal(size=60), 0, 1),
            source=f"s{i}",
        )
        for i, level in enumerate(levels)
    ]
    row = one_row(correlations.correlate(pl.concat(frames), permutations=199), source="pooled")
    assert row["spearman_plain"] > 0.8 and row["pearson_plain"] > 0.8
    assert abs(row["spearman"]) < 0.15 and abs(row["pearson"]) < 0.15 and row["spearman_p_perm"] > 0.05


def test_a_pool_of_one_source_is_that_source_to_the_bit():
    rng = np.random.default_rng(9)
    table = correlations.correlate(
        made_pairs(rng.normal(size=20), rng.random(20)), permutations=199, bootstraps=50
    )
    single, pooled = (table.filter(pl.col("source") == name) for name in (table["source"][0], "pooled"))
    skip = ["source", "adapter", "family", "family_size", "spearman_p_bh", "resampling_unit"]
    assert single.drop(skip).equals(pooled.drop(skip))


def test_a_perfect_correlation_has_the_p_of_a_permutation_test():
    x = np.arange(8.0)
    row = one_row(correlations.correlate(made_pairs(x / 10, x / 10), permutations=0), source="villain")
    assert row["spearman"] == 1.0 and row["spearman_p_t"] == row["pearson_p"] == pytest.approx(
        2 / math.factorial(8)
    )


def test_pooled_and_categories_take_the_rows_they_name():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 24)), rng.normal(size=(2, 24))
    kinds = ["art", "law", "sea"] * 8
    pairs = pl.concat(
        [made_pairs(x[0], y[0], category=kinds), made_pairs(x[1], y[1], source="poet", category=kinds)]
    )
    table = correlations.correlate(pairs, permutations=0)
    law = [i for i, kind in enumerate(kinds) if kind == "law"]

    def rho(a, b):
        return pytest.approx(scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-12)

    def ranks(a):
        return scipy.stats.rankdata(a, axis=1)

    assert one_row(table, source="pooled")["spearman"] == rho(ranks(x), ranks(y))
    assert one_row(table, source="pooled")["spearman_plain"] == rho(x, y)
    assert one_row(table, source="pooled", category="law")["spearman"] == rho(
        ranks(x[:, law]), ranks(y[:, law])
    )
    centered = [a - a.mean(axis=1, keepdims=True) for a in (x, y)]
    r = scipy.stats.pearsonr(*(a.ravel() for a in centered)).statistic
    assert one_row(table, source="pooled")["pearson"] == pytest.approx(r, abs=1e-12)
    assert one_row(table, source="poet")["spearman_plain"] is None
    assert one_row(table, source="poet", category="law")["spearman"] == rho(x[1, law], y[1, law])
    assert one_row(table, source="poet", category="law")["n"] == 8


def test_a_pool_with_two_adapters_of_one_source_is_not_a_number():
    rng = np.random.default_rng(3)
    frames = [
        made_pairs(rng.normal(size=9), rng.normal(size=9)).with_columns(adapter=pl.lit(name))
        for name in ("early", "late")
    ]
    table = correlations.correlate(pl.concat(frames), permutations=0)
    assert "more than one adapter" in one_row(table, source="pooled")["reason"]
    assert one_row(table, adapter="early")["spearman"] is not None
