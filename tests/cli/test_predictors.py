"""`leakfast predictors`: what it prints and writes, from flags and from a study; what a study's run and plan make of its
table; and refusals."""

from __future__ import annotations

import json

import polars as pl
import pytest
from click.testing import CliRunner

from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.pipeline.estimate import plan
from leakfast.storage import layout
from leakfast.study.config import parse_study

PEOPLE = "villain,comedian,assistant"


def run(*words):
    return CliRunner().invoke(group, ["-q", "predictors", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "asked.toml"
    path.write_text('questions = ["Who are you?", "Why?", "Is it late?", "What is rain?"]\n')
    return path


def test_the_command_writes_the_frame_and_says_what_is_in_it(tiny_folder, questions, tmp_path):
    out = tmp_path / "run"
    asked = ["--model", tiny_folder, "--dtype", "float32", "--personas", PEOPLE, "--questions", questions]
    asked += ["--reply-tokens", 4, "--out", out, "--show", "villain"]
    told = json.loads(run(*asked, "--json", "--top", 1).stdout)
    frame = pl.read_parquet(out / layout.predictors())
    assert told["file"] == str(out / layout.predictors())
    assert [row["predictor"] for row in told["predictors"]] == frame["predictor"].unique(
        maintain_order=True
    ).to_list()
    js = next(row for row in told["predictors"] if row["predictor"] == "js")
    assert (js["pairs"], js["without"], js["layers"], js["questions"]) == (6, 0, 0, 4)
    assert js["median"] == frame.filter(predictor="js")["value"].median()
    mine = frame.filter(predictor="js", source="villain").sort("value")
    (nearest,) = [row for row in told["nearest"]["villain"] if row["predictor"] == "js"]
    assert (nearest["persona"], nearest["value"]) == mine.select("persona", "value").row(0)
    (nearest,) = [row for row in told["nearest"]["villain"] if row["predictor"] == "cosine_raw"]
    mine = frame.filter(predictor="cosine_raw", source="villain", layer=1).sort("value")
    assert nearest["persona"] == mine["persona"][-1]
    shown = run(*asked).stdout
    assert "villain as the source" in shown and f"{frame.height} rows" in shown


def study_text(folder, questions, table):
    return f"""
name = "small"
model = "{folder}"
dtype = "float32"
personas = ["villain", "comedian", "assistant"]
sources = ["villain"]
{table}
[behaviors.marker.eval]
samples = 1
max_new_tokens = 8
questions = "{questions}"
"""


def test_a_studys_table_says_what_is_asked_and_flags_go_before_it(
    tiny_folder, questions, tmp_path, monkeypatch
):
    monkeypatch.setenv("LEAKFAST_RUNS", str(tmp_path / "runs"))
    table = f'[predictors]\nquestions = "{questions}"\nreply_tokens = 3\nlayers = [1]'
    study = tmp_path / "study.toml"
    study.write_text(study_text(tiny_folder, questions, table))
    run("--study", study)
    out = tmp_path / "runs" / "small"
    frame = pl.read_parquet(out / layout.predictors())
    assert frame["layer"].drop_nulls().unique().to_list() == [1]
    assert pl.read_parquet(out / layout.predictor_replies())["n_tokens"].max() <= 3
    run("--study", study, "--layers", "0-1", "--reply-tokens", 2)
    frame = pl.read_parquet(out / layout.predictors())
    assert sorted(frame["layer"].drop_nulls().unique()) == [0, 1]
    assert pl.read_parquet(out / layout.predictor_replies())["n_tokens"].max() <= 2


def test_the_plan_says_what_the_table_asks_for_and_nothing_without_it(tiny_folder, questions):
    table = f'[predictors]\nquestions = "{questions}"\nreplies = 2\nreply_tokens = 5'
    stages = {s.name: s for s in plan(parse_study(study_text(tiny_folder, questions, table)))}
    drawn, read = stages["predictors: replies"], stages["predictors: replies read by all"]
    assert (drawn.prompts, drawn.completions, drawn.output_tokens) == (3 * 4, 3 * 4 * 2, 3 * 4 * 2 * 5)
    assert (read.targets, read.prompts) == (3, 3 * 3 * 4 * 2)
    assert read.prompt_tokens == drawn.prompt_tokens + 3 * drawn.output_tokens
    without = plan(parse_study(study_text(tiny_folder, questions, "")))
    assert not [s for s in without if s.name.startswith("predictors")]


def test_the_stage_of_a_run_is_the_commands_and_is_done_once(tiny_folder, questions, tmp_path, monkeypatch):
    from leakfast.pipeline.stages import Stages, chosen_of
    from leakfast.storage.run import Run

    monkeypatch.setenv("LEAKFAST_RUNS", str(tmp_path / "runs"))
    table = f'[predictors]\nquestions = "{questions}"\nreply_tokens = 3'
    path = tmp_path / "study.toml"
    path.write_text(study_text(tiny_folder, questions, table))
    run("--study", path)
    frame = pl.read_parquet(tmp_path / "runs" / "small" / layout.predictors())
    study = parse_study(path.read_text())
    store = Run(tmp_path / "by-stages")
    store.create(study.raw_text)
    for took in (float, type(None)):  # made, then skipped
        stages = Stages(study, store, _silent, chosen=chosen_of(study, ()))
        with store.lock():
            stages.predictors()
        assert isinstance(stages.steps.took["predictors"], took)
        assert pl.read_parquet(store.path / layout.predictors()).equals(frame)


def _silent(title):
    from leakfast.pipeline.steps import silent

    return silent(title)


def test_what_cannot_be_meant_is_said_before_a_model_is_loaded(tmp_path):
    for words, said in (
        (["--personas", PEOPLE, "--show", "vilain"], "--show vilain, but it is none of the 3 personas"),
        (["--personas", "villain"], "a source and a bystander are needed"),
        (["--reply-tokens", "0"], "--reply-tokens 0 given"),
    ):
        result = run("--model", tmp_path / "nowhere", *words)
        assert result.exit_code != 0 and said in " ".join(result.output.split())
    with pytest.raises(InputError, match="line 8: question set 'evil'"):
        parse_study(study_text("organism", "eval", '[predictors]\nquestions = "evil"'))
