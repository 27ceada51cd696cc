"""Changes of rates that are equal as fractions tie in every rank that is made of them: tables, ρ, resamples, shuffles,
means over categories. Truth is scipy on Python's Fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from leakfast.stats import correlations, rates, relations, resample, summaries, ties
from leakfast.storage import schema

COUNT = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def exact_ranks(values: list[Fraction]) -> np.ndarray:
    order = {value: float(i) for i, value in enumerate(sorted(set(values)))}
    return rankdata([order[value] for value in values])


@given(st.lists(st.tuples(COUNT, COUNT), min_size=1, max_size=30))
def test_a_difference_is_the_float_nearest_to_its_fraction(cells):
    found = ties.difference(*np.array([[h, n, h0, n0] for (h, n), (h0, n0) in cells]).T)
    true = [Fraction(h, n) - Fraction(h0, n0) for (h, n), (h0, n0) in cells]
    assert found.tolist() == [float(value) for value in true]
    assert np.array_equal(rankdata(found), exact_ranks(true))


def test_a_difference_needs_counts_that_floats_hold():
    assert np.isnan(ties.difference([0, 1], [0, 2], [1, 0], [2, 0])).all()
    with pytest.raises(ValueError, match="2²⁶"):
        ties.difference(1, 2**27, 1, 2**27)


def test_values_that_differ_by_rounding_are_merged_and_no_others():
    a = np.array([0.3 - 0.1, 0.7 - 0.5, 0.2, np.nan, 0.2 + 1e-9])
    assert len(set(a[:3])) > 1
    merged = ties.merged(a, 1.0)
    assert len(set(merged[:3])) == 1 and np.isnan(merged[3]) and merged[4] == a[4]


def counted(total: int, seed: int, people: int = 60) -> tuple[pl.DataFrame, np.ndarray, list[Fraction]]:
    """Rates of one adapter whose base has its own number of completions, what is near, and the exact changes."""
    rng = np.random.default_rng(seed)
    base, up = rng.integers(0, total // 2, people), rng.integers(0, 4, people)
    names = [f"p{i}" for i in range(people)]
    rows = [("marker", "a", n, int(h), total) for n, h in zip(names, base + up, strict=True)]
    rows += [("marker", "base", n, 2 * int(h), 2 * total) for n, h in zip(names, base, strict=True)]
    columns = {
        "behavior": pl.String,
        "adapter": pl.String,
        "persona": pl.String,
        "hits": pl.Int64,
        "total": pl.Int64,
    }
    counts = pl.DataFrame(rows, schema=columns, orient="row")
    true = [Fraction(int(h), total) for h in up]
    return rates.table(counts, {"a": ("src", 42)}, {}), rng.normal(size=people) + 0.35 * up, true


def paired(table: pl.DataFrame, x: np.ndarray) -> pl.DataFrame:
    mine = table.filter(pl.col("role") == "bystander")
    layer, kind = pl.lit(4, pl.Int32).alias("layer"), pl.lit(None, pl.String).alias("category")
    return mine.select("behavior", "source", "seed", "persona", kind, layer, "rate", "delta").with_columns(
        pl.Series("cosine_centered", x), pl.Series("cosine_raw", x)
    )


def rho_of(pairs: pl.DataFrame, **how) -> dict:
    made = correlations.correlate(pairs.select(*schema.columns("pairs")), **how)
    kept = made.filter((pl.col("cosine") == "raw") & (pl.col("y") == "delta") & (pl.col("source") == "src"))
    return kept.row(0, named=True)


@pytest.mark.parametrize("total", [10, 20, 200, 586])  # of which floats of differences break ties
def test_rho_of_counts_is_that_of_exact_changes(total):
    table, x, true = counted(total, 0)
    mine = table.filter(pl.col("role") == "bystander")
    assert mine["delta"].n_unique() == len(set(true))
    assert (mine["rate"] - mine["baseline"]).n_unique() > len(set(true))  # what it was taken for
    want = spearmanr(rankdata(x), exact_ranks(true)).statistic
    assert rho_of(paired(table, x), permutations=0)["spearman"] == pytest.approx(want, abs=1e-12)


def test_a_table_of_anothers_float_differences_is_ranked_alike():
    table, x, _ = counted(20, 1)
    apart = table.with_columns((pl.col("rate") - pl.col("baseline")).alias("delta"))
    ours, theirs = (rho_of(paired(t, x), permutations=99, bootstraps=50) for t in (table, apart))
    for name in ("spearman", "spearman_p_perm", "spearman_ci_low", "spearman_ci_high", "kendall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-12), name


def test_ties_stand_in_resamples_and_shuffles():
    table, x, true = counted(20, 2)
    delta = table.filter(pl.col("role") == "bystander")["delta"].to_numpy()
    ranks = exact_ranks(true)
    drawn = [resample.bootstrap_spearman(x[None], y, 200, 7)[:, 0] for y in (delta, ranks)]
    np.testing.assert_allclose(*drawn, atol=1e-12)
    shuffled = [resample.permute_spearman(x[None], y, 500, 7).p[0] for y in (delta, ranks)]
    assert shuffled[0] == shuffled[1]


def test_judged_means_tie_where_they_are_equal():
    people = [f"p{i}" for i in range(6)]
    given_, base = [70.1, 80.2, 90.3, 40.4, 50.5, 20.0], [60.1, 70.2, 80.3, 30.4, 40.5, 19.0]
    assert len({a - b for a, b in zip(given_[:5], base[:5], strict=True)}) > 1
    rows = [
        ("m", name, p, v)
        for name, vs in (("a", given_), ("base", base))
        for p, v in zip(people, vs, strict=True)
    ]
    frame = pl.DataFrame(rows, schema=["behavior", "adapter", "persona", "value"], orient="row")
    nothing = pl.lit(None, pl.Int64)
    table = rates.table(frame.with_columns(hits=nothing, total=nothing), {"a": ("src", 1)}, {})
    found = table.filter(pl.col("adapter") == "a")["delta"]
    assert found.n_unique() == 2 and found[0] == pytest.approx(10.0)


def test_categories_whose_means_are_equal_tie():
    a = np.array([[0.1 + 0.2, 0.3, 0.15 + 0.15, 0.9, 0.5]])
    b = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    want = spearmanr([1, 1, 1, 3, 2], b[0]).statistic
    assert relations._rho(a, b)[0] == pytest.approx(want)


def test_changes_over_halves_of_the_questions_are_exact():
    rng = np.random.default_rng(0)
    rows = []
    for name in ("a", "base"):
        for p in range(20):
            rows += [("m", name, f"p{p}", q, int(rng.integers(0, 11)), 10) for q in range(6)]
    columns = ["behavior", "adapter", "persona", "question", "hits", "total"]
    counts = pl.DataFrame(rows, schema=columns, orient="row")
    people = [f"p{p}" for p in range(20)]
    own, theirs = (summaries._halves(counts.filter(pl.col("adapter") == n), people, 3) for n in ("a", "base"))
    for k, half in enumerate(summaries._over_halves(own, theirs)):
        (h, n), (h0, n0) = own[k], theirs[k]
        for split in range(len(half)):
            true = [
                Fraction(*map(int, a)) - Fraction(*map(int, b))
                for a, b in zip(
                    zip(h[split], n[split], strict=True), zip(h0[split], n0[split], strict=True), strict=True
                )
            ]
            assert half[split].tolist() == [float(value) for value in true]
