"""Confounds, crossed correlations, predictions, verdicts: each against its definition done the long way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import scipy.stats
from scipy.stats import rankdata

from leakfast.stats import confounds, intervals, resample
from leakfast.stats import transfer as between
from leakfast.stats.people import People
from leakfast.stats.rates import table, totals
from leakfast.storage import schema
from tests.rates_made import made_rates

PEOPLE = People(
    dict.fromkeys(("villain", "kind_villain", "evil_man", "poet"), "a"),
    prompts={
        "villain": "You are a cruel villain with plans.",
        "kind_villain": "You are a kind villain.",
        "evil_man": "You are an evil man with cruel plans.",
        "poet": "You write verse.",
    },
)


def _frame(n=40, sources=("s", "t", "u"), seed=0, delta=True) -> pl.DataFrame:
    """Pairs of random numbers with words' overlap, baseline and category, as `covariates` returns them."""
    rng = np.random.default_rng(seed)
    frames = []
    for source in sources:
        x = rng.normal(size=n)
        y = 0.5 * x + rng.normal(size=n)
        frames.append(
            pl.DataFrame(
                {
                    "behavior": "marker",
                    "source": source,
                    "seed": 42,
                    "adapter": source,
                    "layer": 3,
                    "persona": [f"p{i}" for i in range(n)],
                    "category": [f"c{i % 4}" for i in range(n)],
                    "cosine_centered": x,
                    "cosine_raw": [None] * n,
                    "rate": np.round(y, 1),
                    "delta": np.round(y, 1) - 0.1 if delta else [None] * n,
                    "jaccard": np.round(rng.uniform(size=n) + 0.2 * x, 1),
                    "shared_word": 1.0 * (x > 0),
                    "tfidf": rng.uniform(size=n),
                    "baseline": rng.uniform(size=n),
                    "similarity": [None] * n,
                    "prompt_words": rng.integers(4, 12, n).astype(float),
                    "words_of": "prompt",
                },
                schema_overrides={**schema.columns("pairs"), "similarity": pl.Float64},
            )
        )
    return pl.concat(frames)


def test_partial_rho_is_that_of_the_inverse_correlation_matrix():
    rng = np.random.default_rng(1)
    for controls in (1, 2, 4):
        data = rng.integers(0, 9, (controls + 2, 50)) + 0.5 * rng.normal(size=50)
        rho, p, used = confounds.partial_spearman(data[0], data[1], data[2:].T)
        inverse = np.linalg.inv(np.corrcoef(rankdata(data, axis=1)))
        told = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
        assert rho == pytest.approx(told, abs=1e-12)
        t = rho * np.sqrt((48 - controls) / (1 - rho**2))
        assert p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 48 - controls), rel=1e-9)
        assert used == controls


def test_partial_without_controls_is_spearman_and_with_oneself_nothing():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=30), rng.normal(size=30)
    rho, p, _ = confounds.partial_spearman(x, y, np.empty((30, 0)))
    told = scipy.stats.spearmanr(x, y)
    assert (rho, p) == (pytest.approx(told.statistic, abs=1e-12), pytest.approx(told.pvalue, rel=1e-9))
    assert "does not vary" in confounds.partial_spearman(x, y, x[:, None])
    assert "degrees of freedom" in confounds.partial_spearman(x[:5], y[:5], rng.normal(size=(5, 3)))


def test_partials_by_category_are_within_categories():
    table = _frame(sources=("s",))
    row = confounds.partials(table).filter((pl.col("control") == "category") & (pl.col("y") == "rate"))
    x, y = (rankdata(table[c]) for c in ("cosine_centered", "rate"))
    kinds = table["category"].to_numpy()
    for kind in set(kinds):
        for side in (x, y):
            side[kinds == kind] -= side[kinds == kind].mean()
    assert row["partial"].item() == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert row["controls"].item() == 3
    absent = confounds.partials(table).filter(pl.col("control") == "similarity")
    assert absent["partial"].null_count() == absent.height
    assert absent["reason"].unique().to_list() == ["similarity is not known here"]


def test_overlap_of_words():
    pairs = pl.DataFrame(
        {
            "behavior": ["m"] * 3,
            "adapter": ["a"] * 3,
            "source": ["villain"] * 3,
            "persona": ["kind_villain", "evil_man", "poet"],
        }
    )
    rates = pairs.select("behavior", "adapter", "persona").with_columns(baseline=pl.lit(0.1))
    found = {r["persona"]: r for r in confounds.covariates(pairs, rates, PEOPLE).rows(named=True)}
    assert found["kind_villain"]["jaccard"] == 1 / 4  # villain of {cruel, villain, plans, kind}
    assert found["evil_man"]["jaccard"] == 2 / 5
    assert found["poet"]["jaccard"] == found["poet"]["shared_word"] == found["poet"]["tfidf"] == 0
    assert found["evil_man"]["tfidf"] > found["kind_villain"]["tfidf"] > 0
    assert (found["poet"]["prompt_words"], found["poet"]["words_of"]) == (3, "prompt")
    names = confounds.covariates(pairs, rates, People(PEOPLE.categories))
    assert names["words_of"].unique().to_list() == ["name"]
    assert names["shared_word"].to_list() == [1, 0, 0]
    assert names["prompt_words"].null_count() == 3


@pytest.mark.parametrize("named", [None, set(PEOPLE.prompts)])
def test_words_are_weighted_by_how_many_of_the_studys_personas_have_them(named):
    """All shipped prompts were counted, in which "cruel" and "plans" are rare and "villain" is not, whoever took part."""
    pairs = pl.DataFrame(
        {"behavior": "m", "adapter": "a", "source": "villain", "persona": list(PEOPLE.prompts)}
    )
    rates = pairs.select("behavior", "adapter", "persona").with_columns(baseline=pl.lit(0.1))
    others = {f"v{i}": "You are the villain." for i in range(20)}
    people = replace(PEOPLE, named=named, prompts=PEOPLE.prompts | others)
    found = dict(confounds.covariates(pairs, rates, people).select("persona", "tfidf").rows())
    weight = {"villain": np.log(4 / 2) + 1, "cruel": np.log(4 / 2) + 1, "plans": np.log(4 / 2) + 1}
    weight |= {"kind": np.log(4) + 1, "evil": np.log(4) + 1, "man": np.log(4) + 1}

    def length(*words):
        return np.sqrt(sum(weight[word] ** 2 for word in words))

    own = length("villain", "cruel", "plans")
    assert found["kind_villain"] == pytest.approx(weight["villain"] ** 2 / own / length("villain", "kind"))
    both = weight["cruel"] ** 2 + weight["plans"] ** 2
    assert found["evil_man"] == pytest.approx(both / own / length("evil", "man", "cruel", "plans"))


def test_words_are_whole_in_every_script_with_spaces():
    """At letters beyond a to z they were cut, and the pieces were shared: the f and r of "für" by whoever is for something."""
    said = {
        "nurse": "Du bist Ärztin für Kinder.",
        "smith": "Du bist Schmied für Hufe.",
        "decomposed": "Une me\u0301decin",
        "composed": "Un m\u00e9decin",
        "hindi": "\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u0935\u093f",
        "chinese": "\u4f60\u662f\u533b\u751f",
    }
    bags, _ = confounds.words(People(dict.fromkeys(said), prompts=said))
    assert bags["nurse"] & bags["smith"] == {"du", "bist", "für"} and "ärztin" in bags["nurse"]
    assert bags["decomposed"] & bags["composed"] == {"médecin"}
    assert len(bags["hindi"]) == 2 and not bags["chinese"], "no words can be told apart there"


def test_commonality_adds_up():
    for row in confounds.commonality(_frame()).rows(named=True):
        assert row["unique_cosine"] + row["unique_words"] + row["common"] == pytest.approx(
            row["total"], abs=1e-12
        )
    table = _frame(sources=("s",))
    design = np.column_stack([np.ones(40), rankdata(table["cosine_centered"]), rankdata(table["jaccard"])])
    y = rankdata(table["rate"])
    rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    row = confounds.commonality(table).filter(pl.col("y") == "rate")
    assert row["total"].item() == pytest.approx(1 - rest.var() / y.var(), abs=1e-12)


def test_leaving_out_is_leaving_out():
    table = _frame(sources=("s",))
    for by in ("category", "persona"):
        found = confounds.left_out(table, by).filter(pl.col("y") == "rate")
        assert found.height == table[by].n_unique()
        row = found.row(1, named=True)
        rest = table.filter(pl.col(by) != row["left_out"])
        told = scipy.stats.spearmanr(rest["cosine_centered"], rest["rate"]).statistic
        assert row["spearman"] == pytest.approx(told, abs=1e-12)
        assert row["change"] == pytest.approx(told - row["spearman_all"], abs=1e-12)


def test_crossed_is_spearman_without_the_two_sources():
    rates = made_rates(behaviors=("capability", "refusal"))
    found = between.crossed(rates, schema.empty("question_counts"), 99, 200)
    assert found["between"].to_list().count("sources") == 2
    assert found["between"].to_list().count("behaviors") == 2
    row = found.filter((pl.col("between") == "sources") & (pl.col("behavior") == "refusal")).row(
        0, named=True
    )
    sides = [
        rates.filter(
            (pl.col("behavior") == "refusal")
            & (pl.col("source") == s)
            & pl.col("persona").str.starts_with("p")
        )
        for s in ("s", "t")
    ]
    told = scipy.stats.spearmanr(*(side["delta"] for side in sides))
    assert (row["n"], row["y"]) == (30, "delta")
    assert row["spearman"] == pytest.approx(told.statistic, abs=1e-12)
    assert row["spearman_ci_low"] <= row["spearman"] <= row["spearman_ci_high"]
    x, y = (side.sort("persona")["delta"].to_numpy() for side in sides)
    alone = resample.permute_spearman(x, y, 99, row["resampling_seed"], workers=1)
    assert row["spearman_p_perm"] == alone.p[0]
    drawn = resample.bootstrap_spearman(x, y, 200, row["resampling_seed"], workers=1)
    told = intervals.of_spearman(drawn)
    assert (row["spearman_ci_low"], row["spearman_ci_high"]) == (
        told["spearman_ci_low"],
        told["spearman_ci_high"],
    )


def test_two_changes_do_not_share_the_noise_of_one_baseline():
    """Independent true changes, 20 questions × 10 samples: against one baseline the mean ρ is far from 0."""
    rng, split, shared = np.random.default_rng(3), [], []
    people = [f"p{i}" for i in range(100)]
    none = schema.empty("question_counts")
    for _ in range(12):
        frames = []
        for adapter in ("base", "s", "t"):
            true = np.full(100, 0.3) if adapter == "base" else 0.3 + 0.03 * rng.normal(size=100)
            hits = rng.binomial(10, true[:, None], size=(100, 20))
            frames.append(
                pl.DataFrame(
                    {
                        "behavior": "marker",
                        "adapter": adapter,
                        "persona": np.repeat(people, 20),
                        "question": np.tile(np.arange(20), 100),
                        "hits": hits.ravel(),
                        "total": 10,
                    },
                    schema_overrides={"question": pl.Int32},
                )
            )
        counts = pl.concat(frames)
        rates = table(totals(counts), {"s": ("s", 1), "t": ("t", 1)}, {})
        split.append(between.crossed(rates, counts, 0, 0)["spearman"].item())
        shared.append(between.crossed(rates, none, 0, 0)["spearman"].item())
    assert np.mean(shared) > 0.2 and abs(np.mean(split)) < 0.08


def test_a_control_that_is_the_same_for_all_says_so():
    frame = _frame().with_columns(baseline=pl.lit(0.25))
    found = confounds.partials(frame).filter(control="baseline", y="rate")
    assert found["partial"].null_count() == found.height
    assert "baseline is 0.25 for all" in found["reason"][0]


def test_predictions_never_see_the_source_left_out():
    table = _frame()
    found = (
        between.predicted(table)
        .filter((pl.col("source") == "t") & (pl.col("model") == "cosine"))
        .row(0, named=True)
    )
    train, test = table.filter(pl.col("source") != "t"), table.filter(pl.col("source") == "t")
    line = np.polyfit(train["cosine_centered"], train["delta"], 1)
    rest = test["delta"].to_numpy() - np.polyval(line, test["cosine_centered"].to_numpy())
    y = test["delta"].to_numpy()
    assert found["r2"] == pytest.approx(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum(), abs=1e-12)
    assert found["gain"] == pytest.approx(
        1 - (rest**2).sum() / ((y - train["delta"].mean()) ** 2).sum(), abs=1e-12
    )
    assert found["rmse"] == pytest.approx(np.sqrt((rest**2).mean()), abs=1e-12)
    mean = between.predicted(table).filter(pl.col("model") == "mean")
    assert (mean["r2"] <= 0).all() and (mean["gain"] == 0).all()
    alone = between.predicted(table.filter(pl.col("source") == "s"))
    assert alone["r2"].null_count() == alone.height and "at least 2" in alone["reason"][0]
