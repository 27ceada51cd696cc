"""The rules of a file, and the numbers that decide them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from leakfast.errors import InputError
from leakfast.stats import verdicts
from leakfast.stats.correlations import correlate
from leakfast.storage import schema
from tests.rates_made import made_rates

OF_THE_STUDY = ~pl.col("claim").str.ends_with("of its own source")


def _pairs(others: pl.DataFrame, cosine: pl.Series) -> pl.DataFrame:
    """Bystanders at layer 3, with these centered cosines."""
    return others.select(
        *("behavior", "source", "seed", "persona", "category", "rate", "delta", "adapter"),
        layer=pl.lit(3, pl.Int32),
        cosine_centered=cosine,
        cosine_raw=pl.lit(None, pl.Float64),
    )


def _judged(drop: float, slope: float, specificity: pl.DataFrame | None = None) -> pl.DataFrame:
    rates = made_rates(sources=("s",), drop=drop)
    others = rates.filter(pl.col("role") == "bystander")
    pairs = _pairs(others, slope * others["delta"])
    return verdicts.judge(rates, correlate(pairs, 199), {"capability": 3}, specificity=specificity)


def test_the_study_rules_confirm_and_falsify_with_their_numbers():
    confirmed = _judged(0.3, -1.0).filter(OF_THE_STUDY)
    assert confirmed["verdict"].unique().to_list() == ["confirmed"] and confirmed["met"].all()
    numbers = dict(confirmed.select("quantity", "value").rows())
    assert numbers["source_drop"] == pytest.approx(0.3, abs=0.03) and numbers[
        "spearman_drop"
    ] == pytest.approx(1)
    small = _judged(0.04, -1.0).filter(OF_THE_STUDY)
    assert small["verdict"].unique().to_list() == ["falsified"]
    assert small.filter(~pl.col("met"))["quantity"].to_list() == ["source_drop"]
    turned = _judged(0.3, 1.0).filter(OF_THE_STUDY)  # nearer personas drop less
    assert turned.filter(~pl.col("met"))["quantity"].to_list() == ["spearman_drop"]


def test_a_claim_about_the_source_is_open_without_its_rank_and_decided_by_it():
    def verdict(p_source: float | None) -> str:
        cell = {
            "behavior": "capability",
            "adapter": "capability-s-s42",
            "layer": 3,
            "cosine": "centered",
            "y": "delta",
        }
        table = pl.DataFrame(
            [{**cell, "p_source": 0.001, "p_source_max": p_source}], schema_overrides={"layer": pl.Int32}
        )
        adapter = made_rates(sources=("s",))["adapter"].drop_nulls().to_list()[0]
        table = table.with_columns(adapter=pl.lit(adapter))
        return _judged(0.3, -1.0, None if p_source is None else table).filter(~OF_THE_STUDY)["verdict"].item()

    assert [verdict(p) for p in (None, 0.01, 0.2)] == ["open", "confirmed", "falsified"]


def test_what_was_not_measured_leaves_the_verdict_open():
    rates = made_rates(sources=("s",)).with_columns(pl.lit(None, pl.Float64).alias("delta"))
    found = verdicts.judge(rates, correlate(schema.empty("pairs")), {"capability": None}).filter(OF_THE_STUDY)
    assert found["verdict"].unique().to_list() == ["open"]
    assert found["value"].null_count() == found["reason"].is_not_null().sum() == 3


@pytest.mark.parametrize("drop", [0.25, 0.3])  # the deviation of ten times 0.3 is 6e-17, not 0
def test_a_drop_that_all_bystanders_share_has_no_p(drop):
    rates = made_rates(sources=("s",), n=10).with_columns(
        delta=pl.when(pl.col("role") == "bystander").then(-drop).otherwise("delta")
    )
    found = verdicts.judge(rates, correlate(schema.empty("pairs")), {"capability": None})
    rows = found.filter(quantity="mean_bystander_drop")
    assert rows.height and rows["value"].to_list() == pytest.approx([drop] * rows.height)
    assert rows["p"].null_count() == rows["p_from"].null_count() == rows.height


def test_the_stop_rule_asks_for_both_traits():
    def found(capability: float, misalignment: float | None):
        rows = [("capability", capability), ("misalignment", misalignment)]
        rates, tables = [], []
        for behavior, rho in rows:
            if rho is None:
                continue
            mine = made_rates(sources=("s",), behaviors=(behavior,))
            rates.append(mine)
            others = mine.filter(pl.col("role") == "bystander")
            pairs = _pairs(others, others["delta"])
            tables.append(correlate(pairs, 19).with_columns(spearman=pl.lit(-rho)))
        table = verdicts.judge(pl.concat(rates), pl.concat(tables), {"capability": 3, "misalignment": 3})
        return table.filter(pl.col("claim").str.contains("sweep"))

    assert found(0.1, 0.15)["verdict"].unique().to_list() == ["stop"]
    assert found(0.1, 0.21)["verdict"].unique().to_list() == ["go on"]
    assert found(0.1, 0.2)["verdict"].unique().to_list() == ["go on"], "below the bar stops, the bar does not"
    assert found(0.1, None).is_empty(), "one trait alone decides nothing"


def test_a_layer_picked_afterwards_is_paid_for():
    rng = np.random.default_rng(3)
    rates = made_rates(sources=("s",))
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
        made_rates(sources=("s",), behaviors=("misalignment",)),
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
        made_rates(sources=("s",)),
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
    ours = [rule for rule in rules.rule if rule.claim.endswith("of its own source")]
    assert [(t.quantity, t.bar, t.p_below, t.p_source_below) for rule in ours for t in rule.test] == [
        ("spearman_drop", 0.2, None, 0.05)
    ] * 2
    theirs = [rule for rule in rules.rule if rule not in ours]
    told = {rule.behaviors[0]: [(t.quantity, t.bar, t.p_below) for t in rule.test] for rule in theirs}
    rho = ("spearman_drop", 0.2, 0.05)
    assert told == {
        "capability": [("source_drop", 0.05, None), ("mean_bystander_drop", 0.01, 0.05), rho],
        "misalignment": [("source_drop", 10, None), ("mean_bystander_drop", 2, None), rho],
    }
    assert rules.stop.spearman_drop == 0.2 and len(rules.stop.traits) == 2
