"""Leakage by category of the bystander: means, intervals and correlations against their definition done the long way."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.stats
from matplotlib.text import Text

from leakfast import figures
from leakfast.report import content
from leakfast.stats import relations
from leakfast.stats.rates import table as rates_table
from leakfast.stats.tables import Stats
from leakfast.storage import schema

KINDS = ["opposite", "tone_variant", "cultural_variant", "hierarchical", "original"]
PEOPLE = [f"p{i}" for i in range(30)]
SOURCES = ["villain", "poet"]
RELATED = {"p1": ("villain",), "p2": ("poet", "villain"), "p6": ("villain",), "p7": ("nobody",)}


def _rates(effects: dict[str, list[float]], seed: int = 0, noise: float = 0.05) -> pl.DataFrame:
    """Rates of behaviors whose leakage depends on the category by `effects`; persona i has category i mod 5."""
    rng = np.random.default_rng(seed)
    counts, kinds = [], {p: KINDS[i % 5] for i, p in enumerate(PEOPLE)}
    for behavior, effect in effects.items():
        for adapter in ("base", *(f"{behavior}-{s}" for s in SOURCES)):
            for i, persona in enumerate([*PEOPLE, *SOURCES]):
                share = 0.5 + (effect[i % 5] + noise * rng.normal() if adapter != "base" else 0)
                counts.append((behavior, adapter, persona, round(1000 * share), 1000))
    frame = pl.DataFrame(counts, schema=["behavior", "adapter", "persona", "hits", "total"], orient="row")
    adapters = {f"{b}-{s}": (s, 42) for b in effects for s in SOURCES}
    return rates_table(frame, adapters, kinds)


UP = [0.3, 0.2, 0.1, 0.0, -0.1]
UNITS = {"marker": "share", "capability": "share", "refusal": "points"}
RATES = _rates({"marker": UP, "capability": [-v for v in UP], "refusal": UP[::-1]})


def test_means_and_intervals_are_over_personas():
    found = schema.check(relations.categories(RATES, RELATED, 199), "relations")
    row = found.filter(
        (pl.col("behavior") == "marker") & (pl.col("scope") == "all") & (pl.col("category") == "opposite")
    ).row(0, named=True)
    mine = RATES.filter((pl.col("behavior") == "marker") & (pl.col("role") == "bystander"))
    each = [mine.filter(pl.col("persona") == p)["delta"].mean() for p in PEOPLE[::5]]
    low, high = scipy.stats.t.interval(0.95, 5, np.mean(each), scipy.stats.sem(each))
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((np.mean(each), low, high), abs=1e-12)
    assert (row["personas"], row["pairs"], row["y"]) == (6, 12, "delta")
    signs = dict(found.select("behavior", "direction").unique().rows())
    assert signs == {"marker": 1, "capability": -1, "refusal": 1}


def test_related_pairs_are_those_that_name_the_source():
    found = relations.categories(RATES, RELATED, 0).filter(
        (pl.col("scope") == "related") & (pl.col("behavior") == "marker")
    )
    told = {r["category"]: (r["personas"], r["pairs"]) for r in found.rows(named=True)}
    assert told == {"tone_variant": (2, 2), "cultural_variant": (1, 2)}, "p7 names no source of the run"
    alone = found.filter(pl.col("personas") == 1).row(0, named=True)
    assert alone["low"] is None and "one persona" in alone["reason"] and alone["mean"] is not None


def test_explained_is_eta_squared_and_small_where_categories_are_nothing():
    found = relations.categories(RATES, {}, 199)
    mine = RATES.filter(
        (pl.col("behavior") == "marker") & (pl.col("role") == "bystander") & pl.col("category").is_not_null()
    )
    means = dict(mine.group_by("persona").agg(pl.col("delta").mean()).rows())
    groups = [[means[p] for p in PEOPLE[k::5]] for k in range(5)]
    f = scipy.stats.f_oneway(*groups).statistic
    row = found.filter(pl.col("behavior") == "marker").row(0, named=True)
    assert (
        row["explained"] == pytest.approx(f * 4 / (f * 4 + 25), abs=1e-12) and row["explained_p"] == 1 / 200
    )
    p = [
        relations.categories(_rates({"marker": [0.0] * 5}, seed), {}, 199)["explained_p"][0]
        for seed in range(40)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3, "uniform where categories are nothing"


def test_behaviors_that_rank_categories_alike_say_so_in_their_own_direction():
    found = relations.alike(RATES, {}, 199, 200)
    rho = {(r["behavior"], r["other_behavior"]): r for r in found.rows(named=True)}
    assert rho["marker", "capability"]["spearman"] == pytest.approx(1), (
        "less accuracy is more of capability's behavior"
    )
    assert rho["marker", "refusal"]["spearman"] == pytest.approx(-1)
    row = rho["marker", "capability"]
    assert row["n"] == 5 and row["personas"] == 30 and row["spearman_p_perm"] < 0.1
    assert row["spearman_p_grouping"] > row["spearman_p_perm"], "these personas agree in any grouping"
    assert row["spearman_ci_low"] <= row["spearman"] <= row["spearman_ci_high"] + 1e-12
    few = RATES.filter(pl.col("category").is_in(KINDS[:3]) | pl.col("category").is_null())
    assert relations.alike(few, {}, 99, 0)["reason"].str.contains("3 categories").all()


def test_a_shared_persona_effect_is_no_evidence_for_categories():
    """Personas that leak in both behaviors, in categories drawn at random: the p of groupings is not small."""
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        both = np.repeat(rng.normal(size=30)[None], 2, axis=0) + 0.1 * rng.normal(size=(2, 30))
        codes = rng.permutation(np.arange(30) % 10)
        found.append(relations._rank_correlation(both, codes, 10, 199, 0, seed)["spearman_p_grouping"])
    assert np.mean(np.array(found) <= 0.1) < 0.3


def test_the_figure_and_the_report_rows_tell_the_numbers():
    table, crossed = relations.categories(RATES, {}, 99), relations.alike(RATES, {}, 99, 50)
    figure = figures.relations(table, crossed, units=UNITS)
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "mean change (pp)",
        "mean change (pp)",
        "mean change (points)",
    ]
    texts = {text.get_text() for text in figure.findobj(Text)}
    assert {"marker", "capability", "refusal", "tone variant", "ρ with marker −1.00"} <= texts
    assert figures.png(figure)[:4] == b"\x89PNG"
    assert figures.relations(table.clear(), crossed, units=UNITS) is None
    inverted = {axis.get_title(loc="left"): axis.xaxis_inverted() for axis in figure.axes}
    assert inverted == {"marker": False, "capability": True, "refusal": False}
    empty = schema.empty("pairs")
    tables = Stats(
        RATES, empty, schema.empty("correlations"), more={"relations": table, "relations_alike": crossed}
    )
    told = content.relations(tables)
    assert [row["category"] for row in told["rows"]] == sorted(KINDS) and len(told["alike"]) == 3
    assert (
        told["rows"][0]["cells"][0]["mean"]
        == table.filter((pl.col("category") == sorted(KINDS)[0]) & (pl.col("behavior") == "marker"))["mean"][
            0
        ]
    )


def test_a_source_with_two_adapters_weighs_as_much_as_one_with_one():
    """The villain's second adapter shows 0.2 more: the villain's mean is 0.1 more, a persona's over two sources 0.05."""
    marker = RATES.filter(behavior="marker")
    again = marker.filter(source="villain").with_columns(
        pl.col("delta") + 0.2, adapter=pl.lit("marker-villain-again")
    )
    before, found = (relations.categories(one, {}, 0) for one in (marker, pl.concat([marker, again])))
    assert found["mean"].to_list() == pytest.approx((before["mean"] + 0.05).to_list())
    assert found["pairs"].to_list() == before["pairs"].to_list(), "pairs of source and bystander"
