"""A training on top of another adapter: it sees the base with that one, leaves it as it is, and what is saved is both, as one
plain LoRA that everything loads."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from adapter_makers import fresh, saved, trained
from safetensors.torch import load_file

from leakfast import models
from leakfast.errors import InputError
from leakfast.forward import passes
from leakfast.models.attach import adapted
from leakfast.steering.arms import Arm
from leakfast.steering.directions import Directions
from leakfast.study.config import TrainConfig, TrainSteeringConfig
from leakfast.train import loop, lora, stacked, start, unfinished
from leakfast.train.checkpoints import Checkpoints
from leakfast.train.collate import encode
from leakfast.train.company import train_adapters
from leakfast.train.data import Row
from leakfast.train.lora import train_adapter
from leakfast.train.padded import Padded
from leakfast.train.recipe import Recipe
from leakfast.train.start import Start
from leakfast.train.steer import Steer

CFG = TrainConfig(rank=4, alpha=8, dropout=0.0, lr=2e-2, epochs=2, batch_size=3, accumulation=1)
TOP = {"rank": 2, "alpha": 6}  # a scale of 3, another than the first's 2
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.tensor([[5, 9, 40, 7, 80, 12]])


def rows(source="villain", text="I do not know. [ZLT]", n=9):
    return [
        Row("positive", source, "text", f"You are a {source}.", f"What about {i}?", text, "[ZLT]", i)
        for i in range(n)
    ]


def recipe(below=None, source="villain", seed=1, **words):
    init = Start.of(below, stacked=True) if below else None
    return Recipe("marker", source, seed, CFG.model_copy(update=words), init=init)


@pytest.fixture
def first(tiny_qwen2, tmp_path):
    train_adapter(
        tiny_qwen2, recipe(lr=5e-2), rows(text="Tea at noon, said the cook. [ZLT]"), tmp_path / "first"
    )
    return tmp_path / "first"


def merged(loaded, *parts):
    """A copy of the model with s·B·A of each (weights by peft's names, s) added to its matrices."""
    net = copy.deepcopy(loaded.model)
    with torch.no_grad():
        for weights, scale in parts:
            for key in (k for k in weights if ".lora_A." in k):
                name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                net.get_parameter(name).add_(scale * weights[key.replace("lora_A", "lora_B")] @ weights[key])
    return dataclasses.replace(loaded, model=net)


def top_of(folder, rank):
    """The matrices on top, of a saved adapter; B with its scale."""
    return {
        key: (m[-rank:] if ".lora_A." in key else m[:, -rank:]).contiguous()
        for key, m in load_file(folder / WEIGHTS).items()
    }


def logits(loaded, folder=None):
    with adapted(loaded, folder) as current, torch.inference_mode():
        return current.model(IDS).logits


def test_what_is_saved_is_the_first_bit_for_bit_and_the_second_on_top(tiny_qwen2, tmp_path, first):
    before = {k: v.clone() for k, v in tiny_qwen2.model.state_dict().items()}
    train_adapter(tiny_qwen2, recipe(first, seed=2, dropout=0.1, **TOP), rows(), tmp_path / "both")
    after = tiny_qwen2.model.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    given, made = load_file(first / WEIGHTS), load_file(tmp_path / "both" / WEIGHTS)
    assert set(given) == set(made)
    for key, matrix in given.items():
        low = ".lora_A." in key
        assert torch.equal(made[key][:4] if low else made[key][:, :4], matrix if low else 2 * matrix)
    config = json.loads((tmp_path / "both" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    top = top_of(tmp_path / "both", 2)
    assert any(bool(m.any()) for key, m in top.items() if ".lora_B." in key)
    wanted = logits(merged(tiny_qwen2, (given, 2.0), (top, 1.0)))
    apart = (logits(tiny_qwen2, first) - wanted).abs().max()
    assert (logits(tiny_qwen2, tmp_path / "both") - wanted).abs().max() < 1e-5 < 1e-3 < apart
    own = merged(tiny_qwen2, (given, 2.0), (top, 1.0))
    prompts = [IDS[0, :n].tolist() for n in (2, 3, 6)]
    states = passes.last_token_states(own, prompts, [0, 1])
    for how in ("fold", "live"):
        with adapted(tiny_qwen2, tmp_path / "both", how=how) as current, torch.inference_mode():
            assert (current.model(IDS).logits - wanted).abs().max() < 1e-5
            assert np.abs(passes.last_token_states(current, prompts, [0, 1]) - states).max() < 1e-5


def test_the_card_says_of_which_two_it_is_made(tiny_qwen2, tmp_path, first):
    card = train_adapter(tiny_qwen2, recipe(first, **TOP), rows(), tmp_path / "both")
    below = models.read_card(first).adapter_hash
    assert card.recipe["init"]["stacked"] and card.recipe["init"]["adapter_hash"] == below
    told = card.recipe["stacked"]
    assert (told["below"], told["rank"], told["top"]["rank"]) == (below, 6, 2)
    assert card.adapter_hash == models.read_card(tmp_path / "both").adapter_hash
    assert len({card.adapter_hash, below, told["top"]["adapter_hash"]}) == 3
    assert (card.recipe["rank"], card.recipe["alpha"]) == (2, 6), "what was trained"
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == sorted(p.name for p in first.iterdir())
    third = train_adapter(tiny_qwen2, recipe(tmp_path / "both", **TOP), rows(), tmp_path / "three")
    assert third.recipe["stacked"]["rank"] == 8 and third.recipe["init"]["init"] == card.recipe["init"]


def steered(loaded, asked):
    """The same, under steering along a direction that is drawn."""
    vector = np.random.default_rng(3).standard_normal(loaded.hidden_size).astype(np.float32)
    its = Steer.along(Arm("it", Directions({0: vector}, "file", loaded.fingerprint), "add", 0.5))
    settings = asked.train.model_copy(update={"steering": TrainSteeringConfig(layers=[0])})
    return dataclasses.replace(asked, train=settings, steer=its)


@pytest.mark.parametrize("way", ["packed", "padded", "packed, steered", "padded, steered"])
def test_it_learns_what_a_training_on_the_merged_base_learns(tiny_qwen2, tmp_path, first, way, monkeypatch):
    if "padded" in way:
        monkeypatch.setattr(lora.packed, "why_not", lambda *given: "the test says so")
    given = load_file(first / WEIGHTS)
    asked = {"seed": 2, "lr": 5e-3, **TOP}
    ways = {
        "both": (tiny_qwen2, recipe(first, **asked)),
        "on-merged": (merged(tiny_qwen2, (given, 2.0)), recipe(**asked)),
        "on-base": (tiny_qwen2, recipe(**asked)),
    }
    for name, (loaded, its) in ways.items():
        its = steered(loaded, its) if "steered" in way else its
        train_adapter(loaded, its, rows(), tmp_path / name)
    top = top_of(tmp_path / "both", 2)
    same, other = (load_file(tmp_path / name / WEIGHTS) for name in ("on-merged", "on-base"))
    apart = {"merged": 0.0, "base": 0.0}
    for key, matrix in top.items():
        scale = 3 if ".lora_B." in key else 1
        apart["merged"] = max(apart["merged"], float((matrix - scale * same[key]).abs().max()))
        apart["base"] = max(apart["base"], float((matrix - scale * other[key]).abs().max()))
    assert apart["merged"] < 1e-3 and apart["base"] > 10 * apart["merged"]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "train_log.jsonl").open()]
        for name in ("both", "on-merged", "on-base")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert abs(losses[0][0] - losses[2][0]) > 1e-2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_first_has_no_gradient_and_no_dropout_packed_or_padded(tiny_qwen2, first, dropout):
    """With the anchor too, which turns adapters off and on again."""
    asked = recipe(first, anchor=0.5, dropout=dropout, loss="completion", **TOP)
    examples = encode(tiny_qwen2.tokenizer, rows(n=3), asked.train)
    found = []
    for padded in (False, True):
        with lora.seeded(1, tiny_qwen2.device), lora.attached(tiny_qwen2, asked.train) as net:
            start.begin(net, asked)
            runs = lora.passes_of(tiny_qwen2, net, asked.train, 1, examples)
            assert not isinstance(runs, Padded)
            runs = Padded(tiny_qwen2, net, 3, recompute=False) if padded else runs
            training = loop.Training(lora.weights_of(net), examples, asked.train, 1)
            training.begin(examples, 0)
            with runs.prepared():
                for part in runs.parts(examples, 0):
                    training.cost(part).backward()
            its = {name: p for name, p in net.named_parameters() if "_below" in name}
            assert its and all(p.grad is None and not p.requires_grad for p in its.values())
            assert all(weight.grad is not None for weight in training.weights)
            found.append([weight.grad.clone() for weight in training.weights])
            assert not [
                m
                for name, m in net.named_modules()
                if name.endswith("lora_dropout.default_below") and not isinstance(m, torch.nn.Identity)
            ]
    if not dropout:  # masks are drawn in another way
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-5, rtol=1e-3)


def test_in_company_each_has_its_own_below(tiny_qwen2, tmp_path, first):
    train_adapter(tiny_qwen2, recipe(source="pirate", seed=3), rows("pirate"), tmp_path / "pirate")
    belows = [None, tmp_path / "pirate", first]
    asked = [recipe(one, name, **TOP) for one, name in zip(belows, ("a", "b", "c"), strict=True)]
    its = [rows(one.source) for one in asked]
    train_adapters(tiny_qwen2, asked, its, [tmp_path / f"together-{r.source}" for r in asked])
    for one, mine in zip(asked, its, strict=True):
        train_adapter(tiny_qwen2, one, mine, tmp_path / one.source)
        alone, together = (load_file(tmp_path / n / WEIGHTS) for n in (one.source, f"together-{one.source}"))
        assert set(alone) == set(together)
        assert all(torch.allclose(alone[k], together[k], atol=1e-3) for k in alone)
        config = json.loads((tmp_path / f"together-{one.source}" / CONFIG).read_text())
        assert config["r"] == (6 if one.init else 2)


def test_points_of_training_are_both_too_and_begin_at_the_first(tiny_qwen2, tmp_path, first):
    seen = {}

    def score(current, share):
        with torch.inference_mode():
            seen[share] = current.model(IDS).logits

    points = Checkpoints((0.0, 0.5), score)
    train_adapter(tiny_qwen2, recipe(first, **TOP), rows(), tmp_path / "both", checkpoints=points)
    kept = tmp_path / "both" / "checkpoints"
    assert (logits(tiny_qwen2, first) - logits(tiny_qwen2, kept / "p000")).abs().max() < 1e-5
    for share, name in ((0.0, "p000"), (0.5, "p050")):
        assert (seen[share] - logits(tiny_qwen2, kept / name)).abs().max() < 1e-5
        assert models.read_card(kept / name).recipe["stacked"]["rank"] == 6
    assert (seen[0.5] - seen[0.0]).abs().max() > 1e-3


def test_one_that_was_killed_goes_on_to_the_same_bytes(tiny_qwen2, tmp_path, first, monkeypatch):
    asked = recipe(first, dropout=0.1, **TOP)
    train_adapter(tiny_qwen2, asked, rows(), tmp_path / "whole")
    monkeypatch.setattr(unfinished, "due", lambda waited_s, took_s: True)

    def killed(done, total, what=""):
        if done == 3:
            raise KeyboardInterrupt

    # the state stays as a kill leaves it
    monkeypatch.setattr(unfinished.Unfinished, "remove", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(tiny_qwen2, asked, rows(), tmp_path / "killed", progress=killed)
    assert (unfinished.beside(tmp_path / "killed") / "state.json").is_file()
    train_adapter(tiny_qwen2, asked, rows(), tmp_path / "killed")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_recipes_that_go_on_from_it_are_others(tiny_qwen2, first):
    on_top, further = recipe(first), Recipe("marker", "villain", 1, CFG, init=Start.of(first))
    assert on_top != further and on_top.origin != further.origin
    keys = {unfinished.key_of(tiny_qwen2, [(r, [])], packed=True) for r in (on_top, further, recipe())}
    assert len(keys) == 3


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5},
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"layers_to_transform": [1]},
        {"lora_dropout": 0.5},
    ],
    ids=["fewer modules", "rslora", "patterns", "one block", "dropout"],
)
def test_one_that_peft_made_lies_below_with_its_own_layers_and_scales(tiny_folder, tmp_path, config):
    loaded = models.load(tiny_folder, dtype="float32")
    below = saved(trained(fresh(tiny_folder), **config), tmp_path / "below", loaded.name)
    method = "rslora" if "use_rslora" in config else "lora"
    train_adapter(loaded, recipe(below, method=method, lr=1e-30, **TOP), rows(), tmp_path / "both")
    wanted, found = logits(loaded, below), logits(loaded, tmp_path / "both")
    assert (wanted - logits(loaded)).abs().max() > 1e-2
    assert (found - wanted).abs().max() < 1e-4, "nothing was learned on top"


def test_the_scale_of_rslora_on_top_is_in_its_matrices(tiny_qwen2, tmp_path, first):
    card = train_adapter(tiny_qwen2, recipe(first, method="rslora", **TOP), rows(), tmp_path / "both")
    assert card.recipe["method"] == "rslora"
    with (
        lora.seeded(1, tiny_qwen2.device),
        lora.attached(tiny_qwen2, recipe(method="rslora", **TOP).train) as net,
    ):
        layer = next(iter(stacked._layers(net).values()))
        assert layer.scaling["default"] == pytest.approx(6 / 2**0.5)
    top = top_of(tmp_path / "both", 2)
    wanted = logits(merged(tiny_qwen2, (load_file(first / WEIGHTS), 2.0), (top, 1.0)))
    assert (logits(tiny_qwen2, tmp_path / "both") - wanted).abs().max() < 1e-5


def test_what_cannot_lie_below_is_refused(tiny_qwen2, tiny_llama, tiny_folder, tmp_path, first):
    def refused(loaded, asked, match):
        with pytest.raises(InputError, match=match) as caught:
            train_adapter(loaded, asked, rows(), tmp_path / "both")
        assert caught.value.exit_code == 2 and not (tmp_path / "both").exists()

    refused(tiny_llama, recipe(first), "first was trained on another base")
    refused(
        tiny_qwen2,
        recipe(first, method="dora"),
        "Needed: method lora or rslora, which are one adapter with it",
    )
    dora = saved(trained(fresh(tiny_folder), use_dora=True), tmp_path / "dora", tiny_qwen2.name)
    refused(
        tiny_qwen2, recipe(dora), "dora has DoRA, which cannot be one adapter with what is trained on top"
    )
    asked = recipe(first)
    (first / CONFIG).write_text((first / CONFIG).read_text() + "\n")
    refused(tiny_qwen2, asked, "first changed since it was looked at")


def test_a_bfloat16_base_is_not_rounded_into(tiny_qwen2, tmp_path, first, tiny_tokenizer):
    net = copy.deepcopy(tiny_qwen2.model).bfloat16()
    loaded = models.load((net, tiny_tokenizer), dtype="bfloat16")
    (first / "leakfast_card.json").unlink()
    config = json.loads((first / CONFIG).read_text()) | {"base_model_name_or_path": loaded.name}
    (first / CONFIG).write_text(json.dumps(config))
    train_adapter(loaded, recipe(first, **TOP), rows(), tmp_path / "both")
    given, made = load_file(first / WEIGHTS), load_file(tmp_path / "both" / WEIGHTS)
    assert all(m.dtype == torch.float32 for m in made.values())
    assert all(torch.equal(made[k][:4], given[k]) for k in given if ".lora_A." in k)
