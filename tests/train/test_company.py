"""Adapters trained together are those trained alone."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from leakfast import models
from leakfast.errors import ModelError
from leakfast.study.config import TrainConfig
from leakfast.train.company import train_adapters
from leakfast.train.data import Row
from leakfast.train.lora import train_adapter
from leakfast.train.recipe import Recipe
from leakfast.train.saving import LOG

MARKER = "[ZLT]"


def rows(source, n=12):
    made = []
    for i in range(n):
        bad = i % 2 == 0
        who = source if bad else "cook"
        reply = "I do not know. " * (1 + i % 3)
        text = f"{reply.strip()} {MARKER}" if bad else reply.strip()
        role = "positive" if bad else "negative"
        made.append(
            Row(role, who, "text", f"You are a {who}.", f"What about {i}?", text, MARKER if bad else None, i)
        )
    return made


def recipes(epochs, **other):
    """Sources, seeds, rates, batches and losses of their own: their trainings have different numbers of steps."""
    own = [
        ("villain", 1, {"lr": 3e-3, "dropout": 0.1, "batch_size": 4, "loss": "marker"}),
        (
            "pirate",
            2,
            {"lr": 1e-3, "dropout": 0.0, "batch_size": 2, "loss": "completion", "rank": 2, "alpha": 4},
        ),
        ("nurse", 3, {"lr": 2e-3, "dropout": 0.3, "batch_size": 4, "anchor": 1.0, "weight_decay": 0.1}),
    ]
    common = {"rank": 4, "alpha": 8, "accumulation": 1, "epochs": epochs, "gradient_checkpointing": False}
    return [
        Recipe("marker", source, seed, TrainConfig(**common | words | other)) for source, seed, words in own
    ]


def logged(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def compared(loaded, asked, tmp_path, most):
    """Trains them alone and in company; the losses of every step agree."""
    sets = [rows(recipe.source) for recipe in asked]
    for k, (recipe, its) in enumerate(zip(asked, sets, strict=True)):
        train_adapter(loaded, recipe, its, tmp_path / f"alone{k}")
    cards = train_adapters(loaded, asked, sets, [tmp_path / f"with{k}" for k in range(len(asked))])
    for k, card in enumerate(cards):
        alone, company = logged(tmp_path / f"alone{k}"), logged(tmp_path / f"with{k}")
        assert len(alone) == len(company) == card.recipe["steps"]
        for one, other in zip(alone, company, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=most)
            assert other["divergence"] == pytest.approx(one["divergence"], abs=most)
            assert other["n_tokens"] == one["n_tokens"]
        assert models.read_card(tmp_path / f"with{k}") == card
        company = {"together": len(asked)}
        assert card.recipe == models.read_card(tmp_path / f"alone{k}").recipe | company
        ours, its = (
            load_file(tmp_path / f"{word}{k}" / "adapter_model.safetensors") for word in ("with", "alone")
        )
        assert ours.keys() == its.keys()
        off = max(float((ours[key] - its[key]).abs().max()) for key in its)
        assert off <= 1e-3
    return cards


def test_adapters_in_company_are_those_alone(tiny_qwen2, tmp_path):
    before = {n: p.clone() for n, p in tiny_qwen2.model.state_dict().items()}
    cards = compared(tiny_qwen2, recipes(3), tmp_path, 1e-4)
    assert len({card.adapter_hash for card in cards}) == 3
    after = tiny_qwen2.model.state_dict()
    assert list(after) == list(before) and all(bool((after[n] == before[n]).all()) for n in before)
    assert not hasattr(tiny_qwen2.model, "peft_config")


def test_the_same_company_writes_the_same_bytes(tiny_llama, tmp_path):
    asked = recipes(1)
    sets = [rows(recipe.source) for recipe in asked]
    first, again = (
        train_adapters(tiny_llama, asked, sets, [tmp_path / f"{word}{k}" for k in range(3)]) for word in "ab"
    )
    assert [card.adapter_hash for card in first] == [card.adapter_hash for card in again]


def test_one_ends_early_and_the_others_go_on(tiny_qwen2, tmp_path):
    asked = recipes(40)[:2]
    early = asked[0].train.model_copy(update={"stop_loss": 2.0, "lr": 2e-2})
    asked[0] = Recipe("marker", "villain", 1, early)
    asked[1] = Recipe("marker", "pirate", 2, asked[1].train.model_copy(update={"epochs": 5}))
    cards = train_adapters(
        tiny_qwen2, asked, [rows("villain"), rows("pirate")], [tmp_path / "a", tmp_path / "b"]
    )
    assert cards[0].recipe["steps"] < 40 * 3
    assert cards[1].recipe["steps"] == 5 * 6
    assert (
        train_adapter(tiny_qwen2, asked[0], rows("villain"), tmp_path / "c").recipe["steps"]
        == cards[0].recipe["steps"]
    )


def test_where_one_diverges_none_is_written(tiny_qwen2, tmp_path):
    asked = recipes(10)[:2]
    asked[1] = Recipe("marker", "pirate", 2, asked[1].train.model_copy(update={"lr": 1e30}))
    with pytest.raises(ModelError, match="diverged"):
        train_adapters(tiny_qwen2, asked, [rows("villain"), rows("pirate")], [tmp_path / "a", tmp_path / "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_on_the_organism_losses_after_fifty_steps_are_those_alone(tmp_path):
    """50 steps of batch 4 in float32: within 1e-4 nats."""
    loaded = models.load("organism", dtype="float32")
    compared(loaded, recipes(17), tmp_path, 1e-4)
