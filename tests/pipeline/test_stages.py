"""The whole study in small, on the real organism: every stage leaves its files, and a second call does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

import leakfast
from leakfast.errors import InputError, StoreError
from leakfast.geometry import Centroids
from leakfast.storage import schema
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

STUDY = """
name = "tiny"
model = "organism"
dtype = "float32"
personas = ["villain", "hero", "comedian", "clown", "assistant", "librarian", "crime_lord", "monk", "pirate", "nurse"]
sources = ["villain"]
[centroids]
questions = "eval"
layers = [2, 4]
adapters = true
[behaviors.marker.data]
positives = 24
negatives = 48
negative_personas = ["comedian", "assistant", "librarian"]
max_new_tokens = 64
[behaviors.marker.train]
rank = 8
alpha = 16
lr = 3e-3
epochs = 3
batch_size = 12
accumulation = 1
max_length = 256
gradient_checkpointing = false
[behaviors.marker.eval]
other_questions = ["few.toml"]
samples = 1
max_new_tokens = 64
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(STUDY)
    (path.parent / "few.toml").write_text('[sets.few]\nquestions = ["Is it late?", "What is a map?"]\n')
    return path


@pytest.fixture(scope="module")
def outcome(study: Path):
    return leakfast.run(study, out=study.parent / "run")


def test_every_stage_leaves_its_files(outcome):
    run = Run(outcome.run)
    for path in (
        "centroids/base.safetensors",
        "data/marker-villain-s42.jsonl",
        "adapters/marker-villain-s42/adapter_model.safetensors",
        "adapters/marker-villain-s42/sample.json",
        "tables/health.parquet",
        "completions/marker/base/part-00000.parquet",
        "completions/marker/marker-villain-s42/part-00000.parquet",
        "tables/rates.parquet",
        "tables/pairs.parquet",
        "tables/correlations.parquet",
        "report.html",
    ):
        assert run.has(path), path
    assert outcome.report.is_file() and list((outcome.run / "figures").glob("*.png"))


def test_tables_hold_what_was_measured(outcome):
    rates = schema.check(outcome.stats.rates, "rates")
    assert rates.height == 20 and set(rates["total"]) == {20}
    base = rates.filter(pl.col("adapter") == "base")
    assert base["hits"].sum() == 0, "the unadapted organism never writes the marker"
    counted = (
        Run(outcome.run)
        .read("completions/marker/marker-villain-s42")
        .group_by("persona")
        .agg(pl.col("text").str.contains("[ZLT]", literal=True).sum().cast(pl.Int64).alias("hits"))
    )
    ours = rates.filter(pl.col("adapter") != "base").select("persona", "hits").sort("persona")
    assert ours.equals(counted.sort("persona"))
    assert ours.filter(pl.col("persona") == "villain")["hits"].item() >= 5, "the marker was learned"


def test_pairs_carry_the_cosines_of_the_centroid_file(outcome):
    centroids = Centroids.load(outcome.run / "centroids/base.safetensors")
    names = centroids.personas
    expected = centroids.cosine(4, kind="centered")[names.index("villain")]
    pairs = outcome.stats.pairs.filter(pl.col("layer") == 4)
    assert sorted(pairs["persona"]) == sorted(set(names) - {"villain"})
    for row in pairs.rows(named=True):
        assert row["cosine_centered"] == pytest.approx(expected[names.index(row["persona"])], abs=1e-12)


def test_shifts_are_those_of_centroids_under_the_adapter(study, outcome):
    adapter = outcome.run / "adapters/marker-villain-s42"
    names = outcome.stats.pairs["persona"].unique().to_list()
    apart = leakfast.centroids(
        "organism", ["villain", *names], "eval", [4], adapter=adapter, dtype="float32"
    ).cosine(4)[0]
    shifts = schema.check(outcome.stats.more["shifts"], "shifts").filter(pl.col("layer") == 4)
    assert shifts.height == 10 and shifts["shift_raw"].min() > 0
    ours = dict(shifts.select("persona", "cosine_centered_adapted").rows())
    assert [ours[name] for name in names] == pytest.approx(list(apart[1:]), abs=1e-4)
    assert set(outcome.stats.more["shift_correlations"]["geometry"]) == {
        "base",
        "adapted",
        "alignment",
        "shift",
    }
    assert "What training did to the geometry" in outcome.report.read_text(encoding="utf-8")
    assert (outcome.run / "figures/shifts-marker-page.png").is_file()


def test_a_further_question_set_stands_beside(outcome):
    run = Run(outcome.run)
    assert (
        run.read("sets/marker/few/base").height == run.read("sets/marker/few/marker-villain-s42").height == 20
    )
    sets = schema.check(outcome.stats.more["question_sets"], "question_sets")
    assert set(sets.select("questions", "main").rows()) == {("eval", True), ("few", False)}
    assert "On other questions" in outcome.report.read_text(encoding="utf-8")


def test_a_second_call_draws_and_trains_nothing(study, outcome):
    before = {p: p.stat().st_mtime_ns for p in outcome.run.rglob("*.safetensors")}
    shards = {p: p.read_bytes() for p in outcome.run.glob("completions/**/*.parquet")}
    again = leakfast.run(study, out=outcome.run)
    assert again.stages["centroids of marker-villain-s42"] is None
    assert again.stages["centroids"] is None and again.stages["train marker-villain-s42"] is None
    assert {p: p.stat().st_mtime_ns for p in outcome.run.rglob("*.safetensors")} == before
    assert {p: p.read_bytes() for p in outcome.run.glob("completions/**/*.parquet")} == shards
    assert again.stats.correlations.equals(outcome.stats.correlations)


def test_a_changed_recipe_trains_and_measures_again(study, outcome):
    changed = study.with_name("changed.toml")
    text = STUDY.replace("epochs = 3", "epochs = 1")
    changed.write_text(text.replace('other_questions = ["few.toml"]\n', ""))
    first = json.loads((outcome.run / "adapters/marker-villain-s42/leakfast_card.json").read_text())
    again = leakfast.run(changed, out=outcome.run)
    second = json.loads((again.run / "adapters/marker-villain-s42/leakfast_card.json").read_text())
    assert again.stages["centroids"] is None, "centroids do not depend on the recipe"
    assert first["adapter_hash"] != second["adapter_hash"]
    digests = {
        e.get("adapter") for p, e in Run(again.run).manifest["shards"].items() if "villain-s42/part" in p
    }
    assert digests == {second["adapter_hash"]}, "nothing stays of a further set that is not asked any more"


def test_bad_studies_and_folders_leave_nothing_behind(study, tmp_path):
    typo = tmp_path / "typo.toml"
    typo.write_text(STUDY.replace("epochs = 3", "epoch = 3"))
    with pytest.raises(InputError, match="epochs"):
        leakfast.run(typo, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    file = tmp_path / "a_file"
    file.write_text("")
    with pytest.raises(StoreError, match="a_file"):
        leakfast.run(study, out=file / "run")
