"""`leakfast train` of several adapters: those of a command each, kept where they are there, in company where it is asked."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import leakfast
from leakfast import models
from leakfast.cli.main import group
from leakfast.storage.run import Run

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("undrawn")]

STUDY = """
name = "small"
model = "{model}"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "police_officer"]
sources = ["villain", "comedian"]
seeds = [1, 2]
[centroids]
layers = [1]
[behaviors.marker.data]
positives = 4
negatives = 4
negative_personas = ["librarian", "assistant"]
max_new_tokens = 200
[behaviors.marker.train]
rank = 4
dropout = 0.1
lr = 2e-2
epochs = 6
batch_size = 4
accumulation = 1
sample = 0
{more}
[behaviors.marker.eval]
questions = "{questions}"
samples = 1
max_new_tokens = 4
"""
NAMES = [f"marker-{source}-s{seed}" for seed in (1, 2) for source in ("villain", "comedian")]


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEAKFAST_RUNS", str(tmp_path / "runs"))
    (tmp_path / "asked.toml").write_text('[sets.asked]\nquestions = ["Tea?"]\n')

    def write(more=""):
        path = tmp_path / "small.toml"
        path.write_text(STUDY.format(model=tiny_folder, questions=tmp_path / "asked.toml", more=more))
        return path

    return write


def call(*words, code=0):
    done = CliRunner().invoke(group, [*map(str, words)])
    assert done.exit_code == code, done.output
    return done


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("inside", [True, False])
def test_several_are_to_the_byte_those_of_a_command_each(study, tmp_path, monkeypatch, inside):
    """In the run, and in a folder that is given."""
    words = ("train", "--study", study())
    out = tmp_path / ("runs/small/adapters" if inside else "mine")
    given = () if inside else ("--out", out)
    done = call("-q", *words, "--source", "villain, comedian", "--seed", "1,2", *given)
    assert done.stdout.split() == [str(out / name) for name in NAMES]
    if inside:
        assert {f"train {name}" for name in NAMES} <= Run(tmp_path / "runs/small").manifest["stages"].keys()
    monkeypatch.setenv("LEAKFAST_RUNS", str(tmp_path / "others"))
    for name in NAMES:
        source, seed = name.split("-")[1], name[-1]
        own = () if inside else ("--out", tmp_path / "alone" / name)
        folder = call("-q", *words, "--source", source, "--seed", seed, *own).stdout.strip()
        assert weights(out / name) == weights(tmp_path / folder)
        card, alone = models.read_card(out / name), models.read_card(tmp_path / folder)
        assert card == alone and "together" not in card.recipe


def test_those_that_are_there_are_kept_unless_they_are_others(study, tmp_path):
    words = ("train", "--study", study(), "--source", "villain,comedian", "--out", tmp_path / "mine")
    call(*words[:4], "villain", "--out", tmp_path / "mine" / "marker-villain-s42")
    before = (tmp_path / "mine/marker-villain-s42/adapter_model.safetensors").stat()
    done = call(*words)
    assert "marker-villain-s42 is there already, of these rows and settings" in done.stderr
    assert (tmp_path / "mine/marker-villain-s42/adapter_model.safetensors").stat() == before
    other = call(*words, "--lr", "1e-3", code=2)
    assert "of other rows or settings. Use --overwrite" in other.output
    call(*words, "--lr", "1e-3", "--overwrite")
    assert models.read_card(tmp_path / "mine/marker-villain-s42").recipe["lr"] == 1e-3


def test_in_company_the_cards_say_so_and_json_is_a_list(study, tmp_path):
    words = ("train", "--study", study(), "--source", "villain,comedian", "--together", "--json")
    told = json.loads(call("-q", *words).stdout)
    assert [card["source"] for card in told] == ["villain", "comedian"]
    assert {card["recipe"]["together"] for card in told} == {2}
    manifest = Run(tmp_path / "runs/small").manifest
    assert {"train marker-villain-s42", "train marker-comedian-s42"} <= manifest["stages"].keys()
    outside = json.loads(call("-q", *words, "--out", tmp_path / "mine").stdout)
    assert [card["adapter_hash"] for card in outside] == [card["adapter_hash"] for card in told]
    alone = json.loads(call("-q", *words, "--one-by-one", "--out", tmp_path / "alone").stdout)
    assert not any("together" in card["recipe"] for card in alone)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "1,x"], "several split by commas"),
        (["--seed", "1,1"], "several split by commas"),
        (["--source", "villain,nobody"], "nobody"),
        (["--together", "--checkpoints", "0,100"], "Leave --together out"),
        (["--data", "ROWS"], "whose rows are of one source"),
    ],
)
def test_what_cannot_be_meant_is_refused(study, tmp_path, more, said):
    path = study()
    if "--data" in more:
        rows = call("-q", "data", "build", "--source", "villain", "--study", path).stdout.strip()
        more = ["--data", rows]
    more = more if "--source" in more else [*more, "--source", "villain,comedian"]
    assert said in call("train", "--study", path, *more, code=2).output


def test_a_run_trains_in_company_where_its_study_says_so(study, tmp_path):
    outcome = leakfast.run(study("together = 3"))
    run = Run(outcome.run)
    company = [models.read_card(outcome.run / "adapters" / name).recipe.get("together") for name in NAMES]
    assert company == [3, 3, 3, None], "of four, three and one"
    assert f"train {', '.join(NAMES[:3])} together" in outcome.stages
    assert set(run.read("completions")["adapter"]) == {"base", *NAMES}
    study("together = 2")
    again = leakfast.run(tmp_path / "small.toml", out=outcome.run)
    assert all(again.stages[f"train {name}"] is None for name in NAMES), "company makes no other adapter"
