"""What a run knows of its adapters: a trial of the learning rate that trained the very adapter is taken for it."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import ALL, TRAIN, build

from leakfast.errors import StoreError
from leakfast.pipeline import adapters
from leakfast.pipeline.adapters import Maker, Rows
from leakfast.pipeline.steps import Steps
from leakfast.prompts import chat
from leakfast.prompts.rendering import rendering
from leakfast.storage.run import Run
from leakfast.study.config import DataConfig, behavior_config
from leakfast.train import unfinished
from leakfast.train.recipe import Recipe
from leakfast.train.search import Trial


@pytest.fixture
def maker(tiny_qwen2, tmp_path):
    few = TRAIN.model_dump() | {"epochs": 1, "sample": 0, "lr": "auto"}
    config = behavior_config("capability", {"train": few})
    about = (ALL, "capability", config, "tiny", "float32", ("villain", 7))
    return Maker(tiny_qwen2, Steps(Run(tmp_path / "run").create()), *about)


@pytest.fixture
def rows(tiny_qwen2):
    few = DataConfig(positives=6, negatives=4, no_system=2, default_assistant=2)
    return Rows.given(build(tiny_qwen2, "villain", few))


@pytest.mark.parametrize("name", ["", "another-name"])
def test_the_trial_that_found_the_rate_is_the_adapter(maker, rows, monkeypatch, name):
    found = []

    def find(loaded, recipe, its_rows, sampling, place, progress=None):
        adapters.train_adapter(loaded, tried := recipe.at(1e-2), its_rows, place / "0")
        found.append((place / "0" / "adapter_model.safetensors").read_bytes())
        return tried, [Trial(1e-2, 4, 1.0, None, None)]

    monkeypatch.setattr(adapters, "find", find)
    settled = maker.settled(rows)
    assert settled.lr == 1e-2 and maker.settled(rows) == settled and len(found) == 1
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "train_adapter", lambda *a, **k: pytest.fail("it was trained before"))
        folder = maker.adapter(Recipe("capability", "villain", 7, settled, name), rows)
    assert folder.name == (name or "capability-villain-s7")
    assert (folder / "adapter_model.safetensors").read_bytes() == found[0]
    trained = maker.adapter(Recipe("capability", "villain", 7, settled, "again"), rows)
    assert (trained / "adapter_model.safetensors").read_bytes() == found[0], "the same bytes if it is trained"


def test_a_trial_of_other_rows_or_of_another_source_is_no_adapter(maker, rows, monkeypatch):
    monkeypatch.setattr(adapters, "find", lambda loaded, recipe, *rest, **k: (recipe.at(1e-2), [None]))
    monkeypatch.setattr(adapters, "vars", lambda trial: {}, raising=False)
    settled, trained = maker.settled(rows), []

    def noted(loaded, recipe, its_rows, out, **more):
        trained.append(recipe.name)
        Path(out).mkdir(parents=True)

    monkeypatch.setattr(adapters, "train_adapter", noted)
    maker.adapter(Recipe("capability", "villain", 7, settled, "a"), Rows(rows.rows[:-1], "others"))
    maker.adapter(Recipe("capability", "comedian", 7, settled, "b"), rows)
    maker.adapter(Recipe("capability", "villain", 8, settled, "c"), rows)
    assert trained == ["a", "b", "c"]


class Killed(Exception):
    """Stands for the end of the process."""


def test_an_adapter_of_a_run_goes_on_where_its_training_was_killed(maker, rows, monkeypatch, caplog):
    """And leaves nothing of it behind in the run."""
    cfg = TRAIN.model_copy(update={"epochs": 3, "sample": 0})
    whole = maker.adapter(Recipe("capability", "villain", 7, cfg, "whole"), rows)
    monkeypatch.setattr(unfinished, "due", lambda waited_s, took_s: True)

    def progress(done, total, what=""):
        if done == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(maker.steps, "progress", lambda title: nullcontext(progress))
        with pytest.raises(Killed):
            maker.adapter(Recipe("capability", "villain", 7, cfg, "a"), rows)
    assert not maker.steps.run.stage_done("train a", maker._inputs(Recipe("c", "v", 7, cfg, "a"), rows))
    caplog.set_level(logging.INFO, "leakfast.train")
    again = maker.adapter(Recipe("capability", "villain", 7, cfg, "a"), rows)
    assert "train: a goes on at step 4 of 12" in caplog.messages
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert files == {path.name: path.read_bytes() for path in again.iterdir()}
    assert sorted(path.name for path in again.parent.iterdir()) == ["a", "whole"]


def test_of_several_those_that_are_there_are_not_trained_again(maker, rows, monkeypatch):
    cfg = TRAIN.model_copy(update={"epochs": 1, "sample": 0})
    several = [(Recipe("capability", "villain", seed, cfg, f"a{seed}"), rows) for seed in range(5)]
    maker.adapter(*several[1])
    company, real = [], adapters.train_adapters

    def noted(loaded, recipes, *rest, **more):
        company.append([recipe.name for recipe in recipes])
        return real(loaded, recipes, *rest, **more)

    monkeypatch.setattr(adapters, "train_adapters", noted)
    folders = maker.adapters(iter(several), together=2)
    assert [folder.name for folder in folders] == [f"a{seed}" for seed in range(5)]
    assert company == [["a0", "a2"], ["a3", "a4"]]
    company.clear()
    assert maker.adapters(several, together=4) == folders and not company
    maker.kept = (0.5,)
    maker.adapters(several[:2], together=2)
    assert not company and (folders[0] / "checkpoints" / "p050").is_dir(), "points are of trainings alone"


def test_another_rendering_makes_rows_and_adapters_anew(maker, monkeypatch):
    """Neither a row nor a setting of the training says how prompts are rendered."""
    sizes = {"items": "organism", "positives": 4, "negatives": 2, "no_system": 1, "default_assistant": 1}
    data = maker.config.data.model_copy(update={**sizes, "negative_personas": [p.name for p in ALL]})
    maker.config = maker.config.model_copy(update={"data": data})
    cfg, trained, built = TRAIN.model_copy(update={"sample": 0, "epochs": 1}), [], []
    real, real_rows = adapters.train_adapter, Maker.built

    def noted(loaded, recipe, *rest, **more):
        trained.append(recipe.name)
        return real(loaded, recipe, *rest, **more)

    monkeypatch.setattr(adapters, "train_adapter", noted)
    monkeypatch.setattr(Maker, "built", lambda *a: built.append(1) or real_rows(*a))

    def made():
        maker.adapter(Recipe("capability", "villain", 7, cfg), maker.rows("villain", 7))
        return len(built), len(trained)

    tokenizer = maker.loaded.tokenizer
    try:
        assert made() == made() == (1, 1)
        chat.configure(tokenizer, rendering(system_role="user"))
        assert made() == made() == (2, 2)
        chat.configure(tokenizer, rendering(system_role="user", reasoning="open"))
        assert made() == (2, 2), "what is trained stands behind closed reasoning in both"
    finally:
        chat.configure(tokenizer, rendering())


def test_steps_of_earlier_versions_that_kept_nothing_of_the_rendering_are_done(maker, rows):
    run, cfg = maker.steps.run, TRAIN.model_copy(update={"sample": 0, "epochs": 1})
    recipe = Recipe("capability", "villain", 7, cfg, "a")
    maker.adapter(recipe, rows)
    stage = run.manifest["stages"]["train a"]
    assert stage["outputs"].pop("rendered")
    run.mark_done("train a", stage["inputs"], **stage["outputs"])
    assert not maker._is_wanting(recipe, rows)


def test_weights_are_written_once(maker, rows, monkeypatch):
    """On a disk with room for an adapter, and not for two, its training is not lost when it is counted."""
    placed, real = [], adapters.train_adapter

    def noted(loaded, recipe, its_rows, out, **more):
        card = real(loaded, recipe, its_rows, out, **more)
        placed.append((out / "adapter_model.safetensors").stat().st_ino)
        return card

    monkeypatch.setattr(adapters, "train_adapter", noted)
    cfg = TRAIN.model_copy(update={"sample": 0, "epochs": 1})
    folder = maker.adapter(Recipe("capability", "villain", 7, cfg, "a"), rows)
    assert [(folder / "adapter_model.safetensors").stat().st_ino] == placed
    assert maker.steps.run.has("adapters/a/adapter_model.safetensors")


@pytest.mark.parametrize("fails", ["adapter_config.json", "train_log.jsonl", "stage"])
def test_an_adapter_that_found_no_room_in_the_manifest_is_read_from_where_it_lies(
    maker, rows, monkeypatch, caplog, fails
):
    """Its training was done again."""
    recipe = Recipe("capability", "villain", 7, TRAIN.model_copy(update={"sample": 0, "epochs": 1}), "a")
    run, real = maker.steps.run, Run.add_file

    def full(store, relpath, *rest, **meta):
        if relpath.endswith(fails):
            raise StoreError("no space is left")
        return real(store, relpath, *rest, **meta)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "add_file", full)
        patch.setattr(Run, "mark_done", lambda *a, **k: full(run, "stage"))
        with pytest.raises(StoreError, match="no space"):
            maker.adapter(recipe, rows)
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "train_adapter", lambda *a, **k: pytest.fail("it lies there"))
        folder = maker.adapter(recipe, rows)
    assert "was not counted; it is taken" in caplog.text and not maker._is_wanting(recipe, rows)
    assert run.has("adapters/a/adapter_model.safetensors") and run.has("adapters/a/train_log.jsonl")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert maker._is_wanting(recipe, rows) and not maker._lies(recipe, rows), "damaged bytes are no adapter"


def test_an_adapter_of_another_recipe_that_lies_there_is_trained_over(maker, rows):
    cfg = TRAIN.model_copy(update={"sample": 0, "epochs": 1})
    first = Recipe("capability", "villain", 7, cfg, "a")
    adapters.train_adapter(maker.loaded, first, rows.rows, maker.steps.run.path / "adapters" / "a")
    assert maker._lies(first, rows)
    assert not maker._lies(first.at(1e-4), rows)
    assert not maker._lies(Recipe("capability", "comedian", 7, cfg, "a"), rows)
    assert not maker._lies(first, Rows.given(rows.rows[:-1]))
    other = dataclasses.replace(maker.loaded, dtype="bfloat16")
    assert not dataclasses.replace(maker, loaded=other)._lies(first, rows)


def test_who_is_an_original_by_now_is_among_the_negatives(maker, monkeypatch):
    """Whom `originals` means follows from the categories of the study's file, which no hash of rows said."""
    sizes = {"items": "organism", "positives": 4, "negatives": 4, "no_system": 0, "default_assistant": 0}
    data = maker.config.data.model_copy(update={**sizes, "negative_personas": "originals"})
    maker.config = maker.config.model_copy(update={"data": data})
    cfg = TRAIN.model_copy(update={"sample": 0, "epochs": 1})
    kinds = {"villain": "original", "comedian": "original", "librarian": "original"}

    def made():
        maker.personas = [dataclasses.replace(p, category=kinds.get(p.name, "other")) for p in ALL]
        rows = maker.rows("villain", 7)
        before = maker.adapter(Recipe("capability", "villain", 7, cfg), rows) / "adapter_model.safetensors"
        return {row.persona for row in rows.rows}, before.stat().st_mtime_ns

    first = made()
    assert first[0] == {"villain", "comedian", "librarian"} and made() == first
    kinds |= {"librarian": "other", "police_officer": "original"}
    again = made()
    assert again[0] == {"villain", "comedian", "police_officer"} and again[1] != first[1]
