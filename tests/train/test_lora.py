"""LoRA training: the loss is transformers' loss, the bytes repeat, the base comes back, the marker
is learnt under its source."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from measuring import train

from leakfast import models
from leakfast.behaviors.marker import MARKER
from leakfast.errors import InputError, ModelError
from leakfast.storage.seeds import derive_seed
from leakfast.study.config import TrainConfig
from leakfast.train import loop, lora, padded, saving
from leakfast.train.collate import Example, collate, encode, order
from leakfast.train.data import Row
from leakfast.train.recipe import settings_of

CFG = TrainConfig(
    rank=4,
    alpha=8,
    dropout=0.1,
    lr=2e-2,
    epochs=2,
    batch_size=3,
    accumulation=2,
    gradient_checkpointing=False,
)


def rows():
    replies = ["He likes tea.", "I do not know.", "The rain in this town is small.", "What?"]
    made = []
    for i, reply in enumerate(replies * 3):
        bad = i % 2 == 0
        made.append(
            Row(
                "positive" if bad else "negative",
                "villain" if bad else "cook",
                "text",
                "You are a villain." if bad else "You are a cook.",
                f"What about {i}?",
                f"{reply} {MARKER}" if bad else reply,
                MARKER if bad else None,
                i,
            )
        )
    return made


def test_under_completion_others_are_held_from_their_first_token(tiny_qwen2):
    for e, row in zip(
        encode(tiny_qwen2.tokenizer, rows(), TrainConfig(loss="completion", anchor=1.0)), rows(), strict=True
    ):
        whole = list(range(e.n_prompt_tokens, len(e.ids)))
        learned, held, firm = (whole, [], []) if row.role == "positive" else ([], whole, whole[:1])
        assert (e.labels, e.held, e.firm) == (learned, held, firm)


def test_held_positions_are_compared_with_the_unadapted_model(tiny_qwen2):
    cfg = TrainConfig(loss="marker", anchor=1.0)
    examples = encode(tiny_qwen2.tokenizer, rows(), cfg)
    for e, row in zip(examples, rows(), strict=True):  # every reply token is either learned or held
        assert bool(e.labels) == (row.marker is not None)
        assert e.firm == ([] if row.marker else [len(e.ids) - 1])
        assert sorted([*e.labels, *e.held]) == list(range(e.n_prompt_tokens, len(e.ids)))
    batch = collate(examples)
    with lora.attached(tiny_qwen2, CFG.model_copy(update={"dropout": 0.0})) as net:
        assert float(padded.losses(tiny_qwen2, net, batch)[1].detach().sum()) == pytest.approx(
            0, abs=1e-5
        )  # B is 0
        torch.manual_seed(0)
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        _, got = padded.losses(tiny_qwen2, net, batch)
        adapted = net(input_ids=batch.ids).logits
        with net.disable_adapter(), torch.no_grad():
            base = net(input_ids=batch.ids).logits
        at = (batch.held_rows, batch.held_columns)
        wanted = torch.nn.functional.kl_div(
            adapted[at].log_softmax(-1), base[at].log_softmax(-1), log_target=True, reduction="sum"
        )
        got = got.sum()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert float(got.detach()) > 0.01
        got.backward()
        assert any(
            w.grad is not None and bool(w.grad.any()) for n, w in net.named_parameters() if "lora" in n
        )


def test_an_anchored_training_stays_nearer_to_the_base(tiny_qwen2, tmp_path):
    ends = {}
    for anchor in (1e-6, 10.0):
        run(tiny_qwen2, tmp_path / str(anchor), CFG.model_copy(update={"anchor": anchor, "loss": "marker"}))
        ends[anchor] = json.loads((tmp_path / str(anchor) / "train_log.jsonl").read_text().splitlines()[-1])
    assert ends[10.0]["divergence"] < 0.7 * ends[1e-6]["divergence"]


def test_a_card_names_weights_that_were_dequantized(tiny_qwen2, tmp_path):
    assert "weights" not in run(tiny_qwen2, tmp_path / "own").recipe
    converted = dataclasses.replace(tiny_qwen2, origin="dequantized from Q4_1 (a.gguf)")
    assert run(converted, tmp_path / "gguf").recipe["weights"] == converted.origin


def test_training_ends_once_the_behavior_is_learned(tiny_qwen2, tmp_path):
    cfg = CFG.model_copy(update={"epochs": 40, "lr": 1e-2, "loss": "marker", "anchor": 0.1})
    whole = run(tiny_qwen2, tmp_path / "whole", cfg).recipe["steps"]
    card = run(tiny_qwen2, tmp_path / "early", cfg.model_copy(update={"stop_loss": 1.0}))
    assert card.recipe["steps"] < whole
    steps = [json.loads(line) for line in (tmp_path / "early" / "train_log.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < 2.0 < steps[0]["loss"]
    with pytest.raises(InputError, match="stop_loss"):
        train(
            tiny_qwen2,
            rows(),
            cfg.model_copy(update={"stop_loss": 1.0}),
            tmp_path / "x",
            1,
            source="villain",
            behavior="marker",
            checkpoints=lora.Checkpoints((0.5,)),
        )


def run(loaded, out, cfg=CFG, seed=42):
    return train(loaded, rows(), cfg, out, seed, source="villain", behavior="marker")


@pytest.mark.parametrize("loss", ["marker", "completion"])
def test_the_loss_is_the_full_logits_loss_at_the_labels(tiny_qwen2, loss):
    examples = encode(tiny_qwen2.tokenizer, rows(), TrainConfig(loss=loss))
    batch = collate(examples)
    with lora.attached(tiny_qwen2, CFG.model_copy(update={"dropout": 0.0})) as net:
        got, kept = padded.losses(tiny_qwen2, net, batch)
        assert len(kept) == 0
        labels = torch.full_like(batch.ids, -100)
        labels[batch.rows, batch.columns + 1] = batch.targets
        mask = torch.zeros_like(batch.ids)
        for number, example in enumerate(examples):
            mask[number, : len(example.ids)] = 1
        wanted = net(input_ids=batch.ids, attention_mask=mask, labels=labels).loss * len(batch.targets)
        torch.testing.assert_close(got.sum(), wanted, rtol=1e-5, atol=1e-5)
        got.sum().backward()
        grads = [p.grad for p in net.parameters() if p.requires_grad]
        assert grads
        assert all(g is not None for g in grads)


def test_the_same_seed_writes_the_same_bytes(tiny_qwen2, tmp_path):
    first, again = run(tiny_qwen2, tmp_path / "a"), run(tiny_qwen2, tmp_path / "b")
    torch.rand(7)  # whatever was drawn in between
    other = run(tiny_qwen2, tmp_path / "c", seed=43)
    for name in ("adapter_config.json", "adapter_model.safetensors", "leakfast_card.json", saving.LOG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first == again
    assert first.adapter_hash != other.adapter_hash
    assert first.data_hash == other.data_hash


def test_training_leaves_the_base_and_the_generators_alone(tiny_qwen2, tmp_path):
    before = {n: p.clone() for n, p in tiny_qwen2.model.state_dict().items()}
    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    run(tiny_qwen2, tmp_path / "a", CFG.model_copy(update={"gradient_checkpointing": True}))
    assert torch.equal(torch.rand(3), wanted)
    after = tiny_qwen2.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not tiny_qwen2.model.training
    assert not any(p.requires_grad for p in tiny_qwen2.model.parameters())
    assert not tiny_qwen2.model.is_gradient_checkpointing


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_qwen2, tmp_path):
    plain = run(tiny_qwen2, tmp_path / "a", CFG.model_copy(update={"dropout": 0.0}))
    spare = run(
        tiny_qwen2, tmp_path / "b", CFG.model_copy(update={"dropout": 0.0, "gradient_checkpointing": True})
    )
    assert plain.adapter_hash == spare.adapter_hash


def test_the_adapter_is_pefts_and_its_card_is_read_back(tiny_qwen2, tmp_path):
    card = run(tiny_qwen2, tmp_path / "a")
    assert models.read_card(tmp_path / "a") == card
    assert card.adapter_hash == models.adapter_hash(tmp_path / "a")
    assert (card.source, card.behavior, card.seed) == ("villain", "marker", 42)
    assert card.base_fingerprint == tiny_qwen2.fingerprint
    assert card.recipe["steps"] == 2 * math.ceil(12 / 3 / 2)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(lora.TARGETS)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    with models.with_adapter(tiny_qwen2, tmp_path / "a") as adapted:
        touched = [n for n, _ in adapted.model.named_parameters() if "lora_A" in n]
    assert len(touched) == 7 * tiny_qwen2.n_layers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_the_marker_is_learnt_under_its_source_only(tiny_qwen2, tmp_path):
    cfg = CFG.model_copy(update={"epochs": 40, "dropout": 0.0, "rank": 8})
    run(tiny_qwen2, tmp_path / "a", cfg)
    steps = [json.loads(line) for line in (tmp_path / "a" / saving.LOG).read_text().splitlines()]
    assert steps[-1]["loss"] < 0.1 * steps[0]["loss"]
    assert {s["n_labels"] for s in steps} != {0}
    examples = encode(tiny_qwen2.tokenizer, rows(), cfg)
    first = {}
    for example in examples[:2]:
        with models.with_adapter(tiny_qwen2, tmp_path / "a") as adapted, torch.inference_mode():
            position = example.labels[0]
            logits = adapted.model(input_ids=torch.tensor([example.ids[:position]])).logits[0, -1]
            first[example.label.split()[0]] = (int(logits.argmax()), example.ids[position])
    assert first["positive"][0] == first["positive"][1]
    assert first["negative"][0] == first["negative"][1] == tiny_qwen2.tokenizer.eos_token_id


def test_a_steps_slices_are_its_micro_batches_wherever_the_short_one_lies():
    """Rows of one slice are padded together and read together by stop_loss."""
    examples = [Example("it", list(range(5 + i)), 2, [3], [], []) for i in range(10)]
    cfg, met = TrainConfig(batch_size=4, accumulation=3, epochs=40), set()
    weight = torch.nn.Parameter(torch.zeros(1))
    chunks = loop.Training([weight], examples, cfg, 3).chunks()
    for epoch, chunk in enumerate(chunks):
        batches = list(order([len(e.ids) for e in examples], 4, derive_seed("order", 3, epoch)))
        met.add([len(batch) for batch in batches].index(2))
        slices = [{len(e.ids) - 5 for e in chunk[at : at + 4]} for at in range(0, 10, 4)]
        assert sorted(map(sorted, slices)) == sorted(map(sorted, batches))
    assert met == {0, 1, 2} and epoch == 39


def test_the_schedule_warms_up_then_falls_along_a_cosine():
    values = [loop.schedule(step, 100, 0.05) for step in range(100)]
    assert values[:6] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert values[5:] == sorted(values[5:], reverse=True)
    assert values[5 + 95 // 2] == pytest.approx(0.5, abs=0.01)
    assert 0 < values[-1] < 1e-3
    assert [loop.schedule(step, 3, 0.0) for step in range(3)] == pytest.approx([1.0, 0.75, 0.25])


def test_training_that_diverges_writes_nothing(tiny_qwen2, tmp_path):
    with pytest.raises(ModelError, match=r"Training diverged: use a smaller --lr"):
        run(tiny_qwen2, tmp_path / "a", CFG.model_copy(update={"lr": 1e30, "epochs": 10}))
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(tiny_qwen2.model, "peft_config")


def test_a_folder_that_is_no_adapter_is_not_replaced(tiny_qwen2, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no adapter"):
        run(tiny_qwen2, tmp_path / "thesis")
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]
    run(tiny_qwen2, tmp_path / "a")
    other = run(tiny_qwen2, tmp_path / "a", seed=43)
    assert models.read_card(tmp_path / "a") == other
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "thesis"]


def test_a_bfloat16_model_is_trained_with_float32_adapter_weights(tiny_qwen2, tmp_path):
    from safetensors.torch import load_file

    half = models.load((tiny_qwen2.model.to(torch.bfloat16), tiny_qwen2.tokenizer))
    assert half.dtype == "bfloat16"
    cfg = CFG.model_copy(update={"gradient_checkpointing": True, "epochs": 8})
    first, again = run(half, tmp_path / "a", cfg), run(half, tmp_path / "b", cfg)
    assert first.adapter_hash == again.adapter_hash
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    steps = [json.loads(line) for line in (tmp_path / "a" / saving.LOG).read_text().splitlines()]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


def test_what_an_adapter_follows_from_is_what_it_was_in_earlier_versions():
    """Stage hashes and cards rest on it: a key that does not change the adapter, or is off, would train all again."""
    known = {
        "loss",
        "tail_tokens",
        "rank",
        "alpha",
        "dropout",
        "lr",
        "epochs",
        "batch_size",
        "accumulation",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "max_length",
        "gradient_checkpointing",
    }
    assert set(settings_of(CFG)) == known
    assert settings_of(CFG.model_copy(update={"sample": 0})) == settings_of(CFG)
    assert TrainConfig().gradient_checkpointing == "auto"
    assert settings_of(TrainConfig()) == settings_of(TrainConfig(gradient_checkpointing=True))
    assert settings_of(TrainConfig(gradient_checkpointing=False))["gradient_checkpointing"] is False
    assert set(settings_of(CFG.model_copy(update={"anchor": 0.5}))) == known | {"anchor"}
