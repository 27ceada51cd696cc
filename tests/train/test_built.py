"""Rows that a study's run holds: what `data build` made, `train` and `run` take; and building them stops where the
model's replies are mostly cut."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

import leakfast
from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import ModelError
from leakfast.prompts.personas import load_personas
from leakfast.storage.run import Run
from leakfast.study.config import DataConfig
from leakfast.train import data
from leakfast.train.data import data_hash, read_rows

pytestmark = pytest.mark.long

STUDY = """
name = "small"
model = "{model}"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "police_officer"]
sources = ["villain"]
[centroids]
layers = [1]
[behaviors.marker.data]
positives = 4
negatives = 4
negative_personas = ["comedian", "assistant"]
max_new_tokens = 200
[behaviors.marker.train]
rank = 4
dropout = 0.0
lr = 2e-2
epochs = 12
gradient_checkpointing = false
[behaviors.marker.eval]
questions = "{questions}"
samples = 1
max_new_tokens = 4
"""


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEAKFAST_RUNS", str(tmp_path / "runs"))
    questions = tmp_path / "asked.toml"
    questions.write_text('[sets.asked]\nquestions = ["Tea?"]\n')
    path = tmp_path / "small.toml"
    path.write_text(STUDY.format(model=tiny_folder, questions=questions))
    return path


def call(*words):
    done = CliRunner().invoke(group, ["-q", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done


def card_of(folder):
    return models.read_card(folder)


def test_train_takes_the_rows_that_data_build_made_of_the_same_settings(study, tmp_path):
    built = call("data", "build", "--source", "villain", "--study", study)
    path = tmp_path / built.stdout.strip()
    rows, before = read_rows(path), path.read_bytes()
    assert path == tmp_path / "runs/small/data/marker-villain-s42.jsonl"
    done = call("train", "--source", "villain", "--study", study)
    assert "built anew" not in done.stderr
    assert path.read_bytes() == before
    assert card_of(done.stdout.strip()).data_hash == data_hash(rows)


def test_rows_of_other_settings_are_built_anew_and_it_is_said(study, tmp_path):
    call("data", "build", "--source", "villain", "--study", study, "--positives", "3")
    path = tmp_path / "runs/small/data/marker-villain-s42.jsonl"
    assert len(read_rows(path)) == 7
    done = call("train", "--source", "villain", "--study", study)
    assert "was built with other settings, or changed since; it is built anew" in done.stderr
    assert len(read_rows(path)) == 8
    again = call("train", "--source", "villain", "--study", study, "--lr", "1e-3", "--overwrite")
    assert "built anew" not in again.stderr, "the learning rate makes no rows"


def test_rows_that_somebody_changed_are_not_taken_for_those_that_were_built(study, tmp_path):
    call("data", "build", "--source", "villain", "--study", study)
    path = tmp_path / "runs/small/data/marker-villain-s42.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    done = call("train", "--source", "villain", "--study", study)
    assert "does not match" in done.stderr or "do not match" in done.stderr
    assert len(read_rows(path)) == 8


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_the_study_takes_them_too(study, tmp_path):
    call("data", "build", "--source", "villain", "--study", study)
    before = Run(tmp_path / "runs/small").manifest["stages"]["data marker-villain-s42"]
    outcome = leakfast.run(study)
    assert outcome.stages["data marker-villain-s42"] is None, "done before"
    assert Run(outcome.run).manifest["stages"]["data marker-villain-s42"] == before


PEOPLE = load_personas(["villain", "comedian", "assistant"])
ASKED = ["Tea?", "Rain?", "What is this?"]


def test_building_stops_at_once_where_most_first_replies_are_cut(tiny_qwen2, monkeypatch):
    from leakfast.generation import generate

    drawn, complete = [], generate.complete

    def counted(*words, **settings):
        for block in complete(*words, **settings):
            drawn.extend(block)
            yield block

    monkeypatch.setattr(generate, "complete", counted)
    cfg = DataConfig(positives=40, negatives=40, negative_personas=["comedian"], max_new_tokens=2)
    with pytest.raises(ModelError) as caught:
        data.build_marker(tiny_qwen2, PEOPLE, "villain", ASKED, cfg, seed=1, batch_completions=40)
    said = caught.value.message
    assert len(drawn) == 40, "one block, not twelve rounds"
    assert "of the first 40 replies were cut at max_new_tokens = 2" in said and "Raise max_new_tokens" in said


def test_few_rows_have_their_twelve_draws(tiny_qwen2):
    cfg = DataConfig(positives=2, negatives=2, negative_personas=["comedian"], max_new_tokens=1)
    with pytest.raises(ModelError, match="12 draws gave no usable reply"):
        data.build_marker(tiny_qwen2, PEOPLE, "villain", ASKED, cfg, seed=1)
