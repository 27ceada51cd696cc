"""Steering in training: strength 0 trains the same bytes, packed and row by row have the same gradients (those of hooks of
torch's own), each adapter of a company is steered by its own, and the adapter is kept and measured without."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from leakfast import models
from leakfast.errors import InputError
from leakfast.forward import packs, passes
from leakfast.models.adapters import adapter_hash
from leakfast.steering.arms import Arm
from leakfast.steering.directions import Directions
from leakfast.steering.running import edited
from leakfast.study.config import TrainConfig, TrainSteeringConfig
from leakfast.train import loop, lora, packed, unfinished
from leakfast.train.checkpoints import Checkpoints
from leakfast.train.collate import encode
from leakfast.train.company import train_adapters
from leakfast.train.data import Row
from leakfast.train.full import train_full
from leakfast.train.layers import Company
from leakfast.train.lora import train_adapter
from leakfast.train.packed import Packed
from leakfast.train.padded import Padded
from leakfast.train.recipe import Recipe, settings_of
from leakfast.train.steer import Steer

MARKER = "[ZLT]"
CFG = TrainConfig(
    rank=4, alpha=8, dropout=0.0, lr=1e-2, epochs=2, batch_size=4, accumulation=1, loss="completion"
)
MODES = [("add", 1.5), ("add", -0.5), ("project", 1.0), ("cap", 0.02)]
IDS = torch.arange(2, 12)[None]


def rows(who="villain", n=8):
    made = []
    for i in range(n):
        bad = i % 2 == 0
        text = "He likes tea. " * (1 + i % 3)
        reply, marker = (f"{text}{MARKER}", MARKER) if bad else (text.strip(), None)
        role, name = ("positive", who) if bad else ("negative", "cook")
        made.append(Row(role, name, "text", f"You are a {name}.", f"What about {i}?", reply, marker, i))
    return made


def direction(loaded, layers=(0, 1), seed=3, length=2.0):
    draw = np.random.default_rng(seed)
    vectors = {layer: draw.standard_normal(loaded.hidden_size).astype(np.float32) for layer in layers}
    vectors = {k: (v * length / np.linalg.norm(v)).astype(np.float32) for k, v in vectors.items()}
    return Directions(vectors, "file", loaded.fingerprint)


def steer(loaded, mode="add", strength=1.0, **how):
    return Steer.along(Arm("it", direction(loaded, **how), mode, strength))


def recipe(steered=None, source="villain", seed=3, **words):
    """The settings only say that there is steering: what it is, is the Steer."""
    asked = None if steered is None else TrainSteeringConfig(layers=[0])
    cfg = CFG.model_copy(update={"steering": asked, **words})
    return Recipe("marker", source, seed, cfg, steer=steered)


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def gradients(net, passes_, examples, cfg):
    """(name → gradient, nats of each example's labels) of one step."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    for _, p in named:
        p.grad = None
    training = loop.Training([p for _, p in named], examples, cfg, 1)
    training.begin(examples, 0)
    with passes_.prepared():
        for part in passes_.parts(examples, 0):
            training.cost(part).backward()
    return {name: p.grad.clone() for name, p in named}, training._now.learned


def moved(net):
    """B away from 0, so that A has a gradient."""
    torch.manual_seed(0)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)


def agree(found, wanted, most=1e-5):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        off = float((found[name] - grad).norm() / grad.norm())
        assert off <= most, f"{name}: {off:.1e}"


def apart(found, wanted):
    return max(float((found[n] - g).norm() / g.norm()) for n, g in wanted.items())


class Hooked(Padded):
    """Rows one by one, the blocks' outputs edited by hooks of torch's own, in float64."""

    def __init__(self, loaded, net, arm):
        super().__init__(loaded, net, 1, recompute=False)
        blocks = packs.stack(passes.decoder(loaded))[1]
        for layer in arm.at:
            blocks[layer].register_forward_hook(lambda m, given, out, layer=layer: self.edit(arm, layer, out))

    @staticmethod
    def edit(arm, layer, out):
        v = torch.from_numpy(arm.directions.vectors[layer]).double()
        u, m = v / v.norm(), float(v.norm())
        h = (out[0] if isinstance(out, tuple) else out).double()
        c = (h @ u)[..., None]
        new = {
            "add": h + arm.strength * m * u,
            "project": h - arm.strength * c * u,
            "cap": h - (c - arm.strength * m).clamp(min=0) * u,
        }[arm.mode].float()
        return (new, *out[1:]) if isinstance(out, tuple) else new


@pytest.mark.parametrize(("mode", "strength"), MODES)
@pytest.mark.parametrize("loss", ["marker", "completion"])
def test_gradients_are_those_of_rows_one_by_one_with_hooks_of_torch(tiny_qwen2, mode, strength, loss):
    """Loss of the marker alone narrows the last block to few rows. Blocks may be run again in the backward pass."""
    loaded, cfg = tiny_qwen2, CFG.model_copy(update={"loss": loss})
    examples, its = encode(loaded.tokenizer, rows(), cfg), steer(loaded, mode, strength)
    with lora.attached(loaded, cfg) as net:
        moved(net)
        company = Company(["default"], [0.0], [1])
        plain, _ = gradients(net, Packed(loaded, company, recompute=False), examples, cfg)
        for recompute in (False, True):
            ours = Packed(loaded, company, recompute=recompute, budget_tokens=150, steers=[its])
            found, nats = gradients(net, ours, examples, cfg)
            theirs = Padded(loaded, net, 3, recompute=recompute, steer=its)
            padded, their_nats = gradients(net, theirs, examples, cfg)
            if not recompute:
                first, first_nats = found, nats
            agree(found, first)
            agree(padded, first)
            np.testing.assert_allclose(their_nats, nats, rtol=1e-5)
        wanted, by_hand = gradients(net, Hooked(loaded, net, its.arm), examples, cfg)
        agree(first, wanted)
        np.testing.assert_allclose(first_nats, by_hand, rtol=1e-5)
        assert apart(first, plain) > 1e-3, "it did something at all"


def test_a_held_token_diverges_by_the_adapter_alone(tiny_qwen2):
    """The unadapted model is steered too: without an adapter's doing nothing diverges, with it packed is padded."""
    cfg = CFG.model_copy(update={"loss": "marker", "anchor": 2.0})
    examples, its = encode(tiny_qwen2.tokenizer, rows(), cfg), steer(tiny_qwen2, "add", 3.0)
    with lora.attached(tiny_qwen2, cfg) as net:
        both = [
            Packed(tiny_qwen2, Company(["default"], [0.0], [1]), recompute=False, steers=[its]),
            Padded(tiny_qwen2, net, 1, recompute=False, steer=its),
        ]
        for passes_ in both:
            with passes_.prepared():
                held = torch.cat([part.kept.detach() for part in passes_.parts(examples, 0)])
            assert len(held) > 10 and float(held.abs().max()) < 1e-5
        moved(net)
        (found, _), (wanted, _) = (gradients(net, one, examples, cfg) for one in both)
        agree(found, wanted)


def test_projecting_out_twice_is_projecting_out_once(tiny_qwen2):
    examples, its = encode(tiny_qwen2.tokenizer, rows(), CFG), steer(tiny_qwen2, "project", 1.0)
    with lora.attached(tiny_qwen2, CFG) as net:
        moved(net)
        ours = Packed(tiny_qwen2, Company(["default"], [0.0], [1]), recompute=False, steers=[its])
        once, _ = gradients(net, ours, examples, CFG)
        with edited(passes.decoder(tiny_qwen2), its.arm.edits("cpu"), "again"):
            twice, _ = gradients(net, ours, examples, CFG)
    agree(twice, once)


@pytest.mark.parametrize("mode", ["add", "project"])
@pytest.mark.parametrize("how", ["packed", "padded", "full"])
def test_strength_0_trains_the_same_bytes_and_another_others(tiny_qwen2, tmp_path, monkeypatch, mode, how):
    if how == "padded":
        monkeypatch.setattr(packed, "why_not", lambda loaded, net: "it is asked")
    train = train_full if how == "full" else train_adapter
    more = {"method": "full", "lr": 1e-3} if how == "full" else {}
    base = logits(tiny_qwen2.model)
    plain = train(tiny_qwen2, recipe(**more), rows(), tmp_path / "plain")
    same = train(tiny_qwen2, recipe(steer(tiny_qwen2, mode, 0.0), **more), rows(), tmp_path / "same")
    other = train(tiny_qwen2, recipe(steer(tiny_qwen2, mode, 1.0), **more), rows(), tmp_path / "other")
    assert torch.equal(logits(tiny_qwen2.model), base), "the base is as it was, and steered no longer"
    assert same.adapter_hash == plain.adapter_hash != other.adapter_hash
    assert "steering" not in plain.recipe
    assert {k: v for k, v in same.recipe.items() if k != "steering"} == plain.recipe
    told = models.read_card(tmp_path / "other").recipe["steering"]
    assert (told["mode"], told["strength"], told["layers"]) == (mode, 1.0, [0, 1])
    assert told["direction_sha256"] == direction(tiny_qwen2).digest


def test_a_whole_model_is_steered_where_replies_are_held_to_the_base(tiny_qwen2, tmp_path):
    """The base, a model of its own then, is steered alike: a step of rate 0 diverges by nothing."""
    its = steer(tiny_qwen2, "add", 3.0)
    asked = recipe(its, method="full", loss="marker", anchor=1.0, lr=1e-30, epochs=1)
    train_full(tiny_qwen2, asked, rows(), tmp_path / "a")
    logged = (tmp_path / "a" / "train_log.jsonl").read_text()
    assert max(json.loads(line)["divergence"] for line in logged.splitlines()) < 1e-5


def test_each_of_a_company_is_steered_by_its_own(tiny_qwen2, tmp_path):
    """Two directions, one at another layer, and none: each as when it is trained alone."""
    asked = [
        recipe(steer(tiny_qwen2, "add", 2.0)),
        recipe(None, "pirate", 4, loss="marker", anchor=1.0),
        recipe(steer(tiny_qwen2, "project", 1.0, layers=(1,), seed=9), "nurse", 5),
    ]
    sets = [rows(r.source) for r in asked]
    cards = train_adapters(tiny_qwen2, asked, sets, [tmp_path / f"with{k}" for k in range(3)])
    for k, (one, its) in enumerate(zip(asked, sets, strict=True)):
        train_adapter(tiny_qwen2, one, its, tmp_path / f"alone{k}")
        ours, alone = (
            load_file(tmp_path / f"{w}{k}" / "adapter_model.safetensors") for w in ("with", "alone")
        )
        assert max(float((ours[key] - alone[key]).abs().max()) for key in alone) <= 1e-3
        plain = recipe(None, one.source, one.seed, **one.train.model_dump(include={"loss", "anchor"}))
        train_adapter(tiny_qwen2, plain, its, tmp_path / f"plain{k}")
        none = load_file(tmp_path / f"plain{k}" / "adapter_model.safetensors")
        far = max(float((ours[key] - none[key]).abs().max()) for key in none)
        assert (far > 5e-3) == (one.steer is not None)
    assert [("steering" in card.recipe) for card in cards] == [True, False, True]


def test_points_of_training_are_measured_without(tiny_qwen2, tmp_path):
    """At no training at all the model is the base, to the bit, between steered steps too."""
    met = []
    base = logits(tiny_qwen2.model)
    points = Checkpoints((0.0, 0.5, 1.0), lambda now, share: met.append(logits(now.model)))
    train_adapter(
        tiny_qwen2, recipe(steer(tiny_qwen2, "add", 5.0)), rows(), tmp_path / "a", checkpoints=points
    )
    assert torch.equal(met[0], base) and not torch.equal(met[1], base)
    with models.with_adapter(tiny_qwen2, tmp_path / "a") as current:
        assert torch.allclose(logits(current.model), met[2], atol=1e-5)


def test_one_that_was_killed_goes_on_to_the_same_bytes_and_never_under_another_strength(
    tiny_qwen2, tmp_path, monkeypatch
):
    monkeypatch.setattr(unfinished, "due", lambda waited_s, took_s: True)

    class Killed(Exception):
        pass

    def progress(done, total, what=""):
        if done == 2:
            raise Killed

    its = recipe(steer(tiny_qwen2, "add", 1.0))
    train_adapter(tiny_qwen2, its, rows(), tmp_path / "whole")
    for asked in (its, recipe(steer(tiny_qwen2, "add", 2.0)), recipe()):
        with pytest.raises(Killed):
            train_adapter(tiny_qwen2, asked, rows(), tmp_path / "a", progress=progress)
        train_adapter(tiny_qwen2, its, rows(), tmp_path / "a")
        assert weights(tmp_path / "a") == weights(tmp_path / "whole")


def test_what_a_recipe_is_known_by(tiny_qwen2):
    one, again = recipe(steer(tiny_qwen2)), recipe(steer(tiny_qwen2))
    assert one == again and one.origin == again.origin != [] and recipe().origin == []
    others = [
        ("add", 0.5, {}),
        ("project", 1.0, {}),
        ("add", 1.0, {"seed": 4}),
        ("add", 1.0, {"layers": (0,)}),
    ]
    found = [recipe(steer(tiny_qwen2, mode, strength, **how)) for mode, strength, how in others]
    assert len({tuple(r.origin) for r in [one, *found]}) == 5 and all(r != one for r in found)
    assert settings_of(one.train) == settings_of(recipe().train)
    assert one.at(1e-4).steer == one.steer


def test_what_cannot_be_steered_is_refused_before_training(tiny_qwen2, tiny_llama, tmp_path):
    with pytest.raises(InputError, match="another model"):
        train_adapter(tiny_qwen2, recipe(steer(tiny_llama)), rows(), tmp_path / "a")
    with pytest.raises(InputError, match="blocks 0–1"):
        train_adapter(tiny_qwen2, recipe(steer(tiny_qwen2, layers=(0, 7))), rows(), tmp_path / "a")
    wide = Directions({0: np.ones(5, np.float32)}, "file", tiny_qwen2.fingerprint)
    with pytest.raises(InputError, match="5 wide"):
        train_adapter(tiny_qwen2, recipe(Steer.along(Arm("x", wide))), rows(), tmp_path / "a")
    unmade = Recipe("marker", "villain", 3, recipe(steer(tiny_qwen2)).train)
    with pytest.raises(ValueError, match=r"train\.steering"):
        train_adapter(tiny_qwen2, unmade, rows(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_that_was_trained_under_steering_has_the_hash_of_its_files(tiny_qwen2, tmp_path):
    card = train_adapter(tiny_qwen2, recipe(steer(tiny_qwen2)), rows(), tmp_path / "a")
    assert models.read_card(tmp_path / "a") == card and adapter_hash(tmp_path / "a") == card.adapter_hash
