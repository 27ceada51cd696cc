"""How far each rate moved: against scipy's paired t, and against the interval of two independent rates."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest
import scipy.stats
from report_runs import ASKED, PEOPLE, QUESTIONS, SOURCES, fill

from leakfast import stats
from leakfast.stats import accuracy, intervals
from leakfast.stats.against import Side
from leakfast.stats.moved import moved
from leakfast.stats.summary import rate_interval
from leakfast.stats.tables import Stats
from leakfast.storage import layout
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


def _answered(path, right: dict[str, list[int]], items: list[str], **of_base: str) -> Side:
    """A run of choice scores: persona → right or wrong, 1 or 0, by item (2: a tie), of an adapter and as often of the base."""
    run, people = Run(path).create(), pl.DataFrame({"persona": list(right)})
    for adapter, source in (("base", None), ("a-s42", "s")):
        rows = [
            {
                "behavior": "capability",
                "adapter": adapter,
                "persona": persona,
                "item": item,
                "scoring": "letters",
                "label": label,
                "logprob_nats": -1.0,
                "chosen": None if answer == 2 else (label == "A") == bool(answer),
                "chosen_per_byte": None,
                "correct": label == "A",
                "status": "tie" if answer == 2 else "ok",
                "source": source,
            }
            for persona, answers in right.items()
            for item, answer in zip(items, answers, strict=True)
            for label in "AB"
        ]
        frame = pl.DataFrame(rows, schema_overrides={"chosen_per_byte": pl.Boolean, "source": pl.String})
        told = {"behavior": "capability", "items": "facts", "items_sha256": "a"}
        told |= of_base if adapter == "base" else {}
        run.add_shard(layout.shard(layout.choices(adapter, "facts", "letters")), frame, **told)
    scores = pl.concat([run.read(path) for path in run.shards(layout.CHOICES)], how="diagonal_relaxed")
    counts = accuracy.count(scores)
    sums = counts.group_by("behavior", "adapter", "persona", maintain_order=True).agg(
        pl.col("hits", "total").sum()
    )
    rates = sums.join(people, on="persona").with_columns(
        rate=pl.col("hits") / pl.col("total"),
        role=pl.when(adapter="base").then(pl.lit("base")).otherwise(pl.lit("bystander")),
        source=pl.when(pl.col("adapter") != "base").then(pl.lit("s")),
        seed=pl.lit(42),
        ci_low=pl.lit(0.1),
        ci_high=pl.lit(0.9),
    )
    return Side(run, Stats(rates, rates, rates, more={"question_counts": counts}))


def test_accuracies_are_paired_by_item(tmp_path):
    """Where both runs asked the same items, by a paired t over them; a tie of one persona leaves the others paired."""
    items, one = [f"i{k}" for k in range(6)], [1, 1, 1, 0, 1, 1]
    other = [1, 0, 0, 0, 1, 1]
    this = _answered(tmp_path / "this", {"p": one, "q": one}, items)
    that = _answered(tmp_path / "that", {"p": other, "q": [2, *other[1:]]}, items)
    found = {row["persona"]: row for row in moved(this, that).filter(adapter="a-s42").rows(named=True)}
    row = found["p"]
    assert row["paired"] and row["questions"] == 6
    assert row["standard_errors"] == pytest.approx(scipy.stats.ttest_rel(one, other).statistic)
    assert not found["q"]["paired"], "not counted alike"
    # of a run that was asked further items a number means another item
    (tmp_path / "more").mkdir()
    more = _answered(tmp_path / "more" / "run", {"p": other, "q": other}, items, items_sha256="b")
    assert not moved(this, more)["paired"].any()
