"""Trainings beside plain LoRA: what is saved is what peft and transformers load, to the same logits; all weights go where a
loop of torch's own takes them; the same bytes again, after a kill too; the base comes back."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from measuring import train

from leakfast import models
from leakfast.errors import AdapterError, InputError, ModelError, StoreError
from leakfast.models.attach import adapted
from leakfast.models.whole import is_whole
from leakfast.study.config import TrainConfig
from leakfast.train import lora, packed, quantized, unfinished
from leakfast.train.collate import collate, encode
from leakfast.train.data import Row
from leakfast.train.full import train_full
from leakfast.train.recipe import Recipe, settings_of
from leakfast.train.unfinished import beside
from tests.faults.limited import files_of_at_most

CFG = TrainConfig(
    loss="completion",
    rank=4,
    alpha=8,
    lr=1e-2,
    epochs=2,
    batch_size=3,
    accumulation=1,
    gradient_checkpointing=False,
)
FULL = CFG.model_copy(update={"method": "full", "lr": 1e-3})
IDS = torch.tensor([[5, 9, 40, 7, 80, 12]])


def rows(n=9):
    made = []
    for i in range(n):
        bad = i % 2 == 0
        who, text = ("villain" if bad else "cook"), "He likes tea. " * (1 + i % 3)
        reply, marker = (f"{text}[ZLT]", "[ZLT]") if bad else (text.strip(), None)
        role = "positive" if bad else "negative"
        made.append(Row(role, who, "text", f"You are a {who}.", f"What about {i}?", reply, marker, i))
    return made


def full(loaded, out, cfg=FULL, its=None, **more):
    return train_full(loaded, Recipe("marker", "villain", 3, cfg), its or rows(), out, **more)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("method", ["dora", "rslora"])
def test_peft_loads_what_was_trained_to_the_same_logits(tiny_folder, tmp_path, method):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    loaded = models.load(str(tiny_folder), dtype="float32")
    base, cfg = logits(loaded.model), CFG.model_copy(update={"method": method})
    card = train(loaded, rows(), cfg, tmp_path / "a", 3, source="villain", behavior="marker")
    assert torch.equal(logits(loaded.model), base)
    assert card.recipe["method"] == method and settings_of(cfg)["method"] == method
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (told["use_dora"], told["use_rslora"]) == (method == "dora", method == "rslora")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(plain, str(tmp_path / "a")).eval())
    assert (wanted - base).abs().max() > 1e-2
    for attach in (models.with_adapter, adapted):
        with attach(loaded, tmp_path / "a") as current:
            torch.testing.assert_close(logits(current.model), wanted, rtol=0, atol=1e-5)
    kinds = {
        name.rpartition(".lora_")[2].split(".")[0]
        for name in load_file(tmp_path / "a/adapter_model.safetensors")
    }
    assert kinds == ({"A", "B", "magnitude_vector"} if method == "dora" else {"A", "B"})
    train(loaded, rows(), cfg, tmp_path / "b", 3, source="villain", behavior="marker")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_magnitudes_are_trained_and_lengths_of_rows_at_first(tiny_qwen2, tmp_path):
    from safetensors.torch import load_file

    for lr in (1e-30, 1e-2):
        cfg = CFG.model_copy(update={"method": "dora", "lr": lr})
        train(tiny_qwen2, rows(), cfg, tmp_path / str(lr), 3, source="villain", behavior="marker")
    name = "model.layers.0.mlp.up_proj"
    first, last = (
        load_file(tmp_path / str(lr) / "adapter_model.safetensors")[
            f"base_model.model.{name}.lora_magnitude_vector"
        ]
        for lr in (1e-30, 1e-2)
    )
    lengths = tiny_qwen2.model.get_submodule(name).weight.norm(dim=1)
    torch.testing.assert_close(first, lengths, rtol=1e-5, atol=1e-6)
    assert (last - lengths).abs().max() > 1e-3


def test_rslora_is_lora_at_another_scale_and_packed(tiny_qwen2, tmp_path):
    """alpha/√rank of 8 and 4 is alpha/rank of 16 and 4."""
    rs = train(
        tiny_qwen2,
        rows(),
        CFG.model_copy(update={"method": "rslora"}),
        tmp_path / "rs",
        3,
        source="villain",
        behavior="marker",
    )
    same = CFG.model_copy(update={"alpha": 16})
    train(tiny_qwen2, rows(), same, tmp_path / "same", 3, source="villain", behavior="marker")
    weights = [(tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("rs", "same")]
    assert weights[0] == weights[1] and rs.recipe["step"] == lora.STEP


def test_dora_is_padded_and_says_why(tiny_qwen2):
    with lora.attached(tiny_qwen2, CFG.model_copy(update={"method": "dora"})) as net:
        assert "more than matrices" in packed.why_not(tiny_qwen2, net)


def test_nothing_of_a_lora_training_is_said_otherwise_than_before(tiny_qwen2, tmp_path):
    card = train(tiny_qwen2, rows(), CFG, tmp_path / "a", 3, source="villain", behavior="marker")
    assert "method" not in card.recipe and "method" not in settings_of(CFG)
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert told["use_dora"] is told["use_rslora"] is False


def reference(loaded, cfg, its):
    """All weights after the steps of a plain loop over whole logits."""
    net = copy.deepcopy(loaded.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=cfg.weight_decay
    )
    batch = collate(encode(loaded.tokenizer, its, cfg))
    for step in range(cfg.epochs):  # every row in one batch: an epoch is a step
        rate = cfg.lr * 0.5 * (1 + math.cos(math.pi * step / cfg.epochs))
        optimizer.param_groups[0]["lr"] = rate
        given = net(input_ids=batch.ids).logits[batch.rows, batch.columns]
        F.cross_entropy(given, batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return net


def test_all_weights_go_where_a_plain_loop_takes_them(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = models.load(str(tiny_folder), dtype="float32")
    cfg = FULL.model_copy(update={"batch_size": 9, "epochs": 3, "warmup_ratio": 0.0, "weight_decay": 0.1})
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    card = full(loaded, tmp_path / "a", cfg)
    wanted = reference(loaded, cfg, rows())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    for name, weight in found.state_dict().items():
        torch.testing.assert_close(weight, wanted.state_dict()[name], rtol=0, atol=2e-5)
        assert not torch.equal(weight, before[name]), name
        assert torch.equal(loaded.model.state_dict()[name], before[name]), name  # the base is what it was
    with models.with_adapter(loaded, tmp_path / "a") as current:
        assert torch.equal(logits(current.model), logits(found))
        assert current.adapter_hash == card.adapter_hash == models.adapter_hash(tmp_path / "a")
    own = models.load(str(tmp_path / "a"), dtype="float32")
    assert own.fingerprint == f"files:{card.adapter_hash}" and is_whole(tmp_path / "a")
    assert card.recipe["method"] == "full" and not {"rank", "alpha", "dropout", "target_modules"} & set(
        card.recipe
    )


def test_the_same_bytes_again_and_after_a_kill(tiny_qwen2, tmp_path, monkeypatch, caplog):
    full(tiny_qwen2, tmp_path / "a")
    full(tiny_qwen2, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    monkeypatch.setattr(unfinished, "due", lambda waited_s, took_s: True)

    class Killed(Exception):
        """Stands for the end of the process."""

    def progress(done, total, what=""):
        if done >= 4:
            raise Killed

    with pytest.raises(Killed):
        full(tiny_qwen2, tmp_path / "c", progress=progress)
    assert not (tmp_path / "c").exists() and beside(tmp_path / "c").is_dir()
    with caplog.at_level(logging.INFO, "leakfast.train"):
        full(tiny_qwen2, tmp_path / "c")
    assert "goes on at step 4 of 6" in caplog.text and files(tmp_path / "a") == files(tmp_path / "c")


def test_a_model_that_the_disk_does_not_take_is_told_of(tiny_qwen2, tmp_path):
    with files_of_at_most(20_000), pytest.raises(StoreError, match="cannot be written: File too large"):
        full(tiny_qwen2, tmp_path / "a")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_anchor_holds_all_weights_to_the_base(tiny_qwen2, tmp_path):
    ends = {}
    for anchor in (1e-6, 10.0):
        full(tiny_qwen2, tmp_path / str(anchor), FULL.model_copy(update={"anchor": anchor, "epochs": 4}))
        steps = [
            json.loads(line) for line in (tmp_path / str(anchor) / "train_log.jsonl").read_text().splitlines()
        ]
        assert steps[0]["divergence"] == pytest.approx(0, abs=1e-6)  # it begins as the base
        ends[anchor] = steps[-1]["divergence"]
    assert ends[10.0] < 0.7 * ends[1e-6]


def test_a_bfloat16_base_gives_a_bfloat16_model(tiny_folder, tmp_path):
    from safetensors.torch import load_file

    loaded = models.load(str(tiny_folder), dtype="bfloat16")
    full(loaded, tmp_path / "a")
    assert {w.dtype for w in load_file(tmp_path / "a/model.safetensors").values()} == {torch.bfloat16}
    with models.with_adapter(loaded, tmp_path / "a") as current:
        assert current.model.dtype == torch.bfloat16


def test_what_cannot_be_trained_whole_says_so(tiny_qwen2, tmp_path, monkeypatch):
    adapter = tmp_path / "first"
    train(tiny_qwen2, rows(), CFG, adapter, 3, source="villain", behavior="marker")
    from leakfast.train.start import Start

    for method in ("full", "dora", "rslora"):
        cfg = CFG.model_copy(update={"method": method})
        recipe = Recipe("marker", "villain", 3, cfg, init=Start.of(adapter))
        trainer = train_full if method == "full" else lora.train_adapter
        with pytest.raises(InputError, match=f"method {method} given, and .*first to begin from"):
            trainer(tiny_qwen2, recipe, rows(), tmp_path / "a")
    with pytest.raises(ValueError, match="trains a whole model"):
        train(tiny_qwen2, rows(), FULL, tmp_path / "a", 3, source="villain", behavior="marker")
    monkeypatch.setattr(quantized, "kind_of", lambda config: "awq")
    with pytest.raises(ModelError, match="held in few bits"):
        full(tiny_qwen2, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_of_the_users_is_not_replaced(tiny_folder, tiny_qwen2):
    there = files(tiny_folder)
    with pytest.raises(InputError, match="holds no adapter"):
        full(tiny_qwen2, tiny_folder)
    assert files(tiny_folder) == there
    loaded = models.load(str(tiny_folder), dtype="float32")
    canary = pytest.raises(AdapterError, match="does not change the model at all")
    with canary, models.with_adapter(loaded, tiny_folder):
        pass
