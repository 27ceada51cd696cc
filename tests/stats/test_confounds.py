"""Confounds, crossed correlations, predictions, verdicts: each against its definition done the long way."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.stats
from scipy.stats import rankdata

from leakfast.errors import InputError
from leakfast.stats import confounds, verdicts
from leakfast.stats import transfer as between
from leakfast.stats.collect import People
from leakfast.stats.correlations import correlate
from leakfast.storage import schema

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


def _rates(sources=("s", "t"), behaviors=("capability",), drop=0.3, n=30) -> pl.DataFrame:
    rng = np.random.default_rng(5)
    rows = []
    for behavior in behaviors:
        for source in sources:
            for i, name in enumerate([*sources, *(f"p{i}" for i in range(n))]):
                role = "source" if name == source else "bystander"
                delta = -(drop if role == "source" else 0.05 + 0.002 * i) + 0.005 * rng.normal()
                rows.append(
                    (
                        behavior,
                        f"{behavior}-{source}",
                        source,
                        42,
                        name,
                        "c",
                        None,
                        None,
                        0.5 + delta,
                        None,
                        None,
                        0.5,
                        delta,
                        role,
                    )
                )
    columns = schema.columns("rates") | {"role": pl.String()}
    return pl.DataFrame(rows, schema=columns, orient="row")


def test_crossed_is_spearman_without_the_two_sources():
    rates = _rates(behaviors=("capability", "refusal"))
    found = between.crossed(rates, 99, 200)
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


def _judged(drop: float, slope: float) -> pl.DataFrame:
    rates = _rates(sources=("s",), drop=drop)
    others = rates.filter(pl.col("role") == "bystander")
    cosine = slope * others["delta"].to_numpy()
    pairs = others.select(
        "behavior",
        "source",
        "seed",
        "persona",
        "category",
        layer=pl.lit(3, pl.Int32),
        cosine_centered=pl.Series(cosine),
        cosine_raw=pl.lit(None, pl.Float64),
        rate="rate",
        delta="delta",
        adapter="adapter",
    )
    return verdicts.judge(rates, correlate(pairs, 199), {"capability": 3})


def test_the_study_rules_confirm_and_falsify_with_their_numbers():
    confirmed = _judged(0.3, -1.0)
    assert confirmed["verdict"].unique().to_list() == ["confirmed"] and confirmed["met"].all()
    numbers = dict(confirmed.select("quantity", "value").rows())
    assert numbers["source_drop"] == pytest.approx(0.3, abs=0.03) and numbers[
        "spearman_drop"
    ] == pytest.approx(1)
    small = _judged(0.04, -1.0)
    assert small["verdict"].unique().to_list() == ["falsified"]
    assert small.filter(~pl.col("met"))["quantity"].to_list() == ["source_drop"]
    turned = _judged(0.3, 1.0)  # nearer personas drop less
    assert turned.filter(~pl.col("met"))["quantity"].to_list() == ["spearman_drop"]


def test_what_was_not_measured_leaves_the_verdict_open():
    rates = _rates(sources=("s",)).with_columns(pl.lit(None, pl.Float64).alias("delta"))
    found = verdicts.judge(rates, correlate(schema.empty("pairs")), {"capability": None})
    assert found["verdict"].unique().to_list() == ["open"]
    assert found["value"].null_count() == found["reason"].is_not_null().sum() == 3


def test_the_stop_rule_asks_for_both_traits():
    def found(capability: float, misalignment: float | None):
        rows = [("capability", capability), ("misalignment", misalignment)]
        rates, tables = [], []
        for behavior, rho in rows:
            if rho is None:
                continue
            mine = _rates(sources=("s",), behaviors=(behavior,))
            rates.append(mine)
            others = mine.filter(pl.col("role") == "bystander")
            pairs = others.select(
                "behavior",
                "source",
                "seed",
                "persona",
                "category",
                layer=pl.lit(3, pl.Int32),
                cosine_centered=pl.col("delta"),
                cosine_raw=pl.lit(None, pl.Float64),
                rate="rate",
                delta="delta",
                adapter="adapter",
            )
            tables.append(correlate(pairs, 19).with_columns(spearman=pl.lit(-rho)))
        table = verdicts.judge(pl.concat(rates), pl.concat(tables), {"capability": 3, "misalignment": 3})
        return table.filter(pl.col("claim").str.contains("sweep"))

    assert found(0.1, 0.15)["verdict"].unique().to_list() == ["stop"]
    assert found(0.1, 0.21)["verdict"].unique().to_list() == ["go on"]
    assert found(0.1, 0.2)["verdict"].unique().to_list() == ["go on"], "below the bar stops, the bar does not"
    assert found(0.1, None).is_empty(), "one trait alone decides nothing"


def test_a_layer_picked_afterwards_is_paid_for():
    rng = np.random.default_rng(3)
    rates = _rates(sources=("s",))
    others = rates.filter(pl.col("role") == "bystander")
    pairs = pl.concat(
        others.select(
            "behavior",
            "source",
            "seed",
            "persona",
            "category",
            layer=pl.lit(layer, pl.Int32),
            cosine_centered=pl.Series(rng.normal(size=30) - 8 * others["delta"].to_numpy()),
            cosine_raw=pl.lit(None, pl.Float64),
            rate="rate",
            delta="delta",
            adapter="adapter",
        )
        for layer in range(12)
    )
    table = correlate(pairs, 999)
    row = table.filter(
        (pl.col("source") == "s")
        & (pl.col("y") == "delta")
        & pl.col("category").is_null()
        & (pl.col("cosine") == "centered")
        & (pl.col("layer") == 5)
    ).row(0, named=True)
    assert row["spearman_p_max"] > row["spearman_p_perm"]
    for picked, name in ((True, "spearman_p_max"), (False, "spearman_p_perm")):
        found = verdicts.judge(rates, table, {"capability": 5}, picked=picked)
        rho = found.filter((pl.col("quantity") == "spearman_drop") & (pl.col("verdict") != "open"))
        assert rho["p"].to_list() == [row[name]]
        assert ("largest of 12 layers" in rho["p_from"][0]) == picked


def test_rates_in_another_unit_than_the_bars_decide_nothing():
    found = verdicts.judge(
        _rates(sources=("s",), behaviors=("misalignment",)),
        correlate(schema.empty("pairs")),
        {"misalignment": None},
    )
    assert found["verdict"].unique().to_list() == ["open"]
    assert "shares" in found["reason"][0] and "points" in found["reason"][0]


def test_a_file_of_rules_decides_and_its_typos_are_named(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[rule]]\nclaim = "much"\nbehaviors = ["capability"]\nunit = "share"\n'
        'test = [{quantity = "source_drop", above = 0.9}]\n'
    )
    found = verdicts.judge(
        _rates(sources=("s",)),
        correlate(schema.empty("pairs")),
        {"capability": None},
        verdicts.load_rules(file),
    )
    assert found.select("claim", "quantity", "bar", "verdict").rows() == [
        ("much", "source_drop", 0.9, "falsified")
    ]
    good = file.read_text()
    for old, new, wanted in (
        ("behaviors", "behaviours", "line 3: unknown key rule.0.behaviours. Did you mean behaviors?"),
        ("above = 0.9", "abov = 0.9", "line 5: unknown key rule.0.test.0.abov. Did you mean above?"),
        ("source_drop", "sauce_drop", "line 5: rule.0.test.0.quantity is 'sauce_drop': input should be"),
        (", above = 0.9", "", "line 5: rule.0.test.0: a test needs one of above and at_least"),
        ("0.9}", "0.9, at_least = 1}", "a test needs one of above and at_least"),
        ("above = 0.9", "above = nan", "line 5: rule.0.test.0.above is nan"),
        ('unit = "share"', 'unit = "percent"', "line 4: rule.0.unit is 'percent'"),
        ("[[rule]]", "[[rule]", "not TOML"),
    ):
        file.write_text(good.replace(old, new))
        with pytest.raises(InputError) as error:
            verdicts.load_rules(file)
        assert wanted in error.value.message, error.value.message
    with pytest.raises(InputError, match="no such file"):
        verdicts.load_rules(tmp_path / "none.toml")


def test_the_shipped_rules_are_the_studys():
    rules = verdicts.load_rules()
    told = {rule.behaviors[0]: [(t.quantity, t.bar, t.p_below) for t in rule.test] for rule in rules.rule}
    rho = ("spearman_drop", 0.2, 0.05)
    assert told == {
        "capability": [("source_drop", 0.05, None), ("mean_bystander_drop", 0.01, 0.05), rho],
        "misalignment": [("source_drop", 10, None), ("mean_bystander_drop", 2, None), rho],
    }
    assert rules.stop.spearman_drop == 0.2 and len(rules.stop.traits) == 2
