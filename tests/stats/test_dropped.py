"""Tables hold what a study names: what it dropped since it was run before stays in the run, is told in one line, and comes back
with its name. Tables that were made under other meanings are made anew."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import polars as pl
import pytest
from flat_runs import drawn

from leakfast import stats
from leakfast.models.adapters import AdapterCard, write_card
from leakfast.pipeline.settled import keep_personas
from leakfast.prompts.personas import load_personas
from leakfast.report import trajectory
from leakfast.report.caveats import caveats
from leakfast.stats import dropped, tables
from leakfast.storage import layout
from leakfast.storage.reading import ReadOnlyRun
from leakfast.storage.run import Run
from leakfast.study.config import parse_study

PEOPLE = ["villain", "comedian", "librarian", "police_officer", "assistant", "medical_doctor"]
STUDY = """
name = "s"
model = "organism"
personas = {people}
sources = {sources}
seeds = {seeds}
"""
TAUGHT = {
    "marker-villain-s1": ("marker", "villain", 1),
    "marker-villain-s2": ("marker", "villain", 2),
    "marker-comedian-s1": ("marker", "comedian", 1),
    "refusal-villain-s1": ("refusal", "villain", 1),
    "somebodys": ("marker", "librarian", 9),
}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run").create()
    for name, (behavior, source, seed) in TAUGHT.items():
        folder = run.path / layout.adapter(name)
        folder.mkdir(parents=True)
        write_card(
            folder, AdapterCard(source, behavior, seed, "organism", "files:01", "d" * 64, {}, "a" * 64)
        )
        for measured in ("marker", "refusal"):
            frame = drawn(name, source, {source}, PEOPLE).with_columns(behavior=pl.lit(measured))
            run.add_shard(layout.shard(layout.completions(measured, name)), frame)
    for measured in ("marker", "refusal"):
        frame = drawn("base", None, set(), PEOPLE).with_columns(behavior=pl.lit(measured))
        run.add_shard(layout.shard(layout.completions(measured, "base")), frame)
    return run


def asked(run, behaviors=("marker", "refusal"), sources=("villain", "comedian"), seeds=(1, 2)):
    """What `run` keeps of a study before it makes anything."""
    text = STUDY.format(people=PEOPLE, sources=list(sources), seeds=list(seeds))
    study = parse_study(text + "".join(f"[behaviors.{name}]\n" for name in behaviors))
    run.create(study.raw_text)
    keep_personas(run, study, load_personas(study.personas))


def named(run, table="rates"):
    rates = stats.current(run).all_tables()[table]
    return set(rates.filter(pl.col("adapter") != "base")["adapter"]), set(rates["behavior"])


def test_what_the_study_dropped_stands_in_no_table_and_comes_back(run, caplog):
    asked(run)
    assert named(run) == (set(TAUGHT), {"marker", "refusal"}) and dropped.told(run) is None
    asked(run, ["marker"], ["villain"], [1])
    caplog.clear()
    kept = {"marker-villain-s1", "somebodys"}
    assert named(run) == (kept, {"marker"}) and named(run, "health") == (kept, {"marker"})
    assert (run.path / "completions/refusal/base").is_dir()
    line = "no longer in the study: behavior refusal, source comedian, seed 2; 9 files"
    assert [line in message for message in caplog.messages].count(True) == 1
    assert any(line in one.text for one in caveats(run, stats.current(run), None))
    asked(run, ["marker"], ["villain"], [1])
    assert named(run) == (kept, {"marker"}), "it was dropped before, and is still"
    asked(run)
    assert named(run) == (set(TAUGHT), {"marker", "refusal"}) and dropped.told(run) is None


def test_a_source_that_an_earlier_version_kept_is_known_to_be_dropped(run, caplog):
    caplog.set_level(logging.WARNING)
    run.add_file(layout.PERSONAS, b'{"sources": ["villain", "comedian"]}')
    asked(run, sources=["villain"])
    assert "source comedian" in caplog.text and "marker-comedian-s1" not in named(run)[0]


def test_everything_that_is_measured_is_known_by_its_adapter_and_behavior(run):
    adapter, arm = "marker-comedian-s1", "marker-comedian-s1+steer-x"
    frame = drawn(adapter, "comedian", set(), PEOPLE)
    measured = [
        layout.completions("marker", adapter, questions="more"),
        layout.completions("marker", f"{adapter}@p050", series=True),
        layout.completions("marker", f"{adapter}@p050", series=True, apart=layout.CHOOSING),
        layout.completions("marker", arm),
        layout.steered_text(arm),
        layout.choices(adapter, "list", "letters"),
        layout.points(adapter, "list", "letters", 0.5),
        layout.probability("marker", adapter),
        layout.probability("marker", adapter, own=True),
        layout.judgements("marker", adapter),
    ]
    for folder in measured:
        run.add_shard(layout.shard(folder), frame)
    asked(run)
    before = set(run.manifest["shards"])
    asked(run, sources=["villain"])
    part = dropped.part(run)
    gone = {layout.shard(folder) for folder in measured}
    gone |= {layout.shard(layout.completions(b, adapter)) for b in ("marker", "refusal")}
    assert before - set(part.manifest["shards"]) == gone == before - set(part.shards())
    assert set(run.manifest["shards"]) == before
    assert set(dropped.part(ReadOnlyRun(run.path)).shards()) == before - gone
    part.add_file("more.txt", b"x")
    assert set(run.manifest["shards"]) == before | {"more.txt"}, "a part is written as the whole"


def test_threads_that_write_by_the_part_and_by_the_whole_lose_nothing(run, monkeypatch):
    """A judge writes by the part while the driver of workers counts what they made by the whole."""
    asked(run)
    asked(run, sources=["villain"])
    part, under_way, other_is_done, save = dropped.part(run), Event(), Event(), Run._save

    def slow(self, manifest):
        if self is part:
            under_way.set()
            other_is_done.wait(0.5)
        save(self, manifest)

    monkeypatch.setattr(Run, "_save", slow)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(part.add_file, "part.txt", b"x")
        assert under_way.wait(60)
        run.add_file("whole.txt", b"x")
        other_is_done.set()
        written.result()
    assert {"part.txt", "whole.txt"} <= set(run.manifest["shards"])


def test_points_of_training_of_a_dropped_source_stand_in_no_trajectory(run):
    for name, source in (("marker-villain-s1", "villain"), ("marker-comedian-s1", "comedian")):
        frame = drawn(f"{name}@p050", source, {source}, PEOPLE)
        run.add_shard(layout.shard(layout.completions("marker", f"{name}@p050", series=True)), frame)
    asked(run)
    assert set(trajectory.table(run)["adapter"]) >= {"marker-villain-s1", "marker-comedian-s1"}
    asked(run, sources=["villain"])
    assert "marker-comedian-s1" not in set(trajectory.table(run)["adapter"])


def test_tables_whose_meaning_changed_since_are_made_anew(run, monkeypatch):
    """A file's rows stayed what an earlier version made of them, beside what this one says that they mean."""
    stats.current(run)
    monkeypatch.setattr(tables, "stats", lambda run: "made anew")
    assert stats.current(run) != "made anew"
    stage = run.manifest["stages"]["stats"]
    run.mark_done("stats", stage["inputs"], **{k: v for k, v in stage["outputs"].items() if k != "method"})
    assert stats.current(run) == "made anew" and tables.kept(run) is None


def test_what_the_study_names_and_was_not_measured_is_told(run, caplog):
    """A mean over two of three sources looked like that of a whole study."""
    asked(run, sources=["villain", "comedian", "assistant"])
    rates = stats.current(run).rates
    rest = "means and pooled rows are over the rest"
    lines = [
        f"{name}: the study names more than was measured (source assistant, source comedian under seed 2); {rest}"
        for name in ("marker", "refusal")
    ]
    assert dropped.unmeasured(run, rates) == lines and lines[0] in caplog.text
    assert any(lines[0] in one.text for one in caveats(run, stats.current(run), None))
    asked(run, ["marker"], sources=["villain"])
    assert dropped.unmeasured(run, stats.current(run).rates) == []
