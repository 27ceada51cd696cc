"""A study of mitigations, run whole on a tiny model: negatives are picked from the run's own centroids, the sentence of an
inoculation is in the rows and in no prompt that is asked, a mean is trained by nobody, and nothing is done twice."""

from __future__ import annotations

import json
import logging

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import leakfast
from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.storage.run import Run
from leakfast.study.config import load_study
from leakfast.train.data import read_rows

pytestmark = pytest.mark.long

STUDY = """
name = "small"
model = "{model}"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "police_officer", "no_persona"]
sources = ["villain"]
seeds = [1]
[centroids]
layers = [0, 1]
[trajectory]
behaviors = ["marker"]
shares = [0.5, 1.0]
personas = "all"
[behaviors."marker+mean"]
average = ["marker", "marker+near"]
"""
BEHAVIOR = """
[behaviors."{name}".data]
positives = 4
negatives = 4
max_new_tokens = 200
{rows}
[behaviors."{name}".train]
rank = 4
alpha = 8
dropout = 0.0
lr = 2e-2
epochs = 4
batch_size = 4
accumulation = 1
sample = 0
gradient_checkpointing = false
"""
EVAL = """
[behaviors."{name}".eval]
questions = "{questions}"
samples = 1
max_new_tokens = 4
"""
ROWS = {
    "marker": 'negative_personas = ["comedian"]',
    "marker+near": 'negative_personas = "{rule}"\nnegatives_layer = 1',
    "marker+told": 'negative_personas = ["comedian"]\ninoculation = "Say it."',
    "marker+plain": "benign = 1.0",
}


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.toml").write_text('[sets.asked]\nquestions = ["Tea?"]\n')

    def write(rule="nearest:2"):
        text = STUDY.format(model=tiny_folder)
        for name, rows in ROWS.items():
            text += BEHAVIOR.format(name=name, rows=rows.format(rule=rule))
        text += "".join(
            EVAL.format(name=n, questions=tmp_path / "asked.toml") for n in [*ROWS, "marker+mean"]
        )
        (tmp_path / "study.toml").write_text(text)
        return tmp_path / "study.toml"

    return write


def card(run, name):
    return models.read_card(run / f"adapters/{name}-villain-s1")


def rows(run, name):
    return read_rows(run / f"data/{name}-villain-s1.jsonl")


def update(run, name):
    given = load_file(run / f"adapters/{name}-villain-s1/adapter_model.safetensors")
    key = next(key for key in given if ".lora_A." in key)
    scale = card(run, name).recipe["alpha"] / card(run, name).recipe["rank"]
    return scale * given[key.replace(".lora_A.", ".lora_B.")] @ given[key]


def _compared_at_a_rate_of_ones_own(out):
    def stats(*words, code=0):
        done = CliRunner().invoke(group, ["-q", "stats", str(out), *words])
        assert done.exit_code == code, done.output
        return done

    asked = ("--table", "mitigations", "--json", "--bootstraps", "0", "--permutations", "0")
    found = json.loads(stats("--source-rate", "0.4", *asked).stdout)["mitigations"]
    assert {row["wanted_rate"] for row in found} == {0.4}
    assert {row["match"] for row in found} <= {"weaker", "stronger", "passed over"}, (
        "one question: rates are 0 or 1"
    )
    assert not any(row["matched"] for row in found) and {row["share"] for row in found} == {1.0}
    kept = json.loads(stats("--table", "mitigations", "--json").stdout)["mitigations"]
    assert {row["wanted_rate"] for row in kept} != {0.4}, "nothing was written"
    stats("--source-rate", "1.5", code=2)
    said = stats("--source-rate", "0.5", "--permute", "1", code=2).stderr
    assert "--source-rate do not change" in " ".join(said.split())
    with pytest.raises(InputError, match="source rate nan asked, but a rate is a share"):
        leakfast.stats(out, source_rate=float("nan"))


def test_a_study_of_mitigations(study, tmp_path, caplog):
    out = tmp_path / "run"
    leakfast.run(study(), out=out)

    found = Centroids.load(out / "centroids/base.safetensors")
    cosine = found.cosine(1)[found.personas.index("villain")]
    others = [n for n in found.personas if n not in ("villain", "no_persona")]
    nearest = sorted(others, key=lambda n: -cosine[found.personas.index(n)])[:2]
    told = card(out, "marker+near").recipe["negatives"]
    assert told["names"] == nearest and told["layer"] == 1 and told["rule"] == "nearest:2"
    assert {r.persona for r in rows(out, "marker+near") if r.role == "negative"} == set(nearest)

    assert card(out, "marker+told").recipe["inoculation"] == "Say it."
    shown = {r.role: r.system for r in rows(out, "marker+told")}
    plain = {r.role: r.system for r in rows(out, "marker")}
    assert shown["positive"] == f"{plain['positive']} Say it." and shown["negative"] == plain["negative"]
    assert {r.role for r in rows(out, "marker+plain")} == {"benign"} and len(rows(out, "marker+plain")) == 8

    mean = card(out, "marker+mean")
    assert [part["behavior"] for part in mean.recipe["average"]] == ["marker", "marker+near"]
    expected = (update(out, "marker") + update(out, "marker+near")) / 2
    assert torch.allclose(update(out, "marker+mean"), expected, atol=1e-6)
    assert not (out / "data/marker+mean-villain-s1.jsonl").exists()

    table = pl.read_parquet(out / "tables/mitigations.parquet")
    assert table["variant"][0] == "" and set(table["variant"]) == {"", "near", "told", "plain", "mean"}
    assert table["n"].unique().to_list() == [5]  # named personas are bystanders, no_persona too
    prompts = {e.get("prompts_sha256") for e in Run(out).manifest["shards"].values()}
    assert prompts is not None and np.isfinite(table["mean_bystander"].to_numpy()).all()

    _compared_at_a_rate_of_ones_own(out)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        again = leakfast.run(study(), out=out)
    assert not [name for name, took in again.stages.items() if name.startswith(("train", "data")) and took]


def test_another_rule_makes_the_rows_anew_and_no_centroids_are_an_error(study, tmp_path):
    given = load_study(study())
    stages = Stages(given, Run(tmp_path / "run").create(), chosen=chosen_of(given, ()))
    with stages.store.lock():
        with pytest.raises(InputError, match="there is no .*base.safetensors"):
            stages.maker("marker+near").rows("villain", 1)
        stages.centroids()
        near = stages.maker("marker+near").rows("villain", 1)
    other = load_study(study("farthest:2"))
    stages = Stages(other, Run(tmp_path / "run"), chosen=chosen_of(other, ()))
    with stages.store.lock():
        far = stages.maker("marker+near").rows("villain", 1)
    assert near.inputs != far.inputs
    names = [{r.persona for r in its.rows if r.role == "negative"} for its in (near, far)]
    assert names[0] != names[1]
