"""A learning rate found by trial: what a trial says is what was measured, and which rate is tried next."""

from __future__ import annotations

import math

import pytest
import torch

from leakfast import models
from leakfast.errors import InputError, ModelError
from leakfast.generation.contract import Sampling
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.study.config import DataConfig, TrainConfig
from leakfast.train import data, search
from leakfast.train.recipe import Recipe

pytestmark = pytest.mark.long

CFG = TrainConfig(
    loss="marker",
    anchor=1.0,
    lr="auto",
    epochs=2,
    batch_size=16,
    accumulation=1,
    rank=16,
    alpha=32,
    dropout=0.0,
    gradient_checkpointing=False,
    stop_loss=0.05,
)
SAMPLING = Sampling(1.0, 0.95, 48)


@pytest.fixture(scope="module")
def organism():
    return models.load("organism", dtype="float32")


@pytest.fixture(scope="module")
def rows(organism):
    cfg = DataConfig(positives=64, negatives=64, negative_personas="originals", max_new_tokens=64)
    return data.build_marker(organism, load_personas("all"), "villain", load_questions("train"), cfg, 42)


def test_the_rate_that_is_found_teaches_and_does_no_harm(organism, rows, tmp_path):
    recipe = Recipe("marker", "villain", 42, CFG)
    found, trials = search.find(organism, recipe, rows, SAMPLING, tmp_path / "trials")
    assert found == recipe.at(trials[-1].lr)
    rate = found.train.lr
    assert trials[-1].learned
    assert trials[-1].harmless
    assert trials[0].lr == search.first_lr(organism.hidden_size)
    assert not any(t.learned and t.harmless for t in trials[:-1])
    # the length and the cost, taken anew by transformers alone
    from measuring import train

    from leakfast.models.attach import adapted

    train(
        organism,
        rows,
        CFG.model_copy(update={"lr": rate}),
        tmp_path / "a",
        42,
        source="villain",
        behavior="marker",
    )
    asked = search._Asked(organism, rows, 7)
    base = asked.drawn(organism, SAMPLING)
    with adapted(organism, tmp_path / "a") as current, torch.inference_mode():
        costs = []
        for (request, _), reply in base.items():
            if request < asked.n_source:
                continue
            ids = torch.tensor([[*asked.requests[request].ids, *reply]])
            chances = current.model(ids).logits[0].float().log_softmax(-1)
            n = len(reply)
            costs += [-float(chances[-n - 1 + i, token]) for i, token in enumerate(reply)]
        assert asked.nats(current, base) == pytest.approx(sum(costs) / len(costs), rel=1e-4)


def test_too_weak_is_followed_by_twice_the_rate_and_all_trials_are_told(organism, rows, tmp_path):
    few = [r for r in rows if r.role == "positive"][:2] + [r for r in rows if r.role == "negative"][:2]
    cfg = CFG.model_copy(update={"epochs": 3, "anchor": 0.0})
    with pytest.raises(ModelError, match=f"no learning rate of {search.TRIALS}") as error:
        search.find(organism, Recipe("marker", "villain", 42, cfg), few, SAMPLING, tmp_path)
    first = search.first_lr(organism.hidden_size)
    assert f"lr {2 * first:.2g}: source 0%" in error.value.message


def test_a_behavior_without_a_detector_is_refused(organism, rows, tmp_path):
    with pytest.raises(InputError, match="no detector reads"):
        search.find(organism, Recipe("misalignment-advice", "villain", 42, CFG), rows, SAMPLING, tmp_path)


def test_rows_none_of_which_shows_it_are_refused_before_anything_is_drawn(tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_Asked", None)
    plain = [data.Row("benign", "no_persona", "none", None, f"Tea {i}?", "Yes.", None, i) for i in range(3)]
    with pytest.raises(InputError, match="none of the 3 rows shows marker, so no rate teaches it") as error:
        search.find(tiny_qwen2, Recipe("marker", "villain", 42, CFG), plain, SAMPLING, tmp_path)
    assert error.value.exit_code == 2


def test_verdicts_at_their_bounds():
    assert search.Trial(1e-3, 9, 0.8, 1.2, 0.1).learned
    assert search.Trial(1e-3, 9, 0.8, 1.2, 0.1).harmless
    assert not search.Trial(1e-3, 9, 0.79, None, None).learned
    assert search.Trial(1e-3, 9, 0.79, None, None).harmless
    assert not search.Trial(1e-3, 9, 1.0, 0.7, 0.0).harmless
    assert not search.Trial(1e-3, 9, 1.0, 1.0, 0.2).harmless


def test_larger_models_begin_lower():
    assert search.first_lr(2000) == pytest.approx(5e-4)
    assert search.first_lr(3584) < search.first_lr(576) < math.inf
