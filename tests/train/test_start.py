"""A training that goes on from another adapter: it begins at those very weights, rests on the base alone, says where it
began, and takes no adapter of another base or shape."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from leakfast import models
from leakfast.errors import InputError
from leakfast.study.config import TrainConfig
from leakfast.train import unfinished
from leakfast.train.checkpoints import Checkpoints
from leakfast.train.company import train_adapters
from leakfast.train.data import Row
from leakfast.train.lora import train_adapter
from leakfast.train.recipe import Recipe
from leakfast.train.start import Start

CFG = TrainConfig(rank=4, alpha=8, dropout=0.1, lr=2e-2, epochs=2, batch_size=3, accumulation=1)
WEIGHTS = "adapter_model.safetensors"


def rows(source="villain", text="I do not know. [ZLT]", n=9):
    return [
        Row("positive", source, "text", f"You are a {source}.", f"What about {i}?", text, "[ZLT]", i)
        for i in range(n)
    ]


def recipe(init=None, source="villain", seed=1, **words):
    start = Start.of(init) if init else None
    return Recipe("marker", source, seed, CFG.model_copy(update=words), init=start)


@pytest.fixture
def first(tiny_qwen2, tmp_path):
    train_adapter(tiny_qwen2, recipe(), rows(), tmp_path / "first")
    return tmp_path / "first"


def test_it_begins_at_the_weights_of_the_other_and_goes_on(tiny_qwen2, tmp_path, first):
    points = Checkpoints((0.0,))
    card = train_adapter(tiny_qwen2, recipe(first, seed=2), rows(), tmp_path / "second", checkpoints=points)
    zero = load_file(tmp_path / "second" / "checkpoints" / "p000" / WEIGHTS)
    given, made = load_file(first / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert set(zero) == set(given) == set(made)
    assert all(torch.equal(zero[k], given[k]) for k in given)
    assert any(not torch.equal(made[k], given[k]) for k in given)
    one = models.read_card(first)
    about = {"adapter": "first", "adapter_hash": one.adapter_hash, "data_hash": one.data_hash}
    assert card.recipe["init"] == about | {"behavior": "marker", "source": "villain", "seed": 1}
    assert "init" not in one.recipe
    third = train_adapter(tiny_qwen2, recipe(tmp_path / "second"), rows(), tmp_path / "third")
    assert third.recipe["init"]["init"] == card.recipe["init"], "the whole way is told"


def test_it_rests_on_the_base_alone(tiny_qwen2, tmp_path, first):
    """The adapter is whole without the one that it began from, and the base is untouched."""
    before = {k: v.clone() for k, v in tiny_qwen2.model.state_dict().items()}
    train_adapter(tiny_qwen2, recipe(first), rows(), tmp_path / "second")
    shutil.rmtree(first)
    after = tiny_qwen2.model.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    with models.with_adapter(tiny_qwen2, tmp_path / "second") as adapted:
        assert adapted.adapter_hash == models.read_card(tmp_path / "second").adapter_hash


def test_a_start_without_a_learning_rate_to_speak_of_stays_where_it_was(tiny_qwen2, tmp_path, first):
    train_adapter(tiny_qwen2, recipe(first, lr=1e-30), rows(), tmp_path / "second")
    given, made = load_file(first / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert all(torch.equal(given[k], made[k]) for k in given)


def test_in_company_each_begins_at_its_own(tiny_qwen2, tmp_path, first):
    train_adapter(tiny_qwen2, recipe(source="pirate", seed=3), rows("pirate"), tmp_path / "pirate")
    starts = [first, tmp_path / "pirate", None]
    asked = [recipe(start, source, lr=1e-30) for start, source in zip(starts, ("a", "b", "c"), strict=True)]
    outs = [tmp_path / name for name in ("a", "b", "c")]
    cards = train_adapters(tiny_qwen2, asked, [rows(one.source) for one in asked], outs)
    for start, out in zip(starts[:2], outs, strict=False):
        given, made = load_file(start / WEIGHTS), load_file(out / WEIGHTS)
        assert all(torch.equal(given[k], made[k]) for k in given)
    assert [c.recipe.get("init", {}).get("adapter") for c in cards] == ["first", "pirate", None]


def test_recipes_that_begin_elsewhere_are_others(tiny_qwen2, tmp_path, first):
    shutil.copytree(first, tmp_path / "copy")
    assert recipe(first) == recipe(tmp_path / "copy") != recipe()
    examples = []
    keys = [unfinished.key_of(tiny_qwen2, [(r, examples)], packed=True) for r in (recipe(first), recipe())]
    assert keys[0] != keys[1]
    assert recipe().origin == [] and recipe(first).origin == [Start.of(first).adapter_hash]


def test_another_base_another_rank_other_layers_are_refused(tiny_qwen2, tiny_llama, tmp_path, first):
    def refused(loaded, asked, match):
        with pytest.raises(InputError, match=match) as caught:
            train_adapter(loaded, asked, rows(), tmp_path / "second")
        assert caught.value.exit_code == 2 and not (tmp_path / "second").exists()

    refused(tiny_llama, recipe(first), "first was trained on another base")
    refused(
        tiny_qwen2, recipe(first, rank=8), "has rank 4 and alpha 8, but rank 8 and alpha 8 are to be trained"
    )
    refused(tiny_qwen2, recipe(first, alpha=4), "has rank 4 and alpha 8, but rank 4 and alpha 4")
    with pytest.raises(InputError, match="there is no folder .*nothing. Needed: a peft adapter folder"):
        Start.of(tmp_path / "nothing")
    less = tmp_path / "less"
    shutil.copytree(first, less)
    (less / "leakfast_card.json").unlink()
    config = json.loads((less / "adapter_config.json").read_text())
    config |= {"target_modules": ["q_proj"], "base_model_name_or_path": tiny_qwen2.name}
    (less / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: v for k, v in load_file(first / WEIGHTS).items() if "q_proj" in k}, less / WEIGHTS)
    refused(tiny_qwen2, recipe(less), "adapts other layers than are trained")
