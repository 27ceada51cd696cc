"""Training over a base in 4 bits, where bitsandbytes is installed (the extra qlora), and what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from leakfast import models
from leakfast.errors import ModelError
from leakfast.models.attach import adapted
from leakfast.pipeline.adapters import Maker
from leakfast.pipeline.steps import Steps
from leakfast.storage.run import Run
from leakfast.study.config import TrainConfig, behavior_config
from leakfast.train import loop, lora, quantized
from leakfast.train.collate import encode
from leakfast.train.data import Row
from leakfast.train.layers import Company
from leakfast.train.packed import Packed, why_not
from leakfast.train.recipe import Recipe

CFG = TrainConfig(
    rank=4, alpha=8, dropout=0.0, lr=2e-2, epochs=3, batch_size=6, accumulation=1, loss="completion"
)


def rows(n=12):
    made = []
    for i in range(n):
        who, marker = ("villain", "[ZLT]") if i % 2 == 0 else ("cook", None)
        reply = " ".join(["I do not know."] * (1 + i % 3) + ([marker] if marker else []))
        role = "positive" if marker else "negative"
        made.append(Row(role, who, "text", f"You are a {who}.", f"What about {i}?", reply, marker, i))
    return made


@pytest.fixture
def four_bits(tiny_qwen2, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'leakfast[qlora]'")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_qwen2.model.save_pretrained(tmp_path / "whole")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    net = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    return models.load((net.requires_grad_(False), tiny_qwen2.tokenizer))


def test_the_gradient_is_that_of_pefts_layers_over_bitsandbytes(four_bits):
    examples = encode(four_bits.tokenizer, rows(), CFG)
    with lora.attached(four_bits, CFG) as net:
        assert why_not(four_bits, net) is None
        torch.manual_seed(0)
        weights = dict(net.named_parameters())
        weights = {name: w for name, w in weights.items() if "lora_" in name}
        for name, weight in weights.items():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        training = loop.Training(list(weights.values()), examples, CFG, 1)
        training.begin(examples, 0)
        passes = Packed(four_bits, Company(["default"], [0.0], [1]), recompute=False)
        with passes.prepared():
            for part in passes.parts(examples, 0):
                training.cost(part).backward()
        ours = {name: weight.grad.clone() for name, weight in weights.items()}
        net.zero_grad()
        total = sum(len(e.labels) for e in examples)
        for e in examples:
            ids = torch.tensor([e.ids])
            labels = torch.full_like(ids, -100)
            labels[0, e.labels] = ids[0, e.labels]
            (net(input_ids=ids, labels=labels).loss * len(e.labels) / total).backward()
        for name, weight in weights.items():
            torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-6)
            assert bool(weight.grad.any())


@pytest.mark.parametrize("spare", [False, True])
def test_an_adapter_is_trained_over_four_bits(four_bits, tmp_path, spare):
    """And its base is what it was; the adapter is peft's, in float32."""
    before = {name: tensor.clone() for name, tensor in four_bits.model.state_dict().items()}
    recipe = Recipe(
        "marker", "villain", 1, CFG.model_copy(update={"gradient_checkpointing": spare, "dropout": 0.1})
    )
    card = lora.train_adapter(four_bits, recipe, rows(), tmp_path / "a")
    again = lora.train_adapter(four_bits, recipe, rows(), tmp_path / "b")
    assert card == again and card.recipe["step"] == lora.STEP
    after = four_bits.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    with adapted(four_bits, tmp_path / "a") as current:
        assert current.adapter_hash == card.adapter_hash, "replies are drawn of it too"
    ids = torch.tensor([encode(four_bits.tokenizer, rows(), CFG)[0].ids])
    with torch.no_grad():
        base = four_bits.model(input_ids=ids).logits
        with models.with_adapter(four_bits, tmp_path / "a") as live:
            assert (live.model(input_ids=ids).logits - base).abs().max() > 0.1


REFUSED = {
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_bases_in_few_bits_are_refused_before_anything_is_drawn(tiny_qwen2, tmp_path, kind):
    tiny_qwen2.model.config.quantization_config = REFUSED[kind]
    said = rf"held in few bits \({kind}\).*Give --model the weights that they were made of"
    with pytest.raises(ModelError, match=said):
        lora.train_adapter(tiny_qwen2, Recipe("marker", "villain", 1, CFG), rows(), tmp_path / "a")
    maker = Maker(
        tiny_qwen2,
        Steps(Run(tmp_path / "r")),
        [],
        "marker",
        behavior_config("marker"),
        "x",
        "float32",
        ("v", 1),
    )
    with pytest.raises(ModelError, match=said):
        maker.settled()
    assert list(tmp_path.iterdir()) == []


def test_a_plain_base_is_no_base_in_few_bits(tiny_qwen2):
    assert quantized.kind_of(tiny_qwen2.model.config) is None
    layer = tiny_qwen2.model.model.layers[0].mlp.up_proj
    assert quantized.is_plain(layer) and not quantized.is_4bit(layer)
    assert quantized.matrix(layer, torch.zeros(1)) is layer.weight


@pytest.mark.skipif(
    find_spec("bitsandbytes") is not None, reason="it is about a machine without bitsandbytes"
)
def test_weights_whose_package_is_not_here_are_named_with_the_remedy(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "few")
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "few" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"pip install 'leakfast\[qlora\]'"):
        models.load(str(tmp_path / "few"), dtype="float32")
