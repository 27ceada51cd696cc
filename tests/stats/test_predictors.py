"""Predictors set side by side: ρ against scipy, what is taken out, p that pays for the pick, sources left out, and labels
shuffled, where nothing may predict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.special import expit
from scipy.stats import binom, pearsonr, rankdata, spearmanr

from leakfast.stats import predictors, predictors_held_out, predictors_skill
from leakfast.stats import rates as rate_tables
from leakfast.storage import schema

PEOPLE = 40
KINDS = 4


def world(rng, sources=3, strength=1.5, people=PEOPLE, questions=5, samples=4, layers=3):
    """(rates, questions, frame): leakage follows predictor `near` at its layer 1 and, weakly, `far` (smaller is closer);
    `cosine_centered` is a noisy copy of `near`; the rest says nothing."""
    names = [f"p{i:02d}" for i in range(people)]
    kinds = {name: f"kind {i % KINDS}" for i, name in enumerate(names)}
    rows, cells = [], []
    for s in range(sources):
        source = names[s]
        true, noise = rng.normal(size=people), rng.normal(size=(4, people))
        columns = {
            ("near", "geometry", k, 1): true + (0.1 if k == 1 else 3.0) * rng.normal(size=people)
            for k in range(layers)
        }
        columns |= {
            ("cosine_centered", "geometry", k, 1): true + (k + 0.5) * rng.normal(size=people)
            for k in range(layers)
        }
        columns[("far", "output", None, -1)] = 10 - true - 2 * noise[0]
        columns[("jaccard", "text", None, 1)] = np.round(noise[1] + true / 3, 1)
        columns[("token_length_difference", "text", None, -1)] = np.round(5 * noise[2])
        for (predictor, family, layer, sign), values in columns.items():
            rows += [
                (source, name, predictor, family, layer, float(v), sign)
                for name, v in zip(names, values, strict=True)
                if name != source
            ]
        share = expit(-1 + 0.3 * s + strength * true + 0.5 * noise[3])
        for name, p in zip(names, share, strict=True):
            hits = rng.binomial(samples, p, size=questions)
            cells += [("marker", f"a-{source}", name, q, int(h), samples) for q, h in enumerate(hits)]
    frame = pl.DataFrame(rows, schema=predictors.FRAME, orient="row")
    columns = ["behavior", "adapter", "persona", "question", "hits", "total"]
    counts = pl.DataFrame(
        cells, schema={n: schema.columns("question_counts")[n] for n in columns}, orient="row"
    )
    adapters = {f"a-{names[s]}": (names[s], 42) for s in range(sources)}
    rates = rate_tables.table(rate_tables.totals(counts), adapters, kinds)
    return rates, counts, frame


def made(found, permute=None):
    return list(predictors.compared(*found, permute))


def skill(found, permutations=0, bootstraps=0, **more):
    return predictors_skill.table(made(found, **more), permutations, bootstraps, 0, 1)


def values_of(found, source, predictor, layer=None):
    """value and rate of the source's bystanders, by persona."""
    rates, _, frame = found
    x = frame.filter(pl.col("layer").eq_missing(pl.lit(layer, pl.Int32)), source=source, predictor=predictor)
    both = x.join(rates.filter(source=source, role="bystander"), on="persona").sort("persona")
    return both["value"].to_numpy(), both["rate"].to_numpy(), both["category"].to_numpy()


def cell(table, source, predictor, layer=None):
    at = pl.col("layer").eq_missing(pl.lit(layer, pl.Int32))
    return table.filter(at, source=source, predictor=predictor).row(0, named=True)


def test_rho_is_scipys_and_a_distance_counts_the_other_way():
    found = world(np.random.default_rng(0))
    table = skill(found)
    for predictor, layer, sign in (("near", 1, 1), ("near", 0, 1), ("far", None, -1)):
        x, y, _ = values_of(found, "p01", predictor, layer)
        assert cell(table, "p01", predictor, layer)["spearman"] == pytest.approx(sign * spearmanr(x, y)[0])
    assert cell(table, "p01", "far")["spearman"] > 0
    ranks = [
        [rankdata(side) / len(side) for side in values_of(found, s, "far")[:2]] for s in ("p00", "p01", "p02")
    ]
    x, y = (np.concatenate([one[k] for one in ranks]) for k in (0, 1))
    assert cell(table, "pooled", "far")["spearman"] == pytest.approx(-spearmanr(x, y)[0])
    assert table["y"].unique().to_list() == ["rate"] and table["direction"].unique().to_list() == [1]


def test_within_categories_and_with_length_and_words_taken_out():
    found = world(np.random.default_rng(1))
    table = skill(found)
    x, y, kinds = values_of(found, "p00", "near", 1)
    a, b = np.empty_like(x), np.empty_like(y)
    for kind in set(kinds):
        mine = kinds == kind
        a[mine], b[mine] = ((rankdata(v[mine]) - 0.5) / mine.sum() for v in (x, y))
    row = cell(table, "p00", "near", 1)
    assert row["within_category"] == pytest.approx(pearsonr(a, b)[0]) and row["within_n"] == PEOPLE - 1
    z = [rankdata(values_of(found, "p00", name)[0]) for name in ("token_length_difference", "jaccard")]
    design = np.column_stack([np.ones(len(x)), *z])
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (rankdata(x), rankdata(y))]
    assert row["partial"] == pytest.approx(pearsonr(*rest)[0])
    assert row["taken_out"] == "token_length_difference, jaccard" and row["partial_low"] < row["partial"]
    assert cell(table, "p00", "jaccard")["taken_out"] == "token_length_difference"
    assert cell(table, "pooled", "near", 1)["partial_low"] is None


def test_intervals_hold_their_rho_and_are_the_same_whatever_the_threads():
    found = world(np.random.default_rng(2))
    table = skill(found, 99, 200)
    known = table.drop_nulls("spearman_ci_low")
    assert known.height == table.height
    low, rho, high = (known[n] for n in ("spearman_ci_low", "spearman", "spearman_ci_high"))
    assert ((low <= rho) & (rho <= high)).all()
    assert (table["spearman_both_low"] < table["spearman"]).all()
    again = predictors_skill.table(made(found), 99, 200, 0, 3)
    assert again.equals(table)
    assert not predictors_skill.table(made(found), 99, 200, 1, 1).equals(table), "another seed, other draws"


def test_p_pays_for_all_that_were_looked_at():
    rates, counts, frame = world(np.random.default_rng(3), strength=0.3)
    table = skill((rates, counts, frame), 499)
    assert (table["spearman_p_max"] >= table["spearman_p_perm"]).all()
    assert table["predictors_compared"].unique().to_list() == [9]
    alone = skill((rates, counts, frame.filter(predictor="far")), 499)
    assert alone["spearman_p_max"].to_list() == alone["spearman_p_perm"].to_list()
    assert alone["spearman_p_perm"].to_list() == table.filter(predictor="far")["spearman_p_perm"].to_list()


def test_a_value_that_is_not_known_is_left_out_of_rho_and_keeps_its_p():
    rates, counts, frame = world(np.random.default_rng(4))
    gone = (pl.col("predictor") == "far") & pl.col("persona").is_in(["p05", "p06", "p07"])
    holed = frame.with_columns(value=pl.when(~gone).then("value"))
    row = cell(skill((rates, counts, holed), 99, 50), "p00", "far")
    x, y, _ = values_of((rates, counts, holed.drop_nulls()), "p00", "near", 1)
    assert row["n"] == PEOPLE - 4 and row["spearman_p_max"] is not None and len(x) == PEOPLE - 1
    known = holed.filter(predictor="far").drop_nulls("value")
    x, y, _ = values_of((rates, counts, known), "p00", "far")
    assert row["spearman"] == pytest.approx(-spearmanr(x, y)[0])
    same = holed.with_columns(value=pl.when(pl.col("predictor") == "far").then(1.0).otherwise("value"))
    flat = cell(skill((rates, counts, same), 99), "p00", "far")
    assert flat["spearman"] is None and flat["reason"] and flat["spearman_p_max"] is None


def test_the_logistic_fit_is_the_maximum_and_the_deviance_that_of_scipy():
    rng = np.random.default_rng(5)
    x, total = rng.normal(40, 3, 200), rng.integers(5, 60, 200).astype(float)
    hits = rng.binomial(total.astype(int), expit(0.2 * (x - 41))).astype(float)
    a, b = predictors_held_out.logistic(x, hits, total)
    error = hits - total * expit(a + b * x)
    assert abs(error.sum()) < 1e-6 and abs(error @ x) < 1e-4
    p = expit(a + b * x)
    best = binom.logpmf(hits, total, hits / total)
    assert np.allclose(
        predictors_held_out.deviance(hits, total, p), 2 * (best - binom.logpmf(hits, total, p))
    )
    assert predictors_held_out.logistic(x, 0 * hits, total) is None
    assert predictors_held_out.logistic(x, np.where(x > 40, total, 0), total) is None, "parted by it"


def test_the_source_left_out_has_no_part_in_what_is_learned():
    found = made(world(np.random.default_rng(6)))[0]
    before = predictors_held_out.table([found], 0)
    mine = found.adapter == 1
    moved = np.where(mine, found.total - found.hits, found.hits)
    other = replace(found, hits=moved, leak=moved / found.total)
    after = predictors_held_out.table([other], 0)
    old, new = (t.filter(source="p01") for t in (before, after))
    for name in ("layer", "picked_by"):
        assert old[name].to_list() == new[name].to_list()
    assert np.allclose(old["spearman"], -new["spearman"]), (
        "its own leakage turned round, the prediction as before"
    )
    assert not after.filter(source="p00").equals(before.filter(source="p00"))


def test_differences_are_of_the_rho_beside_them_and_pooled_is_the_mean():
    found = world(np.random.default_rng(7), sources=4)
    table = predictors_held_out.table(made(found), 200, 0, 1)
    for source in ("p00", "p01", "p02", "p03"):
        near, reference = (cell_of(table, source, name) for name in ("near", "cosine_centered"))
        x, y, _ = values_of(found, source, "near", near["layer"])
        assert near["layer"] == 1 and near["spearman"] == pytest.approx(spearmanr(x, y)[0])
        assert near["difference"] == pytest.approx(near["spearman"] - reference["spearman"])
        assert near["difference_low"] < near["difference"] < near["difference_high"]
        apart = near["deviance"] - reference["deviance"]
        assert near["deviance_difference"] == pytest.approx(apart)
        assert near["gain"] == pytest.approx(near["deviance_mean"] - near["deviance"])
    pooled, each = (
        cell_of(table, "pooled", "near"),
        table.filter(pl.col("source") != "pooled", predictor="near"),
    )
    assert pooled["spearman"] == pytest.approx(np.tanh(np.arctanh(each["spearman"].to_numpy()).mean()))
    for name in ("difference", "gain", "deviance", "deviance_difference"):
        assert pooled[name] == pytest.approx(each[name].mean())
    assert pooled["spearman_low"] < pooled["spearman"] < pooled["spearman_high"]
    assert pooled["gain"] > 0 > pooled["deviance_difference"] and pooled["layer"] is None
    assert pooled["resampling_unit"] == "source, persona and question"
    known = cell_of(table, "pooled", "cosine_centered")
    assert known["difference"] is None and "compared with" in known["difference_reason"]


def test_the_pooled_difference_is_over_the_bystanders_that_both_have():
    rates, counts, frame = world(np.random.default_rng(7), sources=4)
    lacking = pl.col("persona").is_in([f"p{i:02d}" for i in range(20, 36)]) & (pl.col("predictor") == "near")
    frame = frame.with_columns(value=pl.when(~lacking).then("value"))
    table = predictors_held_out.table(made((rates, counts, frame)), 200, 0, 1)
    pooled = cell_of(table, "pooled", "near")
    each = table.filter(pl.col("source") != "pooled", predictor="near")
    assert set(each["n"]) == {PEOPLE - 1 - 16}
    assert pooled["difference"] == pytest.approx(each["difference"].mean())
    assert pooled["difference_low"] < pooled["difference"] < pooled["difference_high"]
    alike = cell_of(table, "pooled", "far")  # known of all, as the reference: nothing changes
    both = table.filter(pl.col("source") != "pooled", predictor="far")
    assert alike["difference"] == pytest.approx(both["difference"].mean())


def test_a_difference_of_two_rho_lies_between_minus_two_and_two():
    """Two sources that point opposite ways: a t quantile of one degree of freedom reached beyond what there can be."""
    rates, counts, frame = world(np.random.default_rng(7), sources=2)
    turned = (pl.col("predictor") == "near") & (pl.col("source") == "p01")
    frame = frame.with_columns(value=pl.when(turned).then(-pl.col("value")).otherwise("value"))
    pooled = cell_of(predictors_held_out.table(made((rates, counts, frame)), 200, 0, 1), "pooled", "near")
    assert pooled["difference_low"] == -2 < pooled["difference"] < pooled["difference_high"] < 2


def cell_of(table, source, predictor):
    return table.filter(source=source, predictor=predictor).row(0, named=True)


def test_one_source_leaves_nothing_out_and_no_reference_no_difference():
    found = world(np.random.default_rng(8), sources=1)
    assert predictors_held_out.table(made(found), 0).is_empty()
    rates, counts, frame = world(np.random.default_rng(8))
    table = predictors_held_out.table(made((rates, counts, frame.filter(predictor="near"))), 0)
    assert table["difference"].null_count() == table.height and table["gain"].null_count() == 0
    assert (
        set(table["difference_reason"]) - {None}
        and not table.filter(source="pooled")["spearman"].is_null().any()
    )


def test_no_cell_is_nan():
    found = world(np.random.default_rng(9))
    for table in (skill(found, 19, 20), predictors_held_out.table(made(found), 20, 0, 1)):
        for name, kind in table.schema.items():
            if kind == pl.Float64:
                assert not table[name].is_nan().any(), name


def test_shuffled_labels_keep_what_was_measured_and_lose_who_showed_it():
    found = world(np.random.default_rng(10), sources=3, strength=2.5)
    plain, moved = made(found)[0], made(found, permute=5)[0]
    assert np.array_equal(plain.x, moved.x)
    for s in range(3):
        mine = plain.adapter == s
        assert sorted(plain.leak[mine]) == sorted(moved.leak[mine]), "each source keeps its own rates"
        assert np.array_equal(moved.hits[mine] / moved.total[mine], moved.leak[mine])
        assert np.array_equal(moved.asked[s].whole["rate"], moved.leak[mine])
    assert not np.array_equal(plain.leak, moved.leak)
    assert np.array_equal(made(found, permute=5)[0].leak, moved.leak)
    rho, null = (skill(found, 199, permute=p).filter(source="pooled") for p in (None, 5))
    assert rho["spearman_p_max"].min() == 1 / 200 and null["spearman_p_max"].min() > 0.05
    held = predictors_held_out.table(made(found, permute=5), 0)
    row, true = (
        cell_of(held, "pooled", "near"),
        cell_of(predictors_held_out.table(made(found), 0), "pooled", "near"),
    )
    assert row["spearman_low"] < 0 < row["spearman_high"] and row["gain"] < 0.1 * true["gain"]


def test_labels_move_together_under_all_sources():
    """So that personas that leak under every source do so after it too."""
    found = world(np.random.default_rng(11), sources=3)
    rates, counts, frame = found
    number = {name: float(i) for i, name in enumerate(sorted(rates["persona"].unique()))}
    told = rates.with_columns(rate=pl.col("persona").replace_strict(number, return_dtype=pl.Float64))
    moved = made((told, counts, frame), permute=1)[0]
    at = [
        dict(zip(moved.persona[moved.adapter == s], moved.leak[moved.adapter == s], strict=True))
        for s in range(3)
    ]
    shared = [name for name in at[0] if all(name in one for one in at)]
    alike = np.mean([at[0][name] == at[1][name] == at[2][name] for name in shared])
    assert alike > 0.8, "but where a source stands in the way"


@pytest.mark.slow
@pytest.mark.parametrize("sources", [1, 5])
def test_the_picked_p_rejects_no_more_than_it_should(sources):
    """1,000 worlds in which nothing predicts: the smallest p (max) of all predictors and layers."""
    rng, small = np.random.default_rng(12), []
    for _ in range(1_000):
        table = skill(world(rng, sources=sources, strength=0.0, people=30), 199)
        one = table.filter(source="pooled" if sources > 1 else "p00")
        small.append([one["spearman_p_max"].min(), one["spearman_p_perm"].min()])
    share = (np.array(small) <= 0.05).mean(0)
    print(f"{sources} sources: p (max) {share[0]:.4f}, the smallest p that does not pay {share[1]:.4f}")
    assert 0.03 <= share[0] <= 0.07 and share[1] > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("sources", [3, 5])
def test_the_difference_of_two_that_are_alike_holds_0(sources):
    """1,000 worlds in which a second predictor is as good as the centered cosine: its interval over sources and personas."""
    rng, held = np.random.default_rng(13), []
    for _ in range(1_000):
        rates, counts, frame = world(rng, sources=sources, people=60, layers=1)
        near = frame.filter(predictor="cosine_centered")
        both = [
            near.with_columns(
                pl.col("value") + pl.Series(rng.normal(size=near.height)), predictor=pl.lit(name)
            )
            for name in ("cosine_centered", "near")
        ]
        told = pl.concat(both).select(predictors.FRAME)
        row = cell_of(predictors_held_out.table(made((rates, counts, told)), 0), "pooled", "near")
        held.append([row[f"{n}_low"] <= 0 <= row[f"{n}_high"] for n in ("difference", "deviance_difference")])
    share = np.mean(held, 0)
    print(f"{sources} sources: difference of rho {share[0]:.4f}, of deviance {share[1]:.4f}")
    assert (share >= 0.92).all() and (share <= 0.99).all()


def test_a_curve_that_rounds_to_certainty_costs_much_and_not_all():
    """One reply the other way under expit(40), which is 1 in float64."""
    hits, total = np.array([10.0, 9.0]), np.array([10.0, 10.0])
    found = predictors_held_out.deviance(hits, total, np.array([1.0, 1.0]))
    assert found[0] == pytest.approx(0.0, abs=1e-12)
    assert (
        60 < found[1] < 80
        and np.isfinite(found - predictors_held_out.deviance(hits, total, np.array([1.0, 0.0]))).all()
    )
    assert predictors_held_out.deviance(hits, total, 0.5) == pytest.approx(
        2 * (hits * np.log(hits / 5) + [0, np.log(0.2)])
    )
