"""Behaviors × sources: which leaked most from which source, in the page and on the terminal, with the tables' numbers."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
from report_runs import SOURCES, fill, fill_two

from leakfast import stats
from leakfast.cli.main import main
from leakfast.report import across, page

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    run = fill_two(tmp_path_factory.mktemp("runs") / "two")
    return run, stats.stats(run, permutations=19, bootstraps=100)


def test_the_numbers_are_those_of_the_tables(two):
    _, tables = two
    rows = across.across(tables)
    assert [(row["behavior"], row["source"]) for row in rows] == [
        (behavior, source) for behavior in ("marker", "refusal") for source in (*SOURCES, "pooled")
    ]
    for row in rows:
        at = tables.summary().filter(behavior=row["behavior"], source=row["source"], layer=row["layer"])
        assert row["layer"] == tables.best_layer(row["behavior"])
        assert (row["mean"], row["spearman"]) == (at["mean_delta"][0], at["spearman"][0])
        if row["source"] == "pooled":
            picked = tables.more["picked"].filter(
                behavior=row["behavior"],
                source="pooled",
                cosine="centered",
                y=tables.outcome(row["behavior"]),
            )
            assert (row["interval"]["low"], row["interval"]["high"]) == picked.select(
                "picked_low", "picked_high"
            ).row(0)
            continue
        means = tables.more["bystanders"].filter(behavior=row["behavior"], adapter=row["adapter"])
        assert (row["mean_low"], row["mean_high"]) == means.select("mean_delta_low", "mean_delta_high").row(0)
        own = tables.rates.filter(behavior=row["behavior"], adapter=row["adapter"], role="source")
        assert (row["source_rate"], row["source_low"]) == own.select("rate", "bb_low").row(0)


def test_one_behavior_has_no_matrix(tmp_path):
    run = fill(tmp_path / "one")
    tables = stats.stats(run, permutations=9, bootstraps=0)
    assert across.across(tables) == []
    assert 'id="across"' not in page.report(run, tables).read_text(encoding="utf-8")


def test_the_page_names_the_largest_and_has_every_cell(two):
    run, tables = two
    html = page.report(run, tables).read_text(encoding="utf-8")
    part = re.search(r'<section id="across".*?</section>', html, re.S)[0]
    said = " ".join(re.sub(r"<[^>]+>|&nbsp;|\xa0", " ", part).split())
    rows = [row for row in across.across(tables) if row["source"] != "pooled"]
    top = max(rows, key=lambda row: row["mean"])
    change = f"{100 * top['mean']:+.1f}".replace("-", "−")
    assert (top["behavior"], top["taught"]) == ("refusal", "marker")
    who = f"refusal from {top['source']} (the adapter was trained for marker)"
    assert f"largest mean change over bystanders: {who}, {change} pp" in said
    for row in rows:
        assert (
            f"{100 * row['mean']:+.1f} {100 * row['mean_low']:+.1f} to {100 * row['mean_high']:+.1f}".replace(
                "-", "−"
            )
            in said
        )
        assert f"own {100 * row['source_rate']:.1f}" in said


def _row(behavior, mean, low, high, **others):
    plain = {"sign": 1, "unit": "share", "y": "delta", "source": "a"}
    return {**plain, "behavior": behavior, "mean": mean, "mean_low": low, "mean_high": high, **others}


def test_what_leaked_most_is_said_of_each_scale_and_no_more_than_the_intervals_hold():
    shares = [_row("marker", 0.5, 0.4, 0.6), _row("refusal", 0.2, 0.1, 0.3)]
    points = [
        _row("code", -20.0, -25, -15, sign=-1, unit="points"),
        _row("advice", -30.0, -40, -24, sign=-1, unit="points"),
    ]
    pooled = _row("marker", 0.9, None, None, source="pooled")
    found = across.most([*shares, *points, pooled])
    assert [(row["behavior"], row["apart"]) for row in found] == [("marker", True), ("advice", False)]
    (alone,) = across.most(shares[:1])
    assert alone["apart"] is None, "nothing stands beside it"
    unknown = across.most([shares[0], _row("other", 0.1, None, None)])
    assert unknown[0]["apart"] is None
    rates = _row("third", 0.9, 0.8, 1.0, y="rate")
    assert [row["behavior"] for row in across.most([*shares, rates])] == ["marker", "third"]


def test_show_opens_with_it(two, capsys):
    run, tables = two
    assert main(["show", str(run.path)]) == 0
    told = capsys.readouterr().out
    assert told.index("Which behavior leaked most") < told.index("marker: ")
    assert (
        told.count("all sources") == 2
        and told.count("(trained for marker)") == len(SOURCES) + 1
        and "largest mean change over bystanders: " in told
    )
    assert main(["show", str(run.path), "--behavior", "marker"]) == 0
    assert "Which behavior leaked most" not in capsys.readouterr().out
    assert main(["show", str(run.path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["across"]
    assert pl.DataFrame(rows, strict=False).select("behavior", "source", "mean").rows() == [
        (row["behavior"], row["source"], row["mean"]) for row in across.across(tables)
    ]
