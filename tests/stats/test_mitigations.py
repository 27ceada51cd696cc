"""Variants at equal strength: the right point of training is taken, means and paired differences are numpy's and scipy's, the
radius is that of the table radius, and what is not there has a reason."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats
from scipy.special import expit

from leakfast.stats import matching, mitigations, radius
from leakfast.storage import columns

N = 40
COSINE = np.linspace(-0.6, 0.9, N)
DRAWS = (200, 0, 1)
BEST = {"marker": ("centered", 2), "marker+far": ("centered", 4)}


def counts(middle, source, total=100):
    """persona, role, hits, total of a source and N bystanders on a logistic curve."""
    hits = np.rint(total * source * expit((COSINE - middle) / 0.1)).astype(int)
    names, roles = ["s", *(f"p{i}" for i in range(N))], ["source", *["bystander"] * N]
    about = {"persona": names, "role": roles, "hits": [round(total * source), *hits.tolist()]}
    return pl.DataFrame(about | {"total": [total] * (N + 1)})


def rates(**arms):
    """variant → (middle of the curve, the source's rate)."""
    parts = []
    for variant, (middle, source) in arms.items():
        name = "marker" if variant == "plain" else f"marker+{variant}"
        about = {"behavior": name, "adapter": f"{name}-s-s42", "source": "s", "taught": name}
        lits = [pl.lit(value).alias(key) for key, value in about.items()]
        parts.append(
            counts(middle, source).with_columns(*lits, seed=pl.lit(42, pl.Int64), baseline=pl.lit(0.0))
        )
    return pl.concat(parts)


def pairs(found):
    others = found.filter(role="bystander").select("behavior", "seed", "source", "adapter", "persona")
    cosine = pl.DataFrame({"persona": [f"p{i}" for i in range(N)], "cosine_centered": COSINE})
    here = others.join(cosine, on="persona", maintain_order="left")
    return pl.concat(
        [
            here.with_columns(layer=pl.lit(2, pl.Int32)),
            here.with_columns(-pl.col("cosine_centered"), layer=pl.lit(4, pl.Int32)),
        ]
    )


def point(variant, share, middle, source):
    about = {
        "behavior": "marker",
        "adapter": f"marker+{variant}-s-s42",
        "scoring": "detector",
        "items": "eval",
    }
    lits = [pl.lit(value).alias(key) for key, value in about.items()]
    return counts(middle, source).drop("role").with_columns(*lits, share=pl.lit(share))


def of_source(variant, share, hits, scoring, total=100):
    """What the source alone said at a point."""
    row = point(variant, share, 0.1, 0.5).filter(persona="s")
    return row.with_columns(
        hits=pl.lit(hits, pl.Int64), total=pl.lit(total, pl.Int64), scoring=pl.lit(scoring)
    )


def made(found, trajectory=None, **more):
    trajectory = pl.DataFrame() if trajectory is None else trajectory
    return mitigations.table(pairs(found), found, trajectory, BEST, DRAWS, **more).rows_by_key(
        "variant", named=True, unique=True
    )


def test_means_and_differences_are_over_the_same_bystanders():
    found = rates(far=(0.4, 0.9), plain=(0.1, 0.9))
    table = made(found)
    assert list(table) == ["", "far"]
    plain, far = (counts(m, 0.9).filter(role="bystander")["hits"].to_numpy() / 100 for m in (0.1, 0.4))
    assert table["far"]["mean_bystander"] == pytest.approx(far.mean())
    low, high = stats.t.interval(0.95, N - 1, far.mean(), stats.sem(far))
    assert (table["far"]["mean_bystander_low"], table["far"]["mean_bystander_high"]) == pytest.approx(
        (low, high)
    )
    paired = stats.ttest_rel(far, plain).confidence_interval()
    assert table["far"]["difference"] == pytest.approx((far - plain).mean())
    ends = (table["far"]["difference_ci_low"], table["far"]["difference_ci_high"])
    assert ends == pytest.approx((paired.low, paired.high))
    assert table[""]["difference"] is None and table[""]["difference_reason"] == "the plain behavior itself"


def test_an_arm_that_was_asked_or_drawn_otherwise_at_its_end_has_a_reason_for_no_difference():
    found = rates(plain=(0.1, 0.9), far=(0.4, 0.9))
    plain, far = ("marker", "marker-s-s42"), ("marker+far", "marker+far-s-s42")
    for key, word in (("questions_sha256", "asked other questions"), ("drawn", "drawn otherwise")):
        table = made(found, told={plain: {key: {"a"}}, far: {key: {"b"}}})
        assert table["far"]["difference"] is None and word in table["far"]["difference_reason"]
        assert table["far"]["mean_bystander"] is not None, "what it showed stands"
        assert made(found, told={plain: {key: {"a"}}, far: {key: {"a"}}})["far"]["difference"] is not None


def test_an_arm_that_was_asked_otherwise_at_its_point_has_a_reason_for_no_difference_and_no_baseline():
    """Compared are the points where arms stand: how their ends were asked is another matter."""
    found = rates(plain=(0.1, 0.9), far=(0.4, 0.9)).with_columns(baseline=pl.lit(0.2))
    halfway = pl.concat([point(v, 0.5, m, 0.5) for v, m in (("plain", 0.1), ("far", 0.4))])
    halfway = halfway.with_columns(adapter=pl.col("adapter").str.replace("marker\\+plain", "marker"))
    named = {"plain": ("marker", "marker-s-s42"), "far": ("marker+far", "marker+far-s-s42")}
    at = {f"{arm} halfway": ("marker", f"{name}@p050") for arm, (_, name) in named.items()} | named

    def far(wanted=0.5, points=halfway, **asked):
        told = {at[name.replace("_", " ")]: {"questions_sha256": {its}} for name, its in asked.items()}
        return made(found, points, wanted=wanted, told=told)["far"]

    alike = far(plain_halfway="a", far_halfway="a", plain="a", far="b")
    assert alike["share"] == 0.5 and alike["difference"] is not None
    apart = far(plain_halfway="a", far_halfway="b", plain="a", far="a")
    assert apart["difference"] is None and "asked other questions" in apart["difference_reason"]
    assert apart["mean_bystander"] == alike["mean_bystander"], "what it showed stands"
    # the plain behavior has no point: its end is as strong as any, and was asked something else
    alone = halfway.filter(pl.col("adapter").str.starts_with("marker+far"))
    assert "asked other questions" in far(points=alone, far_halfway="b", plain="a")["difference_reason"]
    # half of the way from the baseline, 0.2, to the source's rate, or from 0 where there is none
    its = {asked: far(far_halfway=asked, far="a")["radius"] for asked in "ab"}
    bare = made(found.with_columns(baseline=pl.lit(None, pl.Float64)), halfway, wanted=0.5)["far"]["radius"]
    assert its["b"] == bare != its["a"]


def test_the_radius_is_at_the_plain_behaviors_layer_for_all():
    found = rates(plain=(0.1, 0.9), far=(0.4, 0.9))
    table = made(found)
    assert {row["layer"] for row in table.values()} == {2}
    assert [row["radius"] for row in table.values()] == pytest.approx([0.1, 0.4], abs=0.01)
    assert table["far"]["radius_low"] < 0.4 < table["far"]["radius_high"]
    same = (
        radius.table(pairs(found), found, {"marker": ("centered", 2)}, *DRAWS)
        .filter(behavior="marker")
        .row(0, named=True)
    )
    for name in ("status", "radius", "radius_low", "radius_high", "share_inside", "share_inside_low"):
        assert table[""][name] == same[name]


def test_the_point_of_training_nearest_the_weakest_arm_is_taken():
    found = rates(plain=(0.1, 0.6), strong=(0.0, 1.0), lost=(0.2, 0.95))
    points = [point("strong", s, m, r) for s, m, r in ((0.25, 0.5, 0.2), (0.5, 0.3, 0.57), (0.75, 0.2, 0.63))]
    points += [point("lost", 0.5, 0.3, 0.3), point("strong", 1.0, 0.0, 0.6)]
    table = made(found, pl.concat(points))
    assert {row["wanted_rate"] for row in table.values()} == {0.6}
    assert (table["strong"]["share"], table["strong"]["matched"], table["strong"]["source_rate"]) == (
        0.75,
        True,
        0.63,
    )
    assert (table["lost"]["share"], table["lost"]["matched"], table["lost"]["source_rate"]) == (
        1.0,
        False,
        0.95,
    )
    assert (table[""]["share"], table[""]["matched"]) == (1.0, True)
    asked = made(found, pl.concat(points), wanted=0.95)
    assert (asked["lost"]["matched"], asked["strong"]["matched"], asked[""]["matched"]) == (True, True, False)


def test_a_rate_that_no_point_reaches_is_a_status():
    found = rates(plain=(0.1, 0.6), strong=(0.0, 1.0), lost=(0.2, 0.95))
    points = pl.concat([point("lost", 0.5, 0.3, 0.3), point("strong", 0.5, 0.1, 0.93)])

    def sides(wanted):
        return {name: row["match"] for name, row in made(found, points, wanted=wanted).items()}

    assert sides(0.8) == {"": "weaker", "strong": "stronger", "lost": "passed over"}
    assert sides(0.97) == {"": "weaker", "strong": "matched", "lost": "matched"}
    assert sides(0.0) == {"": "stronger", "strong": "stronger", "lost": "stronger"}
    row = made(found, points, wanted=0.8)["lost"]
    assert (row["share"], row["matched"], row["source_rate"], row["wanted_rate"]) == (1.0, False, 0.95, 0.8)
    unknown = found.filter(pl.col("role") != "source")
    assert {row["match"] for row in made(unknown, points, wanted=0.8).values()} == {"unknown"}
    assert mitigations.has_arms(found) and not mitigations.has_arms(found.filter(behavior="marker"))


def chosen(variant, looked, share, anew, total=400):
    """A training that was matched: rates of the source by which a point was chosen, everybody there, and the source anew."""
    looks = [of_source(variant, at, hits, matching.TO_CHOOSE) for at, hits in looked.items()]
    everybody = [] if share == 1.0 else [point(variant, share, 0.3, 0.5)]
    return [*looks, *everybody, of_source(variant, share, anew, matching.ANEW, total)]


def test_a_chosen_point_is_told_by_replies_that_did_not_choose_it():
    found = rates(plain=(0.1, 0.6), strong=(0.0, 1.0))
    points = chosen("strong", {0.2: 30, 0.4: 80, 0.6: 88, 1.0: 100}, 0.4, 308)
    row = made(found, pl.concat(points), match=0.8)["strong"]
    assert (row["share"], row["source_rate"], row["source_n"]) == (0.4, 0.77, 400)
    assert (row["wanted_rate"], row["matched"], row["match"]) == (0.8, True, "matched")
    ends = stats.binomtest(308, 400).proportion_ci(method="wilson")
    assert (row["source_rate_low"], row["source_rate_high"]) == pytest.approx((ends.low, ends.high))
    others = counts(0.3, 0.5).filter(role="bystander")["hits"] / 100
    assert row["mean_bystander"] == pytest.approx(others.mean())
    plain = made(found, pl.concat(points), match=0.8)[""]
    assert (plain["share"], plain["source_n"], plain["match"]) == (1.0, 100, "weaker"), "nothing was chosen"


def test_a_point_near_by_chance_alone_is_not_matched_and_stands_all_the_same():
    found = rates(plain=(0.1, 0.6), strong=(0.0, 1.0))

    def word(looked, share, anew):
        row = made(found, pl.concat(chosen("strong", looked, share, anew)), match=0.8)["strong"]
        assert not row["matched"] and row["share"] == share
        return row["match"]

    assert word({0.2: 30, 0.4: 80, 1.0: 100}, 0.4, 280) == "missed"
    assert word({0.2: 30, 0.4: 72, 1.0: 100}, 0.4, 280) == "passed over"
    assert word({0.2: 30, 0.4: 72, 1.0: 60}, 0.4, 280) == "weaker"
    assert word({0.2: 90, 0.4: 95, 1.0: 88}, 1.0, 360) == "stronger"


def test_another_rate_than_the_one_chosen_for_is_looked_for_among_all_points():
    found = rates(plain=(0.1, 0.6), strong=(0.0, 1.0))
    points = chosen("strong", {0.2: 30, 0.4: 80, 1.0: 100}, 0.4, 308)
    row = made(found, pl.concat(points), wanted=1.0, match=0.8)["strong"]
    assert (row["share"], row["match"], row["source_rate"]) == (1.0, "matched", 1.0)
    near = made(found, pl.concat(points), wanted=0.76, match=0.8)["strong"]
    assert (near["share"], near["source_n"]) == (0.4, 400)
    unasked = pl.concat([of_source("strong", 0.4, 80, matching.TO_CHOOSE)])
    row = made(found, unasked, match=0.8)["strong"]
    assert (row["share"], row["match"]) == (1.0, "stronger"), "nobody else was asked there yet"


def test_points_that_were_asked_of_other_personas_are_not_taken():
    found = rates(plain=(0.1, 0.6), strong=(0.0, 1.0))
    few = point("strong", 0.5, 0.3, 0.6).filter(pl.col("persona") != "p3")
    chances = point("strong", 0.75, 0.3, 0.6).with_columns(scoring=pl.lit("probability, end"))
    assert not made(found, pl.concat([few, chances]))["strong"]["matched"]


def test_a_behavior_without_variants_has_no_row_and_what_another_was_trained_for_is_none():
    assert not made(rates(plain=(0.1, 0.9)))
    both = rates(plain=(0.1, 0.9), far=(0.4, 0.9)).with_columns(taught=pl.lit("refusal"))
    assert not made(both)
    found = made(rates(far=(0.4, 0.9), near=(0.1, 0.9)))
    assert {row["difference_reason"] for row in found.values()} == {"the plain behavior was not measured"}


def test_the_table_has_the_described_columns_and_dtypes():
    marked = ("health", "health_of")  # added by stats.marks
    wanted = {c.name: c.dtype for c in columns.columns("mitigations") if c.name not in marked}
    assert {name: str(kind()) for name, kind in mitigations.SCHEMA.items()} == wanted
