"""Two runs set against each other: what is paired, and that the differences are those of numpy and scipy."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pytest
import scipy.stats
from report_runs import ASKED, PEOPLE, QUESTIONS, SOURCES, fill

from leakfast import stats
from leakfast.cli.main import main
from leakfast.stats import against, two_way
from leakfast.stats.against import Side, compare
from leakfast.stats.tables import Stats
from leakfast.storage.run import Run
from tests.rates_made import made_rates

pytestmark = pytest.mark.long
ADAPTER = "completions/marker/marker-villain-s42"


def _side(run: Run) -> Side:
    return Side(run, stats.stats(run, permutations=9, bootstraps=99))


@pytest.fixture(scope="module")
def this(tmp_path_factory):
    return _side(fill(tmp_path_factory.mktemp("runs") / "this"))


@pytest.fixture(scope="module")
def other(this, tmp_path_factory):
    """The same run, in which the villain's adapter showed the marker in every second of its samples too."""
    path = tmp_path_factory.mktemp("runs") / "other"
    shutil.copytree(this.run.path, path)
    run = Run(path).open()
    for relpath in run.shards(ADAPTER):
        frame = run.read(relpath)
        more = (
            pl.when((pl.col("sample") + pl.col("question")) % 2 == 0)
            .then(pl.lit(" [ZLT]"))
            .otherwise(pl.lit(""))
        )
        run.add_shard(relpath, frame.with_columns(text=pl.col("text") + more), questions_sha256=ASKED)
    return _side(run)


def _shares(side: Side, people: list[str]) -> np.ndarray:
    drawn = side.run.read(ADAPTER).with_columns(hit=pl.col("text").str.contains("[ZLT]", literal=True))
    table = drawn.group_by("persona", "question").agg(pl.col("hit").mean())
    told = {(p, q): hit for p, q, hit in table.rows()}
    return np.array([[told[p, q] for q in range(QUESTIONS)] for p in people])


def test_a_run_against_itself_differs_by_nothing(this):
    table = compare(this, this, bootstraps=99)
    assert table.height == 3 * len(SOURCES) and table["paired"].all()
    assert (table.select("difference", "difference_low", "difference_high").to_numpy() == 0).all()


def test_of_several_adapters_of_one_source_and_seed_those_of_one_name_are_met():
    def side(*names):
        rates = made_rates(sources=("s",)).with_columns(seed=pl.lit(None, pl.Int64))
        return Stats(pl.concat([rates.with_columns(adapter=pl.lit(n)) for n in names]), rates, rates)

    key = ("capability", "s", None)
    assert against._both(side("a"), side("b")) == [(key, "a", "b")]
    assert against._both(side("a", "b"), side("c", "b")) == [(key, "b", "b")]
    assert against._both(side("a", "b"), side("c")) == []


def test_differences_are_paired_by_question_and_persona(this, other):
    table = compare(this, other, bootstraps=999).filter(source="villain")
    rows = {row["quantity"]: row for row in table.rows(named=True)}
    people = [name for name in PEOPLE if name != "villain"]
    apart = _shares(this, people) - _shares(other, people)
    mean, low, high = two_way.of_mean(apart)
    found = rows["mean bystander"]
    assert (found["difference"], found["difference_low"], found["difference_high"]) == pytest.approx(
        (mean, low, high)
    )
    assert found["personas"] == len(people) and found["questions"] == QUESTIONS
    own = (_shares(this, ["villain"]) - _shares(other, ["villain"]))[0]
    ends = scipy.stats.ttest_1samp(own, 0).confidence_interval()
    assert (rows["source"]["difference_low"], rows["source"]["difference_high"]) == pytest.approx(tuple(ends))
    layer = this.stats.best_layer("marker")
    for side, name in ((this, "value"), (other, "other")):
        pairs = side.stats.pairs.filter(source="villain", layer=layer)
        rho = scipy.stats.spearmanr(pairs["cosine_centered"], pairs["rate"]).statistic
        assert rows["rho"][name] == pytest.approx(rho)
    assert rows["rho"]["difference_low"] < rows["rho"]["difference"] < rows["rho"]["difference_high"]


def test_other_questions_are_not_paired(this, other):
    path = other.run.path.parent / "elsewhere"
    shutil.copytree(other.run.path, path)
    run = Run(path).open()
    for relpath in run.shards(ADAPTER):
        run.add_shard(relpath, run.read(relpath), questions_sha256="b")
    table = compare(this, Side(run, other.stats), bootstraps=99)
    told = dict(table.filter(source="villain").select("quantity", "paired").rows())
    assert told == {"source": False, "mean bystander": False, "rho": True}
    assert table.filter(source="comedian")["paired"].all()
    found = table.filter(source="villain", quantity="mean bystander").row(0, named=True)
    one, two = (
        s.stats.rates.filter(source="villain", role="bystander").sort("persona")["rate"]
        for s in (this, other)
    )
    ends = scipy.stats.ttest_rel(one, two).confidence_interval()
    assert (found["difference_low"], found["difference_high"]) == pytest.approx(tuple(ends))


def test_the_page_opens_with_it(this, other, capsys):
    assert main(["--quiet", "report", str(this.run.path), "--against", str(other.run.path)]) == 0
    path = this.run.path / "report-against.html"
    assert capsys.readouterr().out.strip() == str(path)
    html = path.read_text(encoding="utf-8")
    assert html.index('id="against"') < html.index('id="explore"')
    row = compare(this, other).filter(source="villain", quantity="mean bystander").row(0, named=True)
    shown = f"{100 * row['difference']:.1f}".replace("-", "−")
    assert shown in html.replace("-", "−")
