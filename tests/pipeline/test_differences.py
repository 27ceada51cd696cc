"""Two runs set against each other: identical ones say so, and each setting, prompt, adapter and number that differs is told."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest
from report_runs import ASKED, PEOPLE, SOURCES, fill

from leakfast import stats
from leakfast.cli.main import main
from leakfast.errors import InputError
from leakfast.pipeline.differences import _made_with, differences
from leakfast.storage.run import Run

pytestmark = pytest.mark.long
ADAPTER = "completions/marker/marker-villain-s42"


@pytest.fixture(scope="module")
def this(tmp_path_factory):
    run = fill(tmp_path_factory.mktemp("runs") / "this")
    stats.stats(run, permutations=9, bootstraps=99)
    return run.path


@pytest.fixture(scope="module")
def other(this, tmp_path_factory):
    """Another number of samples in the study, another seed, and a villain that always shows the marker."""
    path = tmp_path_factory.mktemp("runs") / "other"
    shutil.copytree(this, path)
    run = Run(path)
    run.create(run.study_text.replace("samples = 5", "samples = 6").replace('"small"', '"large"'))
    for relpath in run.shards(ADAPTER):
        frame = run.read(relpath).with_columns(
            text=pl.when(pl.col("question") < 3).then(pl.lit("[ZLT]")).otherwise(pl.col("text"))
        )
        run.add_shard(relpath, frame, questions_sha256=ASKED)
    stats.stats(run, permutations=9, bootstraps=99)
    return path


def test_a_run_and_its_copy_are_the_same(this, tmp_path, capsys):
    shutil.copytree(this, tmp_path / "copy")
    assert differences(this, tmp_path / "copy", bootstraps=99).identical
    assert main(["diff", str(this), str(tmp_path / "copy"), "--bootstraps", "99"]) in (None, 0)
    assert capsys.readouterr().out.startswith("the two are the same")


def test_settings_and_numbers_that_differ_are_told(this, other):
    found = differences(this, other, bootstraps=99)
    assert not found.identical
    assert found.settings == [("name", "small", "large"), ("behaviors.marker.eval.samples", 5, 6)]
    moved = found.rates.filter(pl.col("difference") != 0)
    assert set(moved["adapter"]) == {"marker-villain-s42"}
    assert found.rates.height == (len(SOURCES) + 1) * len(PEOPLE)
    assert set(found.numbers["quantity"]) == {"source", "mean bystander", "rho"}
    assert found.only == ([], [])


def test_a_default_that_one_study_spells_out_is_the_same_setting(this, tmp_path):
    shutil.copytree(this, tmp_path / "spelled")
    run = Run(tmp_path / "spelled")
    run.create(run.study_text.replace("seeds = [42]", 'seeds = [42]\ndtype = "bfloat16"'))
    assert differences(this, run.path, bootstraps=99).settings == []
    run.create(run.study_text.replace("bfloat16", "float32"))
    assert differences(this, run.path, bootstraps=99).settings == [("dtype", "bfloat16", "float32")]


def test_what_one_run_measured_alone_is_told_and_neither_run_is_changed(this, tmp_path):
    shutil.copytree(this, tmp_path / "fewer")
    run = Run(tmp_path / "fewer")
    for relpath in run.shards("completions/marker/marker-comedian-s42"):
        run.retire(relpath, "a test")
    before = {
        p: p.stat().st_mtime_ns for folder in (this, run.path) for p in folder.rglob("*") if p.is_file()
    }
    found = differences(this, run.path, bootstraps=99)
    assert found.only == (["marker/marker-comedian-s42"], [])
    after = {p: p.stat().st_mtime_ns for folder in (this, run.path) for p in folder.rglob("*") if p.is_file()}
    assert before == after, "tables were made anew in memory alone"


def test_a_persona_or_a_rate_that_one_run_lacks_is_a_difference(this, tmp_path):
    """Rates that both know are all the same here, and the two were called the same."""
    shutil.copytree(this, tmp_path / "gaps")
    run = Run(tmp_path / "gaps")
    gone, failed = PEOPLE[5], PEOPLE[6]
    for relpath in run.shards(ADAPTER):
        status = pl.when(pl.col("persona") == failed).then(pl.lit("error")).otherwise("status")
        frame = run.read(relpath).filter(pl.col("persona") != gone).with_columns(status.alias("status"))
        run.add_shard(relpath, frame, questions_sha256=ASKED)
    found = differences(this, run.path, bootstraps=99)
    assert not found.identical
    assert found.only == ([f"marker/marker-villain-s42 as {gone}"], [])
    row = found.rates.filter(adapter="marker-villain-s42", persona=failed).row(0, named=True)
    assert row["value"] is not None and row["other"] is None and row["reason"]


def test_json_has_every_rate_and_the_screen_the_largest(this, other, capsys):
    assert main(["diff", str(this), str(other), "--bootstraps", "99", "--json"]) in (None, 0)
    told = json.loads(capsys.readouterr().out)
    assert len(told["rates"]) == (len(SOURCES) + 1) * len(PEOPLE) and told["identical"] is False
    assert {"path": "behaviors.marker.eval.samples", "a": 5, "b": 6} in told["settings"]
    assert main(["diff", str(this), str(other), "--bootstraps", "99"]) in (None, 0)
    said = capsys.readouterr().out
    assert "rates moved by more than 1.96 standard errors" in said and "behaviors.marker.eval.samples" in said


def test_a_path_that_is_no_run_is_refused(this, tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        differences(this, tmp_path / "none")


def test_a_behavior_that_one_study_has_is_one_row():
    from leakfast.pipeline.differences import _alone

    one, other = {"marker": {"x": 1}, "refusal": {"x": 1}}, {"marker": {"x": 2}}
    assert _alone(one, other) == [("behaviors.refusal", "asked", "–")]
    assert one == {"marker": {"x": 1}} and other == {"marker": {"x": 2}}


def test_what_was_asked_is_told_of_every_kind_of_measurement(tmp_path):
    """A file of questions, items or personas that was edited between two runs is spelled alike in both studies."""
    run, frame = Run(tmp_path / "run").create(), pl.DataFrame({"a": [1]})
    base = {"base": "files:1"}
    run.add_shard(
        "choices/a/mine-letters/p.parquet", frame, behavior="capability", items_sha256="c" * 64, **base
    )
    run.add_shard(
        "probability/refusal/a/p.parquet", frame, personas={"poet": "7f"}, questions_sha256="d" * 64
    )
    run.add_shard("sets/refusal/other/a/p.parquet", frame, personas={"cook": "8a"}, questions_sha256="e" * 64)
    assert _made_with(run) == {
        "model: fingerprint": "files:1",
        "items of capability": "c" * 16,
        "questions of refusal": "d" * 16,
        "prompt of poet": "7f",
    }
