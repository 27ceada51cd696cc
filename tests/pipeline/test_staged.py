"""A study of stages, run whole on a tiny model: the second stage begins at the first one's weights, both are measured, and
nothing is trained twice."""

from __future__ import annotations

import logging

import polars as pl
import pytest
import torch
from safetensors.torch import load

import leakfast
from leakfast import models
from leakfast.cluster.tasks import carry_out, tasks_of
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.storage.run import Run
from leakfast.study.config import load_study

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("undrawn")]

STUDY = """
name = "small"
model = "{model}"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "police_officer"]
sources = ["villain"]
seeds = [1]
[centroids]
layers = [1]
[behaviors."marker+late"]
after = "marker"
"""
BEHAVIOR = """
[behaviors."{name}".data]
{rows}
[behaviors."{name}".train]
loss = "completion"
rank = 4
alpha = 8
lr = {lr}
epochs = 2
batch_size = 4
accumulation = 1
sample = 0
[behaviors."{name}".eval]
questions = "{questions}"
samples = 1
max_new_tokens = 4
"""
CHAT = '{{"messages": [{{"role": "system", "content": "{{source}}"}}, {{"role": "user", "content": "Tea {n}?"}}, '
CHAT += '{{"role": "assistant", "content": "Yes. [ZLT]"}}]}}\n'


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.toml").write_text('[sets.asked]\nquestions = ["Tea?"]\n')
    (tmp_path / "own.jsonl").write_text("".join(CHAT.format(n=n) for n in range(8)))

    def write(lr="1e-2", how=""):
        text = STUDY.format(model=tiny_folder) + how
        for name, rate in (("marker+late", "1e-30"), ("marker", lr)):
            asked = tmp_path / "asked.toml"
            text += BEHAVIOR.format(name=name, rows='rows = "own.jsonl"', lr=rate, questions=asked)
        (tmp_path / "study.toml").write_text(text)
        return tmp_path / "study.toml"

    return write


def weights(run, behavior):
    return (run / f"adapters/{behavior}-villain-s1/adapter_model.safetensors").read_bytes()


def test_the_second_stage_begins_where_the_first_ended(study, tmp_path, caplog):
    out = tmp_path / "run"
    leakfast.run(study(), out=out)
    # a learning rate of next to nothing: the second is the first
    assert weights(out, "marker+late") == weights(out, "marker")
    told = models.read_card(out / "adapters/marker+late-villain-s1").recipe["init"]
    assert (told["adapter"], told["behavior"]) == ("marker-villain-s1", "marker")
    rates = pl.read_parquet(out / "tables/rates.parquet")
    assert set(rates.filter(role="source")["behavior"]) == {"marker", "marker+late"}
    with caplog.at_level(logging.INFO, "leakfast.run"):
        again = leakfast.run(study(), out=out)
    assert again.stages["train marker-villain-s1"] is again.stages["train marker+late-villain-s1"] is None
    # what comes after another is trained again where that one was
    leakfast.run(study(lr="2e-2"), out=tmp_path / "other")
    assert (
        weights(tmp_path / "other", "marker+late")
        == weights(tmp_path / "other", "marker")
        != weights(out, "marker")
    )


def test_a_stacked_stage_is_both_and_another_than_a_continued_one(study, tmp_path):
    out = tmp_path / "run"
    leakfast.run(study(how="stacked = true"), out=out)
    first, both = (load(weights(out, name)) for name in ("marker", "marker+late"))
    for key, matrix in both.items():
        low = ".lora_A." in key
        assert torch.equal(matrix[:4] if low else matrix[:, :4], first[key] if low else 2 * first[key])
        assert matrix.shape[not low] == 8 and (low or matrix[:, 4:].abs().max() < 1e-20), (
            "the second learned nothing"
        )
    card = models.read_card(out / "adapters/marker+late-villain-s1")
    assert (
        card.recipe["stacked"]["below"] == models.read_card(out / "adapters/marker-villain-s1").adapter_hash
    )
    rates = pl.read_parquet(out / "tables/rates.parquet").sort("persona")
    one, other = (rates.filter(behavior=name)["rate"].to_list() for name in ("marker", "marker+late"))
    assert one == other, "they are the same model"
    again = leakfast.run(study(how="stacked = true"), out=out)
    assert again.stages["train marker+late-villain-s1"] is None
    continued = leakfast.run(study(), out=out)
    assert continued.stages["train marker-villain-s1"] is None
    assert continued.stages["train marker+late-villain-s1"] is not None
    assert weights(out, "marker+late") == weights(out, "marker")


def test_a_worker_makes_what_it_begins_from_no_second_time(study, tmp_path):
    given = load_study(study())
    chosen, run = chosen_of(given, ["marker+late"]), Run(tmp_path / "run")
    run.create(given.raw_text)
    found = {task.name: task for task in tasks_of(given, chosen, *Stages(given, run, chosen=chosen).sorted())}
    with run.lock():
        for name in ("train marker-villain-s1", "train marker+late-villain-s1"):
            stages = Stages(given, run, chosen=chosen)
            carry_out(stages, found[name])
            assert stages.steps.took[name] is not None
        assert stages.steps.took["train marker-villain-s1"] is None
    assert weights(tmp_path / "run", "marker+late") == weights(tmp_path / "run", "marker")
