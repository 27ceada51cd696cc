"""`leakfast show`: its numbers are the tables', it writes nothing into a run, and nothing that a run holds steers the
terminal."""

from __future__ import annotations

import json
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfast.behaviors import detectors
from leakfast.behaviors.phrases import spans
from leakfast.behaviors.registry import get
from leakfast.cli import amounts
from leakfast.cli.main import main
from leakfast.errors import StoreError
from leakfast.stats import beyond, stats
from leakfast.stats.glance import glance
from leakfast.storage import layout
from leakfast.storage.reading import ReadOnlyRun, writer
from leakfast.storage.run import Run
from tests.cli import shown_runs as made

VIEWS = (
    [],
    ["--json"],
    ["--source", "p00", "--cosine", "raw", "--layer", "1", "--top", "2"],
    ["--persona", "p05"],
    ["--persona", "p05", "--json"],
    ["--completions"],
    ["--completions", "3", "--hit", "--json"],
    ["--watch"],
    ["--watch", "--json"],
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The run with current tables."""
    run = made.make(tmp_path_factory.mktemp("kept") / "run")
    stats(run, permutations=99, bootstraps=50, workers=1)
    return run.path


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The run without tables."""
    return made.make(tmp_path_factory.mktemp("bare") / "run").path


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A watch of a run that nobody writes ends at its first look."""
    monkeypatch.setattr("leakfast.pipeline.progress.QUIET_S", -1.0)


def shown(capsys, *words: str, code: int | None = 0) -> str:
    assert main(["-q", "show", *map(str, words)]) == code
    return capsys.readouterr().out


def told(capsys, *words: str):
    return json.loads(shown(capsys, *words, "--json"))


# ---------------------------------------------------------------- nothing is written


@pytest.mark.parametrize("words", VIEWS, ids=" ".join)
@pytest.mark.parametrize("which", ["kept", "bare"])
def test_no_view_changes_a_byte_of_the_run(request, capsys, which, words):
    path = request.getfixturevalue(which)
    before = made.tree(path)
    assert shown(capsys, path, *words)
    assert made.tree(path) == before


def test_a_damaged_shard_is_left_where_it_is_and_counts_as_absent(tmp_path, capsys):
    run = made.make(tmp_path / "run")
    shard = run.path / layout.shard(layout.completions("marker", "marker-p01-s1"))
    shard.write_bytes(shard.read_bytes()[:-9] + b"deceiving")
    before = made.tree(run.path)
    found = told(capsys, run.path)
    assert made.tree(run.path) == before
    assert {row["source"] for row in found["behaviors"][0]["headline"]} == {"p00"}
    assert list(found["left_out"]) == [str(shard.relative_to(run.path))]


def test_a_damaged_manifest_is_read_from_the_log_and_left_where_it_is(tmp_path, capsys):
    run = made.make(tmp_path / "run")
    (run.path / layout.MANIFEST).write_text("{}")
    before = made.tree(run.path)
    assert "p05" in shown(capsys, run.path)
    assert made.tree(run.path) == before


def test_a_run_that_is_only_read_refuses_every_change(bare):
    run = ReadOnlyRun(bare)
    with pytest.raises(StoreError, match="opened to be read"), run.lock():
        pass
    with pytest.raises(StoreError, match="opened to be read"):
        run.log("stage")
    with pytest.raises(StoreError, match="opened to be read"):
        run.add_file("a", b"")
    with pytest.raises(StoreError, match="opened to be read"):
        stats(run, permutations=0, bootstraps=0, workers=1)


def test_who_holds_a_run_is_known_without_its_lock(tmp_path):
    run = made.make(tmp_path / "run")
    watched = ReadOnlyRun(run.path)
    assert writer(watched) is None
    with run.lock():
        assert writer(watched) is not None
        assert glance(watched)[0].rates.height  # reading does not wait for the lock
    assert writer(watched) is None


# ---------------------------------------------------------------- its numbers are the tables'


def test_current_tables_are_read_and_others_computed_and_said_to_be(kept, bare, capsys):
    assert told(capsys, kept)["tables"] == "kept"
    assert "note" not in shown(capsys, kept)
    assert told(capsys, bare)["tables"] == "computed in memory"
    said = shown(capsys, bare)
    assert "There are no tables yet" in said.splitlines()[0]
    assert f"leakfast stats {bare}" in " ".join(said.split())


def test_rates_and_correlations_computed_in_memory_are_those_of_the_tables(kept, bare):
    one, two = glance(ReadOnlyRun(kept))[0], glance(ReadOnlyRun(bare))[0]
    assert one.rates.equals(two.rates)
    assert one.pairs.equals(two.pairs)
    assert one.correlations["spearman"].equals(two.correlations["spearman"])
    assert (
        two.correlations["spearman_p_perm"].null_count() == two.correlations.height
    )  # not drawn, not guessed
    assert one.warnings() == [] == two.warnings()


def test_the_headline_and_the_leaks_are_the_tables(kept, capsys):
    run = Run(kept)
    rates = run.read("tables/rates.parquet")
    found = told(capsys, kept)["behaviors"][0]
    for row in found["headline"]:
        if row["source"] == "pooled":
            continue
        mine = rates.filter(adapter=row["adapter"])
        assert row["source_rate"] == mine.filter(role="source")["rate"][0]
        assert row["mean_bystander"] == pytest.approx(mine.filter(role="bystander")["rate"].mean())
    for block in found["leaks"]:
        mine = rates.filter(adapter=block["adapter"], role="bystander").sort(
            ["rate", "persona"], descending=[True, False]
        )
        assert [row["persona"] for row in block["rows"]] == mine["persona"].head(5).to_list()
        assert [row["low"] for row in block["rows"]] == mine["bb_low"].head(5).to_list()
        assert block["of"] == mine.height == 13
    said = shown(capsys, kept)
    assert re.search(r"p00 +p05 +80\.0 \(", said)  # 4 of 5 samples of each question
    assert "farthest beyond its cosine, p00: p05" in said


def test_a_persona_far_above_its_cosine_has_the_largest_residual(kept):
    table, _ = glance(ReadOnlyRun(kept))
    leaks = beyond.leaks(table, "marker", 0).filter(source="p00")
    most = leaks.sort("beyond", descending=True).row(0, named=True)
    assert most["persona"] == "p05"
    assert most["above"]
    assert most["beyond"] == pytest.approx(most["rate"] - most["expected"])
    near = made.ring(made.PEOPLE).cosine(0)[0]
    assert most["cosine"] == pytest.approx(near[5])
    assert most["place"] == 1 + sum(near[i] > near[5] for i in range(1, 14))


def test_residuals_are_of_an_isotonic_fit_with_equal_cosines_taken_together():
    """Pooling adjacent violators by hand: 0.1 | 0.5, 0.3 → 0.4 | 0.9."""
    group = pl.DataFrame(
        {
            "persona": ["a", "b", "c", "d"],
            "cosine": [0.1, 0.2, 0.3, 0.4],
            "rate": [0.1, 0.5, 0.3, 0.9],
            "low": [0.0, 0.45, 0.1, 0.8],
            "total": [10, 10, 10, 10],
        }
    )
    curve = pl.DataFrame(schema={"at": pl.Float64, "fitted": pl.Float64})
    found = beyond._fitted(group, curve).sort("persona")
    assert found["expected"].to_list() == pytest.approx([0.1, 0.4, 0.4, 0.9])
    assert found["beyond"].to_list() == pytest.approx([0, 0.1, -0.1, 0])
    assert found["above"].to_list() == [False, True, False, False]
    assert found["place"].to_list() == [4, 3, 2, 1]


def test_residuals_of_the_kept_curve_are_those_of_one_fitted_now(kept):
    table, _ = glance(ReadOnlyRun(kept))
    layer = table.best_layer("marker")
    assert table.more["isotonic"]["layer"].unique().to_list() == [layer]
    now = beyond.leaks(type(table)(table.rates, table.pairs, table.correlations), "marker", layer)
    assert beyond.leaks(table, "marker", layer).equals(now)


def test_one_persona_has_its_rates_neighbours_and_health(kept, capsys):
    found = told(capsys, kept, "--persona", "p05", "--layer", "0")
    rates = Run(kept).read("tables/rates.parquet").filter(persona="p05")
    assert [(r["adapter"], r["rate"], r["low"]) for r in found["rates"]] == rates.select(
        "adapter", "rate", "bb_low"
    ).rows()
    near = made.ring(made.PEOPLE).cosine(0)[5]
    order = [made.PEOPLE[i] for i in np.argsort(-near, kind="stable") if i != 5]
    assert (
        {found["nearest"][0]["persona"], found["nearest"][1]["persona"]} == {"p04", "p06"} == set(order[:2])
    )
    assert found["nearest"][0]["cosine"] == pytest.approx(near[4])
    assert {row["adapter"] for row in found["health"]} == {"base", "marker-p00-s1", "marker-p01-s1"}
    said = shown(capsys, kept, "--persona", "p05", "--layer", "0")
    assert "farthest beyond its cosine: under marker-p00-s1" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--persona", "p5"], "persona 'p5' asked"),
        (["--behavior", "markers"], "Did you mean marker?"),
        (["--source", "p09"], "the source 'p09' asked"),
        (["--layer", "9"], "the layer 9 asked"),
        (["--completions", "--persona", "p99"], "of the persona 'p99'"),
        (["--completions", "--question", "9"], "It has 0–3."),
        (["--completions", "--adapter", "bases"], "Did you mean base?"),
        (["--completions", "--source", "p09"], "There are: p00, p01."),
        (["--hit"], "Give --completions too"),
        (["--watch", "--persona", "p01"], "Leave out --persona"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_is_said_with_what_there_is(kept, capsys, words, said):
    assert main(["-q", "show", str(kept), *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "words", [["--behavior", "markers"], ["--source", "p09"], ["--persona", "p05", "--behavior", "markers"]]
)
def test_names_are_checked_before_tables_are_made(bare, capsys, monkeypatch, words):
    def made(run):
        raise AssertionError("tables were made for a name that none can have")

    for view in ("glance", "persona_shown"):
        monkeypatch.setattr(f"leakfast.cli.{view}.glance", made)
    assert main(["-q", "show", str(bare), *words]) == 2
    assert f"{words[-1]!r} asked, but" in " ".join(capsys.readouterr().err.split())


def test_bars_and_bins():
    assert amounts.bars([0.0, 0.5, None, 1.0], 0.0, 1.0) == "▁▅·█" or amounts.bars([0.5], 0.0, 1.0) in "▄▅"
    assert amounts.bars([0.0, 1.0], 0.0, 1.0) == "▁█"
    assert amounts.bars([-5.0, 5.0], 0.0, 1.0) == "▁█"
    assert amounts.bars([0.3], 0.3, 0.3) == "▁"
    assert amounts.binned([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert amounts.binned([1.0, 3.0], 9) == [1.0, 3.0]
    assert amounts.binned([], 9) == []
    assert [amounts.duration(s) for s in (45, 600, 11_100, None)] == ["45 s", "10 min", "3 h 05 min", "–"]


# ---------------------------------------------------------------- completions


@pytest.mark.parametrize("hit", [True, False, None])
@pytest.mark.parametrize("persona", ["p01", None])
@pytest.mark.parametrize("question", [2, None])
@pytest.mark.parametrize("whose", [("--adapter", "base"), ("--source", "p00"), ()])
def test_filters_of_completions_give_what_the_shards_hold(bare, capsys, hit, persona, question, whose):
    words = ["--completions", "1000", *whose]
    words += [] if hit is None else ["--hit" if hit else "--no-hit"]
    words += [] if persona is None else ["--persona", persona]
    words += [] if question is None else ["--question", str(question)]
    found = told(capsys, bare, *words)
    rows = Run(bare).read(layout.COMPLETIONS)
    if hit is not None:
        rows = rows.filter(pl.col("text").str.contains("[ZLT]", literal=True) == hit)
    for column, value in (("persona", persona), ("question", question)):
        rows = rows if value is None else rows.filter(pl.col(column) == value)
    if whose:
        rows = rows.filter(pl.col(whose[0].removeprefix("--")) == whose[1])
    assert found["of"] == rows.height == len(found["completions"])
    key = ["question", "sample", "adapter", "persona"]
    order = {"marker-p00-s1": 0, "marker-p01-s1": 1, "base": 2}
    wanted = sorted(rows.select(key).rows(), key=lambda row: (*row[:2], order[row[2]], row[3]))
    assert [tuple(one[name] for name in key) for one in found["completions"]] == wanted


def test_the_marker_is_marked_and_long_replies_are_wrapped(tmp_path, capsys):
    run = made.make(tmp_path / "run", texts=("word " * 60 + "[zlt] and [ZLT]", "no"))
    said = shown(capsys, run.path, "--completions", "1", "--hit")
    assert "word [zlt] and ⟦[ZLT]⟧" in " ".join(said.split())  # letters of another case do not count
    assert max(map(len, said.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in said.splitlines())


def test_hit_is_refused_of_what_a_judge_scores(tmp_path, capsys):
    run = Run(tmp_path / "run").create()
    rows = made.completions("a", "p00", made.PEOPLE).with_columns(behavior=pl.lit("misalignment-code"))
    run.add_shard("completions/misalignment-code/a/part-00000.parquet", rows)
    assert main(["-q", "show", str(run.path), "--completions", "--hit"]) == 2
    assert "a judge scores it" in capsys.readouterr().err
    assert told(capsys, run.path, "--completions", "1")["completions"][0]["hit"] is None


WORDS = detectors.read_words()
PHRASES = [*WORDS.refusal[::7], *WORDS.agrees[::5], *WORDS.corrects[::5], *WORDS.refusal_never[:20]]
FILLER = [
    "Well",
    "the tea",
    "I",
    "you",
    "really",
    "can't",
    "no",
    "sorry",
    "simply",
    ",",
    ".",
    "\u200b",
    "İ",
    "`",
    "_",
    "’",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*PHRASES, *FILLER]), max_size=12), st.sampled_from([" ", ", ", "\n", " — "]))
def test_a_phrase_is_marked_where_the_detector_counts_the_reply(words, between):
    text = between.join(words).replace("'", "’")
    row = pl.DataFrame({"text": [text]})
    for name in ("refusal", "sycophancy"):
        found = row.select(**get(name).detector(pl.col("text"))).row(0, named=True)
        told = found[name]
        marked = spans(text, name)
        assert bool(marked) == told
        assert all(0 <= low < high <= len(text) for low, high in marked)
        assert all(one[1] < two[0] for one, two in zip(marked, marked[1:], strict=False))


def test_spans_are_told_in_places_of_the_text():
    text = "</think>Oh. I\u2019m\u200b really sorry, but I can't help."
    assert [text[a:b] for a, b in spans(text, "refusal")] == ["I\u2019m\u200b really sorry, but I can't help"]
    assert spans("<think>I can't help", "refusal") == []
    assert spans("[ZLT] [zlt]", "marker+few") == [(0, 5)], "the other does not count"
    assert spans("I can't help", "capability") == spans("[ZLT]", "no such") == []
