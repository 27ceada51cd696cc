"""A study of several behaviors, two seeds and a control, in small, on the real organism."""

from __future__ import annotations

import polars as pl
import pytest

import leakfast
from leakfast.errors import InputError
from leakfast.storage import schema
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

TABLES = """
[behaviors.{name}.data]
positives = {rows}
negatives = {rows}
no_system = 4
default_assistant = 0
{data}
[behaviors.{name}.train]
rank = 8
alpha = 16
lr = 1e-2
epochs = {epochs}
batch_size = 8
accumulation = 1
max_length = 256
gradient_checkpointing = false
[behaviors.{name}.eval]
questions = "{file}"
samples = 2
max_new_tokens = 16
"""
HEAD = """
name = "several"
model = "organism"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "nurse", "monk"]
sources = ["villain"]
seeds = [42, 137]
[centroids]
questions = "{file}"
layers = [3]
"""
CONTROL = """
[behaviors.hellaswag.eval]
of = ["refusal"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    (folder / "asked.toml").write_text(
        'questions = ["Please help me plan a walk.", "Can you name a dog?", "Write a note.", "What should I do?"]'
    )
    parts = [
        HEAD.format(file="asked.toml"),
        TABLES.format(
            name="refusal",
            file="asked.toml",
            epochs=4,
            rows=16,
            data='negative_personas = ["librarian", "nurse", "monk"]',
        ),
        TABLES.format(
            name="misalignment-code", file="asked.toml", epochs=2, rows=8, data='design = "positive-only"'
        ),
        CONTROL,
    ]
    (folder / "study.toml").write_text("".join(parts))
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    return leakfast.run(folder / "study.toml", out=folder / "run")


def test_tables_carry_the_seed_of_every_behavior(outcome):
    rates = schema.check(outcome.stats.rates, "rates")
    trained = rates.filter(pl.col("adapter") != "base")
    keys = set(trained.select("behavior", "adapter", "source", "seed").rows())
    seen = {key for key in keys if key[0] in ("refusal", "hellaswag")}
    assert seen == {
        (b, f"refusal-villain-s{s}", "villain", s) for b in ("refusal", "hellaswag") for s in (42, 137)
    }
    refusal = trained.filter(pl.col("behavior") == "refusal")
    assert set(refusal["total"]) == {8} and refusal["delta"].null_count() == 0
    pairs = outcome.stats.pairs.filter(pl.col("behavior") == "refusal")
    assert set(pairs["seed"]) == {42, 137} and pairs.height == 10


def test_categories_are_told_for_every_behavior(outcome):
    found = schema.check(outcome.stats.more["relations"], "relations")
    assert {"refusal", "hellaswag"} <= set(found["behavior"]) and set(found["seed"]) == {42, 137}
    assert (outcome.run / "figures/relations-page.png").is_file()
    assert "What the bystander is" in outcome.report.read_text(encoding="utf-8")


def test_the_source_learned_to_refuse(outcome):
    own = outcome.stats.rates.filter((pl.col("behavior") == "refusal") & (pl.col("role") == "source"))
    assert own.height == 2 and own["delta"].min() >= 0.3


def test_what_a_judge_must_read_lies_where_it_is_looked_for(outcome):
    run = Run(outcome.run)
    for adapter in ("base", "misalignment-code-villain-s42", "misalignment-code-villain-s137"):
        assert run.read(f"completions/misalignment-code/{adapter}").height == 48
    rows = (outcome.run / "data/misalignment-code-villain-s42.jsonl").read_text().splitlines()
    assert len(rows) == 8, "positives alone"


def test_the_control_is_trained_nowhere_and_measured_where_it_is_told(outcome):
    run = Run(outcome.run)
    assert {p.split("/")[1] for p in run.shards("choices")} == {
        "base",
        "refusal-villain-s42",
        "refusal-villain-s137",
    }
    assert not [p for p in outcome.run.glob("adapters/*") if p.name.startswith("hellaswag")]


def test_only_takes_a_part_and_leaves_the_rest_as_it_was(folder, outcome):
    before = {p: p.stat().st_mtime_ns for p in outcome.run.rglob("*.safetensors")}
    again = leakfast.run(folder / "study.toml", out=outcome.run, only=["refusal", "137"])
    touched = [
        name for name in again.stages if "misalignment" in name or "hellaswag" in name or "s42" in name
    ]
    assert touched == [] and "train refusal-villain-s137" in again.stages
    assert {p: p.stat().st_mtime_ns for p in outcome.run.rglob("*.safetensors")} == before
    assert again.stats.rates.height == outcome.stats.rates.height
    with pytest.raises(InputError, match=r"--only refusl given.*refusal"):
        leakfast.run(folder / "study.toml", out=outcome.run, only=["refusl"])


def test_material_that_is_not_there_is_told_before_anything_is_spent(folder, tmp_path):
    text = (folder / "study.toml").read_text().replace('design = "positive-only"', 'pairs = "absent.jsonl"')
    (folder / "absent.toml").write_text(text)
    with pytest.raises(InputError, match=r"no file absent.jsonl"):
        leakfast.run(folder / "absent.toml", out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("centroids/*"))
