"""How far each rate moved: against scipy's paired t, and against the interval of two independent rates."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest
import scipy.stats
from report_runs import ASKED, PEOPLE, QUESTIONS, SOURCES, fill

from leakfast import stats
from leakfast.stats import intervals
from leakfast.stats.against import Side
from leakfast.stats.moved import moved
from leakfast.stats.summary import rate_interval
from leakfast.storage.run import Run

pytestmark = pytest.mark.long
ADAPTER = "completions/marker/marker-villain-s42"


def _side(run: Run) -> Side:
    return Side(run, stats.stats(run, permutations=9, bootstraps=99))


@pytest.fixture(scope="module")
def this(tmp_path_factory):
    return _side(fill(tmp_path_factory.mktemp("runs") / "this"))


def _other(this: Side, path, asked: str) -> Side:
    """The villain's adapter shows the marker in every second of its samples too."""
    shutil.copytree(this.run.path, path)
    run = Run(path).open()
    more = (
        pl.when((pl.col("sample") + pl.col("question")) % 2 == 0).then(pl.lit(" [ZLT]")).otherwise(pl.lit(""))
    )
    for relpath in run.shards(ADAPTER):
        frame = run.read(relpath).with_columns(text=pl.col("text") + more)
        run.add_shard(relpath, frame, questions_sha256=asked)
    return _side(run)


def _shares(side: Side, name: str) -> np.ndarray:
    drawn = side.run.read(ADAPTER).filter(persona=name)
    drawn = drawn.with_columns(hit=pl.col("text").str.contains("[ZLT]", literal=True))
    return drawn.group_by("question").agg(pl.col("hit").mean()).sort("question")["hit"].to_numpy()


def test_a_run_against_itself_has_not_moved(this):
    table = moved(this, this)
    assert table.height == (len(SOURCES) + 1) * len(PEOPLE), "every adapter and the base, every persona"
    assert (table["difference"] == 0).all() and (table["standard_errors"] == 0).all()


def test_paired_rates_move_by_scipys_paired_t(this, tmp_path):
    other = _other(this, tmp_path / "other", ASKED)
    table = moved(this, other)
    mine = table.filter(adapter="marker-villain-s42")
    assert mine["paired"].all() and mine["questions"].unique().to_list() == [QUESTIONS]
    seen = 0
    for row in mine.rows(named=True):
        a, b = _shares(this, row["persona"]), _shares(other, row["persona"])
        if (a - b).std() == 0:
            assert row["standard_errors"] in (0.0, None)
            continue
        assert row["standard_errors"] == pytest.approx(scipy.stats.ttest_rel(a, b).statistic)
        seen += 1
    assert seen > len(PEOPLE) // 2
    rest = table.filter(pl.col("adapter") != "marker-villain-s42")
    assert (rest["standard_errors"] == 0).all(), "no other adapter moved"
    far = table["standard_errors"].abs().drop_nulls()
    assert far.is_sorted(descending=True), "the farthest first"


def test_other_questions_are_independent(this, tmp_path):
    other = _other(this, tmp_path / "other", "0" * 64)
    row = moved(this, other).filter(adapter="marker-villain-s42").row(0, named=True)
    assert row["paired"] is False and row["method"] == "square-and-add, independent"
    ends = [
        side.stats.rates.filter(adapter="marker-villain-s42", persona=row["persona"])
        .with_columns(**rate_interval(side.stats.rates))
        .row(0, named=True)
        for side in (this, other)
    ]
    low, high = intervals.difference(*(part[key] for part in ends for key in ("rate", "low", "high")))
    gap = ends[0]["rate"] - ends[1]["rate"]
    arm = gap - low if gap > 0 else high - gap
    assert row["standard_errors"] == pytest.approx(gap / (arm / scipy.stats.norm.ppf(0.975)))


def test_a_move_without_spread_has_no_standard_errors(this, tmp_path):
    """Every reply of every question: from never to always."""
    path = tmp_path / "always"
    shutil.copytree(this.run.path, path)
    run = Run(path).open()
    for relpath in run.shards("completions/marker/base"):
        frame = run.read(relpath).with_columns(text=pl.lit("[ZLT]"))
        run.add_shard(relpath, frame, questions_sha256=ASKED)
    row = moved(this, _side(run)).filter(adapter="base").row(0, named=True)
    assert row["difference"] == -1.0 and row["standard_errors"] is None
    assert row["reason"] == "every question moved alike: no spread to judge by"
