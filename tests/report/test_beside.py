"""What stands beside a completion is of that very completion: its question's text, a judge's score, what was cut of it."""

from __future__ import annotations

import polars as pl
import pytest
from report_runs import ASKED, PEOPLE, fill, fill_judged

from leakfast.report import sample as samples
from leakfast.report.reading import Chosen, completions, questions
from leakfast.stats.collect import completion_folders
from leakfast.storage import layout

pytestmark = pytest.mark.long


def test_questions_are_told_only_where_they_are_those_that_were_asked(tmp_path):
    fresh = fill(tmp_path / "run")
    assert questions(fresh, "marker")
    relpath = fresh.shards("completions/marker/base")[0]
    fresh.add_shard(relpath, fresh.read(relpath), questions_sha256="of other texts")
    assert questions(fresh, "marker") == ()


def test_a_judges_score_stands_beside_the_text_it_was_made_of(tmp_path):
    run = fill_judged(tmp_path / "run")
    behavior, adapter = next(folder for folder in completion_folders(run) if folder[1] != "base")
    folder = layout.completions(behavior, adapter)
    frame = run.read(folder)
    before = samples.scores(run, behavior, adapter, frame, None)
    assert before.null_count() < frame.height
    relpath = run.shards(folder)[0]
    part = run.read(relpath)
    run.add_shard(relpath, part.with_columns(text=pl.col("text") + " and more"))
    after = samples.scores(run, behavior, adapter, run.read(folder), None)
    assert after.head(part.height).null_count() == part.height and after[part.height :].equals(
        before[part.height :]
    )
    row = {**part.row(0, named=True), "text": part["text"][0] + " and more"}
    assert not completions(
        run, Chosen(behavior, adapter, persona=row["persona"], question=row["question"]), 1
    )[0][0].judged


def test_what_is_cut_of_a_long_completion_is_counted(tmp_path):
    fresh = fill(tmp_path / "run")
    relpath = fresh.shards("completions/marker/base")[0]
    frame = fresh.read(relpath)
    fresh.add_shard(relpath, frame.with_columns(text=pl.lit("long " * 1_000)), questions_sha256=ASKED)
    place = {name: at for at, name in enumerate(PEOPLE)}
    drawn = samples.sample(fresh, [{"behavior": "marker", "adapter": "base"}], place)
    assert {len(text) for text in drawn["text"]} == {samples.CUT} and set(drawn["left_out"]) == {1_000}
