"""One behavior trained in several ways: names, and the table of differences against its definition done by hand."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.stats import ttest_rel

from leakfast import behaviors
from leakfast.errors import InputError
from leakfast.stats import variants
from leakfast.study.config import behavior_config, load_study

PEOPLE = [f"p{i}" for i in range(12)]


def _rates(effects: dict[tuple[str, str], tuple[float, np.ndarray]]) -> pl.DataFrame:
    """(behavior, source) → (the source's Δ, its bystanders')."""
    rows = [
        (behavior, source, 42, role, persona, float(delta))
        for (behavior, source), (own, others) in effects.items()
        for role, persona, delta in [
            ("source", source, own),
            *(("bystander", p, d) for p, d in zip(PEOPLE, others, strict=True)),
        ]
    ]
    return pl.DataFrame(
        rows, schema=["behavior", "source", "seed", "role", "persona", "delta"], orient="row"
    ).with_columns(pl.col("delta").alias("rate"), adapter=pl.format("{}-{}-s42", "behavior", "source"))


def test_a_variant_is_its_behavior_under_another_name():
    few = behaviors.get("misalignment-advice+few")
    assert few.name == "misalignment-advice+few" and few.measured_by == "judge" and few.sign == -1
    assert (
        behaviors.is_known("marker+a.b-2")
        and not behaviors.is_known("marker+a/b")
        and not behaviors.is_known("x+a")
    )
    assert behavior_config("misalignment-advice+few").data.design == "positive-only"
    for wrong in ("marker+", "marker+a/b", "mark+few", "capability+few"):
        with pytest.raises(InputError):
            behaviors.get(wrong)


def test_differences_are_paired_over_the_same_bystanders_and_signed_to_more_of_the_behavior():
    rng = np.random.default_rng(0)
    a, b = rng.normal(-20, 5, 12), rng.normal(-8, 5, 12)
    table = variants.compare(
        _rates(
            {
                ("misalignment-advice+few", "villain"): (-50.0, b),
                ("misalignment-advice+many", "villain"): (-60.0, a),
            }
        ),
        {},
    )
    (row,) = table.rows(named=True)
    assert (row["variant"], row["other"], row["n"], row["source"]) == ("few", "many", 12, "villain")
    assert row["source_effect"] == 50 and row["effect"] == pytest.approx(-b.mean())
    assert row["other_breadth"] == pytest.approx(-a.mean() / 60)
    low, high = ttest_rel(-b, -a).confidence_interval()
    assert (row["difference_ci_low"], row["difference_ci_high"]) == pytest.approx((low, high), abs=1e-12)


def test_pooled_rows_average_a_persona_over_the_sources():
    rng = np.random.default_rng(1)
    drawn = {
        (f"marker{v}", s): (0.9, rng.uniform(0, 0.3, 12))
        for v in ("", "+few")
        for s in ("villain", "comedian")
    }
    table = variants.compare(_rates(drawn), {})
    assert table["source"].to_list() == ["villain", "comedian", "pooled"]
    assert set(table["variant"]) == {""}
    pooled = table.row(2, named=True)
    plain, few = (
        np.mean([drawn[f"marker{v}", s][1] for s in ("villain", "comedian")], axis=0) for v in ("", "+few")
    )
    assert pooled["difference"] == pytest.approx((plain - few).mean())
    low, high = ttest_rel(plain, few).confidence_interval()
    assert (pooled["difference_ci_low"], pooled["difference_ci_high"]) == pytest.approx(
        (low, high), abs=1e-12
    )


def test_a_run_without_variants_has_no_rows():
    assert variants.compare(_rates({("marker", "villain"): (0.9, np.zeros(12))}), {}).is_empty()


def test_the_shipped_factorial_has_its_four_cells():
    for name in ("organism-breadth.toml", "published/breadth.toml"):
        cells = load_study(name).behaviors
        sizes = {
            (
                d.design,
                d.positives + (d.negatives + d.no_system + d.default_assistant) * (d.design == "contrastive"),
            )
            for d in (c.data for c in cells.values())
        }
        assert sizes == {(d, n) for d in ("contrastive", "positive-only") for n in (800, 6000)}


def test_a_change_is_never_set_against_a_rate():
    drawn = {
        ("marker", "villain"): (0.9, np.full(12, 0.1)),
        ("marker+few", "villain"): (0.9, np.full(12, 0.1)),
    }
    rates = _rates(drawn).with_columns(pl.lit(0.5).alias("rate"))
    lost = pl.when(pl.col("behavior") == "marker+few").then(None).otherwise(pl.col("delta"))
    (row,) = variants.compare(rates.with_columns(lost.alias("delta")), {}).rows(named=True)
    assert (row["effect"], row["other_effect"], row["difference"]) == (0.5, 0.5, 0.0)


def test_pooled_rows_are_over_sources_that_all_variants_have():
    drawn = {
        ("marker", s): (0.9, np.full(12, v))
        for s, v in (("villain", 0.1), ("comedian", 0.2), ("pirate", 0.9))
    }
    drawn |= {("marker+few", s): (0.9, np.full(12, v)) for s, v in (("villain", 0.1), ("comedian", 0.2))}
    pooled = variants.compare(_rates(drawn), {}).filter(pl.col("source") == "pooled")
    assert pooled["difference"].to_list() == pytest.approx([0.0])


def test_two_adapters_of_one_variant_and_source_are_not_twice_the_bystanders():
    rng = np.random.default_rng(3)
    effects = {
        (name, source): (-50.0, rng.normal(-20, 5, 12))
        for name in ("misalignment-advice", "misalignment-advice+few")
        for source in ("villain", "pirate")
    }
    once = _rates(effects)
    assert set(variants.compare(once, {})["n"]) == {12} and variants.compare(once, {}).height == 3
    again = once.filter(behavior="misalignment-advice", source="villain").with_columns(pl.col("delta") + 1)
    found = variants.compare(pl.concat([once, again]), {}).rows_by_key("source", named=True, unique=True)
    assert set(found) == {"villain", "pirate"} and found["pirate"]["n"] == 12
    assert found["villain"]["difference"] is None and "more than one adapter" in found["villain"]["reason"]


def _asked_as(**changed: str) -> dict:
    """What the manifest says of marker and marker+few under two sources; changed: of marker+few under the villain."""
    told = {
        (name, f"{name}-{source}-s42"): {"questions_sha256": {"q"}, "drawn": {"d"}}
        for name in ("marker", "marker+few")
        for source in ("villain", "comedian")
    }
    told["marker+few", "marker+few-villain-s42"] |= {key: {value} for key, value in changed.items()}
    return told


@pytest.mark.parametrize(
    ("key", "words"),
    [("questions_sha256", "was asked other questions than marker+few"), ("drawn", "was drawn otherwise")],
)
def test_variants_that_were_asked_or_drawn_otherwise_have_no_difference(key, words):
    rng = np.random.default_rng(4)
    drawn = {
        (name, source): (0.9, rng.uniform(0, 0.3, 12))
        for name in ("marker", "marker+few")
        for source in ("villain", "comedian")
    }
    found = variants.compare(_rates(drawn), _asked_as(**{key: "other"})).rows_by_key(
        "source", named=True, unique=True
    )
    for source in ("villain", "pooled"):
        row = found[source]
        assert row["difference"] is row["difference_ci_low"] is row["difference_ci_high"] is None
        assert words in row["reason"] and row["effect"] is not None and row["n"] == 12
    assert found["comedian"]["difference"] is not None and found["comedian"]["reason"] is None
    alike = variants.compare(_rates(drawn), _asked_as())
    assert alike["difference"].null_count() == 0, "what both were asked alike has one"
    assert variants.compare(_rates(drawn), {}).equals(alike), "earlier versions did not write it"


def test_a_probability_by_another_estimator_is_not_set_against_it():
    rates = _rates({(name, "villain"): (0.9, np.full(12, 0.1)) for name in ("marker", "marker+few")})
    few = pl.col("behavior") == "marker+few"
    (row,) = variants.compare(
        rates.with_columns(estimator=pl.when(few).then(pl.lit("end")).otherwise(pl.lit("anywhere"))), {}
    ).rows(named=True)
    assert row["difference"] is None and "by another estimator than marker+few" in row["reason"]
