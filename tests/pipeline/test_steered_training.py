"""A training's steering as a study asks for it: the direction is of the run's centroids and kept there, the adapter is trained
again where it changes, and what cannot be made is refused with its line or its remedy."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import leakfast
from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.measure.centroids import compute
from leakfast.pipeline.steered_training import steer_of
from leakfast.pipeline.sweep import Plan
from leakfast.prompts.personas import load_personas
from leakfast.steering import directions
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import TrainSteeringConfig, load_study, parse_study

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("undrawn")]

PEOPLE = ["villain", "comedian", "assistant", "monk"]
ASKED = load_personas(PEOPLE)
STUDY = """name = "s"
model = "{model}"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian"]
sources = ["villain"]
seeds = [1]
[centroids]
layers = {centroids}
questions = "eval-ten"
[behaviors.marker.data]
positives = 4
negatives = 4
negative_personas = ["comedian"]
max_new_tokens = 200
[behaviors.marker.train]
rank = 4
alpha = 8
dropout = 0.0
lr = 1e-2
epochs = 2
batch_size = 4
accumulation = 1
sample = 0
gradient_checkpointing = false
[behaviors.marker.eval]
questions = "eval-ten"
samples = 1
max_new_tokens = 4
"""
STEERED = """[behaviors.marker.train.steering]
layers = [1]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    loaded, run = models.load("organism", dtype="float32"), Run(tmp_path_factory.mktemp("steered") / "run")
    run.create("")
    centroids = compute(loaded, ASKED, ["Who are you?", "Tea?"], [2, 3])
    run.add_file(layout.centroids(), centroids.save)
    return loaded, run


def test_directions_are_of_the_runs_centroids_and_kept_there(made):
    loaded, run = made
    c = Centroids.load(run.path / layout.centroids()).layer(3).astype(np.float64)
    row = PEOPLE.index
    steer = steer_of(
        loaded, run, "marker+up", TrainSteeringConfig(layers=[3], strength=2.0), "villain", ASKED
    )
    mean = steer.arm.directions
    assert np.allclose(mean.vectors[3], c[row("villain")] - c.mean(0), atol=1e-5)
    assert (steer.arm.mode, steer.arm.strength, steer.arm.at) == ("add", 2.0, (3,))
    kept = directions.load(run.path / "directions" / "training+marker+up-villain.safetensors")
    assert kept.digest == mean.digest
    asked = TrainSteeringConfig(kind="difference", against=["monk"], source="comedian", layers=[2, 3])
    other = steer_of(loaded, run, "marker", asked, "villain", ASKED).arm.directions
    assert np.allclose(other.vectors[3], c[row("comedian")] - c[row("monk")], atol=1e-5)
    asked = TrainSteeringConfig(kind="random", like="source-mean", layers=[3], seed=1)
    chance = steer_of(loaded, run, "marker", asked, "villain", ASKED).arm.directions
    assert chance.norms[3] == pytest.approx(mean.norms[3], rel=1e-6) and chance.kind == "random"
    u, v = chance.vectors[3], mean.vectors[3]
    assert abs(u @ v) < 0.5 * np.linalg.norm(u) * np.linalg.norm(v)
    asked = TrainSteeringConfig(
        kind="file",
        file=str(run.path / "directions" / "training+marker+up-villain.safetensors"),
        layers=[3],
        strength=2.0,
    )
    assert steer_of(loaded, run, "x", asked, "villain", ASKED) == steer, "what it is, not what it is called"
    assert steer_of(loaded, run, "marker", None, "villain", ASKED) is None


def test_what_cannot_be_made_is_refused(made, tmp_path):
    loaded, run = made
    with pytest.raises(InputError, match="layer 5, but the centroids"):
        steer_of(loaded, run, "marker", TrainSteeringConfig(layers=[5]), "villain", ASKED)
    with pytest.raises(InputError, match="no centroid|none of the 4 personas"):
        steer_of(loaded, run, "marker", TrainSteeringConfig(layers=[3]), "pirate", ASKED)
    with pytest.raises(InputError, match="leakfast run STUDY"):
        steer_of(
            loaded,
            Run(tmp_path / "none").create(),
            "marker",
            TrainSteeringConfig(layers=[3]),
            "villain",
            ASKED,
        )
    edited = [replace(p, prompt="You are a villain no more.") if p.name == "villain" else p for p in ASKED]
    with pytest.raises(InputError, match="when villain had another prompt.*leakfast run STUDY"):
        steer_of(loaded, run, "marker", TrainSteeringConfig(layers=[3]), "villain", edited)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("layers = []", "layers"),
        ("strength = 1.0", "layers"),
        ('layers = [1]\nkind = "random"', "like"),
        ('layers = [1]\nlike = "source-mean"', "like"),
        ('layers = [1]\nkind = "file"', "file"),
        ('layers = [1]\nkind = "difference"', "against"),
        ('layers = [1]\nagainst = ["comedian"]', "against"),
        ('layers = [1]\nmode = "project"\nstrength = 1.5', "share"),
        ("layers = [1]\nstrength = inf", "finite"),
        ("layers = [1]\nstrengths = [1.0]", "strength"),
        ('layers = [1]\nsource = "vilain"', "villain"),
        ('layers = [1]\nkind = "file"\nfile = "no.safetensors"', "no file"),
        ("layers = [0, 1]", "Name it under .centroids. too"),
    ],
)
def test_the_study_file_says_what_is_wrong_and_where(lines, said):
    text = STUDY.format(model="organism", centroids="[1]") + STEERED.replace("layers = [1]", lines)
    with pytest.raises(InputError, match=said) as error:
        parse_study(text)
    assert error.value.exit_code == 2 and "study.toml, line " in error.value.message


def test_a_mean_and_a_sweep_are_not_steered(tiny_qwen2):
    text = STUDY.format(model="organism", centroids='"all"') + STEERED
    study = parse_study(text)
    plan = Plan("marker", "villain", load_personas(PEOPLE), study.behaviors["marker"])
    with pytest.raises(InputError, match="Sweep it without"):
        plan.checked(tiny_qwen2)
    more = '[behaviors."marker+b".data]\n[behaviors."marker+mean"]\naverage = ["marker", "marker+b"]\n'
    more += '[behaviors."marker+mean".train.steering]\nlayers = [1]\n'
    with pytest.raises(InputError, match="has no training to be steered"):
        parse_study(text + more)


def test_a_study_trains_under_steering_and_again_where_it_changes(tiny_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="leakfast.run")
    text = STUDY.format(model=tiny_folder.as_posix(), centroids='"all"')

    def run(more):
        path = tmp_path / "study.toml"
        path.write_text(text + more)
        caplog.clear()
        leakfast.run(load_study(path), out=tmp_path / "run")
        card = models.read_card(tmp_path / "run" / "adapters" / "marker-villain-s1")
        kept = ("train marker-villain-s1: done before", "everything is there, and nothing")
        return card, any(word in line for line in caplog.messages for word in kept)

    plain, _ = run("")
    steered, there = run(STEERED)
    assert not there and steered.adapter_hash != plain.adapter_hash
    told = steered.recipe["steering"]
    assert (told["kind"], told["direction_source"], told["strength"]) == ("source-mean", "villain", 1.0)
    again, there = run(STEERED)
    assert there and again == steered
    other, there = run(STEERED + "strength = -1.0\n")
    assert not there and other.adapter_hash != steered.adapter_hash
    none, there = run(STEERED + "strength = 0.0\n")
    assert not there and none.adapter_hash == plain.adapter_hash
    last, there = run("")
    assert not there and last == plain


def test_leakfast_train_takes_it_from_the_studys_run(tiny_folder, tmp_path, monkeypatch):
    """Without centroids it says what to run; with them it trains the run's very adapter, and finds it again."""
    monkeypatch.setenv("LEAKFAST_RUNS", str(tmp_path / "runs"))
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(model=tiny_folder.as_posix(), centroids='"all"') + STEERED)

    def train(out, seeds="1"):
        words = f"train --behavior marker --source villain --seed {seeds} --study {study} --out {out}"
        return CliRunner().invoke(group, words.split())

    refused = train(tmp_path / "a")
    assert refused.exit_code == 2 and "leakfast run STUDY" in refused.output
    leakfast.run(load_study(study))
    done = train(tmp_path / "a")
    assert done.exit_code == 0, done.output
    mine = models.read_card(tmp_path / "a")
    assert mine == models.read_card(tmp_path / "runs" / "s" / "adapters" / "marker-villain-s1")
    assert train(tmp_path / "several", "1,2").exit_code == 0
    again = train(tmp_path / "several", "1,2")
    assert again.exit_code == 0, again.output
    study.write_text(study.read_text() + "strength = 0.5\n")
    other = train(tmp_path / "several", "1,2")
    assert other.exit_code == 2 and "of other rows or settings" in other.output
