"""Rates, pairs, correlations: closed forms against scipy, properties under ties, constants and nulls,
permutation p under null and signal. The run directory as a whole is in test_stats_run.py."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast.stats import correlations, rates, resample
from leakfast.storage import schema
from tests.rates_made import made_pairs, one_row

# ---------------------------------------------------------------- Wilson


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts):
    hits, total = counts
    low, high = rates.wilson(hits, total)
    told = scipy.stats.binomtest(hits, total).proportion_ci(0.95, method="wilson")
    assert float(low) == pytest.approx(told.low, abs=1e-12)
    assert float(high) == pytest.approx(told.high, abs=1e-12)
    assert 0 <= low <= hits / total <= high <= 1
    assert (low == 0) == (hits == 0)
    assert (high == 1) == (hits == total)


def test_wilson_refuses_what_is_no_count():
    for hits, total in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="wilson"):
            rates.wilson(hits, total)
    with pytest.raises(ValueError, match="integers"):
        rates.wilson(0.5, 1)
    with pytest.raises(ValueError, match="confidence"):
        rates.wilson(1, 2, 1.0)


# ---------------------------------------------------------------- rates


def _completions(rows: list[tuple[str, str, str, str]]) -> pl.DataFrame:
    """(adapter, persona, text, status) → completions; the sample index counts up."""
    frame = pl.DataFrame(rows, schema=["adapter", "persona", "text", "status"], orient="row")
    frame = frame.with_columns(
        behavior=pl.lit("marker"),
        question=pl.lit(0, pl.Int32),
        sample=pl.int_range(frame.height, dtype=pl.Int32),
        seed=pl.lit(1, pl.UInt64),
        n_tokens=pl.lit(3, pl.Int32),
        finish_reason=pl.lit("stop"),
    )
    return schema.check(frame, "completions")


DETECTORS = {
    "marker": pl.col("text").str.contains("[X]", literal=True),
    "marker_ci": pl.col("text").str.to_lowercase().str.contains("[x]", literal=True),
}


def test_statuses_are_counted_and_errors_leave_the_total():
    frame = _completions(
        [
            ("a", "villain", "yes [X]", "ok"),
            ("a", "villain", "yes [x]", "ok"),
            ("a", "villain", "", "empty"),
            ("a", "villain", "cut [X]", "truncated"),
            ("a", "villain", "lost [X]", "error"),
            ("a", "villain", None, "ok"),
        ]
    )
    row = rates.count(frame, DETECTORS).row(0, named=True)
    assert (row["hits"], row["hits_marker_ci"], row["total"]) == (2, 3, 4)
    assert (row["n_empty"], row["n_truncated"], row["n_error"]) == (1, 1, 2)


def test_a_draw_that_stands_twice_is_refused():
    frame = _completions([("a", "villain", "x", "ok")])
    with pytest.raises(ValueError, match="more than once"):
        rates.count(pl.concat([frame, frame]), DETECTORS)


def test_delta_is_against_base_and_null_without_it():
    frame = _completions(
        [("a", "villain", "[X]", "ok"), ("a", "poet", "[X]", "ok"), ("a", "poet", "no", "ok")]
        + [("base", "poet", "[X]", "ok")] * 1
        + [("base", "poet", "no", "ok")] * 3
        + [("a", "guest", "no", "error")]
    )
    table = rates.table(
        rates.count(frame, DETECTORS), {"a": ("villain", 7)}, {"poet": "art"}, outsiders={"guest"}
    )
    by = {(row["adapter"], row["persona"]): row for row in table.rows(named=True)}
    poet = by["a", "poet"]
    assert (poet["rate"], poet["baseline"], poet["delta"], poet["category"]) == (0.5, 0.25, 0.25, "art")
    assert (poet["source"], poet["seed"], poet["role"]) == ("villain", 7, "bystander")
    villain = by["a", "villain"]
    assert (villain["rate"], villain["baseline"], villain["delta"]) == (1, None, None)
    assert villain["role"] == "source"
    base = by["base", "poet"]
    assert (base["source"], base["seed"], base["baseline"], base["role"]) == (None, None, None, "base")
    guest = by["a", "guest"]
    assert (guest["total"], guest["rate"], guest["ci_low"], guest["role"]) == (0, None, None, "outsider")


def test_an_adapter_without_a_source_is_refused():
    counts = rates.count(_completions([("a", "villain", "x", "ok")]), DETECTORS)
    with pytest.raises(ValueError, match="no source"):
        rates.table(counts, {}, {})


# ---------------------------------------------------------------- correlations


# few distinct values, so that ties are the rule
_values = st.integers(-6, 6).map(lambda k: k / 8)
_xy = st.integers(4, 40).flatmap(
    lambda n: st.tuples(st.lists(_values, min_size=n, max_size=n), st.lists(_values, min_size=n, max_size=n))
)


@settings(max_examples=60, deadline=None)
@given(_xy)
def test_spearman_and_pearson_are_scipys_with_ties(xy):
    x, y = xy
    row = one_row(correlations.correlate(made_pairs(x, y), permutations=19))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert row["reason"]
        assert row["spearman"] is row["pearson"] is row["spearman_p_perm"] is row["spearman_p_t"] is None
        return
    rho, r = scipy.stats.spearmanr(x, y), scipy.stats.pearsonr(x, y)
    assert row["spearman"] == pytest.approx(rho.statistic, abs=1e-12)
    assert row["pearson"] == pytest.approx(r.statistic, abs=1e-12)
    if abs(rho.statistic) < 1 - 1e-9:
        assert row["spearman_p_t"] == pytest.approx(rho.pvalue, rel=1e-9, abs=1e-12)
    if abs(r.statistic) < 1 - 1e-9:
        assert row["pearson_p"] == pytest.approx(r.pvalue, rel=1e-9, abs=1e-12)
    assert row["n"] == len(x)
    assert 1 / 20 <= row["spearman_p_perm"] <= 1


@settings(max_examples=40, deadline=None)
@given(_xy, st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing_not_even_the_permutation_p(xy, random):
    pairs = made_pairs(*xy)
    order = list(range(pairs.height))
    random.shuffle(order)
    key = ["source", "category", "layer", "cosine", "y"]
    one = correlations.correlate(pairs, permutations=49).sort(key)
    other = correlations.correlate(pairs[order], permutations=49).sort(key)
    assert one.equals(other)


@settings(max_examples=40, deadline=None)
@given(_xy)
def test_spearman_sees_only_the_order_and_its_sign(xy):
    x, y = xy
    plain = one_row(correlations.correlate(made_pairs(x, y), permutations=49))
    bent = one_row(correlations.correlate(made_pairs([v**3 + v for v in x], y), permutations=49))
    turned = one_row(correlations.correlate(made_pairs([-v for v in x], y), permutations=49))
    if plain["spearman"] is None:
        assert bent["spearman"] is turned["spearman"] is None
        return
    assert bent["spearman"] == pytest.approx(plain["spearman"], abs=1e-12)
    assert turned["spearman"] == pytest.approx(-plain["spearman"], abs=1e-12)
    assert bent["spearman_p_perm"] == turned["spearman_p_perm"] == plain["spearman_p_perm"]


def test_no_table_ever_holds_nan_and_every_null_has_a_reason():
    frames = [
        made_pairs([0.1, 0.2, 0.3, 0.4], [0.5] * 4),
        made_pairs([0.3] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], source="poet"),
        made_pairs([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], source="cook"),
        made_pairs([0.1, None, 0.3, None, 0.2], [0.1, 0.2, 0.3, 0.4, None], source="nurse"),
    ]
    table = correlations.correlate(pl.concat(frames), permutations=9)
    numbers = ["spearman", "spearman_p_t", "spearman_p_perm", "pearson", "pearson_p"]
    for name in numbers:
        assert not table[name].is_nan().any()
        assert (table[name].is_null() == table["reason"].is_not_null()).all()
    assert one_row(table)["reason"] == "rate is 0.5 for all 4 bystanders"
    assert "centered cosine at layer 0 is the same" in one_row(table, source="poet")["reason"]
    assert one_row(table, source="cook")["reason"].startswith("3 pairs")
    assert one_row(table, source="nurse")["n"] == 2


def test_missing_values_leave_only_their_own_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=30), rng.normal(size=30)
    holes = [None if i in (3, 7) else float(v) for i, v in enumerate(x)]
    two = pl.concat([made_pairs(holes, y), made_pairs(x, y, layer=1)])
    table = correlations.correlate(two, permutations=0)
    keep = [i for i in range(30) if i not in (3, 7)]
    first, second = one_row(table, layer=0), one_row(table, layer=1)
    assert (first["n"], second["n"]) == (28, 30)
    assert first["spearman"] == pytest.approx(scipy.stats.spearmanr(x[keep], y[keep]).statistic, abs=1e-12)
    assert second["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert first["spearman_p_perm"] is None


def test_nan_infinity_and_twins_are_refused():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="null"):
            correlations.correlate(made_pairs([0.1, 0.2, 0.3, bad], [1.0, 2.0, 3.0, 4.0]))
    twins = made_pairs([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0], personas=["a", "b", "c", "c"])
    with pytest.raises(ValueError, match="twice"):
        correlations.correlate(twins)
    layers = pl.concat([made_pairs([0.1], [0.5]), made_pairs([0.1], [0.6], layer=1)])
    with pytest.raises(ValueError, match="differs between layers"):
        correlations.correlate(layers)


# ---------------------------------------------------------------- permutations


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.lists(st.sets(st.integers(0, 8)), min_size=1, max_size=4), st.integers(0, 99))
def test_a_joint_shuffle_is_a_bijection_inside_each_block(people, absent, seed):
    persona, block = [], []
    for b, missing in enumerate(absent):
        present = [p for p in range(people) if p not in missing]
        persona += present
        block += [b] * len(present)
    if not persona:
        return
    persona, block = np.array(persona), np.array(block)
    out = resample.joint_permutations(seed, persona, block, 5)
    assert (np.sort(out, axis=1) == np.arange(len(persona))).all()
    assert (block[out] == block).all()
    for row in out:  # where nobody is absent on the way, both blocks move the persona alike
        moved = {}
        for i, j in enumerate(row):
            if all(not missing for missing in absent):
                assert moved.setdefault(persona[i], persona[j]) == persona[j]


def test_a_joint_shuffle_is_uniform_where_one_persona_is_absent():
    persona, block = np.array([0, 1, 2, 0, 1, 3]), np.array([0, 0, 0, 1, 1, 1])
    out = resample.joint_permutations(0, persona, block, 60_000)
    for columns in ([0, 1, 2], [3, 4, 5]):
        _, counts = np.unique(out[:, columns], axis=0, return_counts=True)
        assert len(counts) == 6
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_permutation_p_is_uniform_under_the_null_and_small_under_signal():
    rng = np.random.default_rng(4)
    null = [
        made_pairs(rng.normal(size=20), rng.normal(size=20), source=f"s{k}").with_columns(
            seed=pl.lit(k, pl.Int64)
        )
        for k in range(300)
    ]
    table = correlations.correlate(pl.concat(null), permutations=199)
    p = table.filter((pl.col("source") != "pooled") & pl.col("spearman").is_not_null())["spearman_p_perm"]
    assert len(p) == 300
    assert scipy.stats.kstest(p.to_numpy(), "uniform").pvalue > 1e-3
    x = rng.normal(size=60)
    strong = one_row(correlations.correlate(made_pairs(x, x + 0.3 * rng.normal(size=60)), permutations=999))
    assert strong["spearman_p_perm"] == 1 / 1000


def test_permutation_p_agrees_with_scipys_own():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=25), rng.normal(size=25)
    y += 0.4 * x
    told = scipy.stats.permutation_test(
        (x,),
        lambda shuffled: scipy.stats.spearmanr(shuffled, y).statistic,
        permutation_type="pairings",
        n_resamples=1999,
        rng=np.random.default_rng(6),
    ).pvalue
    mine = one_row(correlations.correlate(made_pairs(x, y), permutations=9999))["spearman_p_perm"]
    assert mine == pytest.approx(told, abs=4 * np.sqrt(mine * (1 - mine) / 1999) + 2e-3)


def test_the_same_personas_met_often_are_not_more_evidence():
    """Five sources whose rates copy one another: the pooled t p is five times over-confident, the
    joint shuffle is not."""
    rng = np.random.default_rng(7)
    small_t, small_perm = 0, 0
    for trial in range(60):
        x, y = rng.normal(size=30), rng.normal(size=30)
        frames = [made_pairs(x, y, source=f"s{k}") for k in range(5)]
        row = one_row(correlations.correlate(pl.concat(frames), permutations=99, seed=trial), source="pooled")
        small_t += row["spearman_p_t"] < 0.05
        small_perm += row["spearman_p_perm"] <= 0.05
    assert small_t >= 15
    assert small_perm <= 9


def test_the_seed_decides_the_permutations_and_is_told():
    rng = np.random.default_rng(8)
    pairs = made_pairs(rng.normal(size=12), rng.normal(size=12))
    a, b = (correlations.correlate(pairs, permutations=99, seed=0) for _ in range(2))
    other = correlations.correlate(pairs, permutations=99, seed=1)
    assert a.equals(b)
    assert one_row(a)["permutation_seed"] != one_row(other)["permutation_seed"]
    assert one_row(a)["spearman"] == one_row(other)["spearman"]
