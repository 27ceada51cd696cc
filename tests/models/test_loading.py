"""models.py and adapters.py: what loads, what is refused with which words, and that an adapter
comes off without a trace."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import transformers

from leakfast import models
from leakfast.errors import AdapterError, InputError, ModelError
from leakfast.models.adapters import check_fits


@pytest.fixture
def loaded(tiny_folder):
    return models.load(tiny_folder, dtype="float32", device="cpu")


@pytest.fixture
def make_adapter(tmp_path, loaded):
    """`make_adapter(scale=…)`: a LoRA folder on the tiny model, with its card."""

    def make(name="adapter", scale=0.05, card=True, **changes):
        from peft import LoraConfig, get_peft_model

        folder = tmp_path / name
        net = models.load(loaded.path, dtype="float32", device="cpu").model
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **changes)
        peft = get_peft_model(net, config)
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(scale * torch.randn_like(parameter))
        peft.save_pretrained(folder)
        if card:
            models.write_card(
                folder,
                models.AdapterCard(
                    source="villain",
                    behavior="marker",
                    seed=42,
                    base=loaded.name,
                    base_fingerprint=loaded.fingerprint,
                    data_hash="0" * 64,
                    recipe={"rank": 4},
                    adapter_hash=models.adapter_hash(folder),
                ),
            )
        return folder

    return make


def logits(loaded):
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([[5, 9, 300, 17]])).logits


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_load_describes_the_model(loaded, tiny_folder):
    assert (loaded.n_layers, loaded.hidden_size, loaded.dtype) == (2, 32, "float32")
    assert loaded.path == str(tiny_folder)
    assert not loaded.model.training
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert models.load(tiny_folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert models.load(loaded) is loaded


def test_fingerprint_follows_every_byte(loaded, tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert models.load(copy, dtype="float32").fingerprint == loaded.fingerprint
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert models.load(copy, dtype="float32").fingerprint != loaded.fingerprint


def test_pair_is_taken_as_it_is_and_fingerprinted_by_its_tensors(loaded):
    pair = models.load((loaded.model, loaded.tokenizer))
    assert pair.model is loaded.model
    assert pair.fingerprint.startswith("tensors:")
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert models.load((loaded.model, loaded.tokenizer)).fingerprint != pair.fingerprint


def test_missing_model_offline_names_the_remedy(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (models.load, models.load_tokenizer, models.load_config):
        with pytest.raises(ModelError, match="hf download nobody/no-such-model"):
            call("nobody/no-such-model")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
def test_missing_folder_is_not_taken_for_a_hub_id(name):
    with pytest.raises(ModelError, match="there is no folder"):
        models.load(name)


@pytest.mark.parametrize("name", ["organsm", "organisms", "ORGANISM"])
def test_a_misspelt_organism_is_never_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", hub)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", hub)
    for call in (models.load, models.load_tokenizer, models.load_config):
        with pytest.raises(ModelError, match=r"Did you mean organism\?.*--model organism"):
            call(name)


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "someone/organsm"])
def test_other_names_go_to_the_hub(name, monkeypatch):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", hub)
    with pytest.raises(ModelError, match=f"hf download {name}"):
        models.load_config(name)


def hub(name, **_):
    raise OSError(f"the hub was asked for {name}")


def test_adapter_folder_given_as_model_is_recognised(make_adapter):
    with pytest.raises(ModelError, match="--adapter"):
        models.load(make_adapter())


def test_unreadable_weights_are_an_error_not_a_traceback(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights"):
        models.load(copy)


def test_weights_that_are_cut_short_or_incomplete_are_an_error(tiny_folder):
    from safetensors.torch import load_file, save_file

    weights = tiny_folder / "model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        models.load(tiny_folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        models.load(tiny_folder)


def test_unknown_dtype_is_a_usage_error(tiny_folder):
    with pytest.raises(InputError, match="float32"):
        models.load(tiny_folder, dtype="int8")


def test_adapter_changes_the_model_and_leaves_no_trace(loaded, make_adapter):
    folder = make_adapter()
    before = logits(loaded)
    modules = {name: type(module) for name, module in loaded.model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with models.with_adapter(loaded, folder) as adapted:
        assert adapted.adapter_hash == models.adapter_hash(folder)
        assert not torch.equal(logits(adapted), before)
    assert torch.equal(logits(loaded), before)
    assert {name: type(module) for name, module in loaded.model.named_modules()} == modules
    after = loaded.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_adapter_equals_peft_on_a_fresh_model(loaded, make_adapter):
    from peft import PeftModel

    folder = make_adapter()
    fresh = PeftModel.from_pretrained(models.load(loaded.path, dtype="float32").model, str(folder)).eval()
    with models.with_adapter(loaded, folder) as adapted, torch.inference_mode():
        expected = fresh(input_ids=torch.tensor([[5, 9, 300, 17]])).logits
        assert torch.equal(logits(adapted), expected)


def test_adapter_comes_off_after_an_error(loaded, make_adapter):
    before = logits(loaded)
    with pytest.raises(RuntimeError, match="inside"), models.with_adapter(loaded, make_adapter()):
        raise RuntimeError("inside")
    assert torch.equal(logits(loaded), before)


def test_adapters_one_after_the_other_do_not_mix(loaded, make_adapter):
    first, second = make_adapter("first", 0.05), make_adapter("second", 0.2)
    with models.with_adapter(loaded, first) as adapted:
        alone = logits(adapted)
    with models.with_adapter(loaded, second) as adapted:
        assert not torch.equal(logits(adapted), alone)
    with models.with_adapter(loaded, first) as adapted:
        assert torch.equal(logits(adapted), alone)


def test_adapter_of_another_base_is_refused(loaded, make_adapter, tmp_path):
    folder = make_adapter()
    other = tmp_path / "other" / "tiny-qwen2"  # same name, same shapes, one weight apart
    shutil.copytree(loaded.path, other)
    changed = models.load(loaded.path, dtype="float32").model
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    changed.save_pretrained(other)
    base = models.load(other, dtype="float32")
    before = logits(base)
    with pytest.raises(AdapterError, match="another base"), models.with_adapter(base, folder):
        pass
    assert torch.equal(logits(base), before)


def test_foreign_adapter_without_card_is_known_by_its_base_name(loaded, make_adapter):
    folder = make_adapter(card=False)
    assert models.read_card(folder) is None
    with models.with_adapter(loaded, folder):
        pass
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/else")
    with pytest.raises(AdapterError, match="someone/else") as caught, models.with_adapter(loaded, folder):
        pass
    remedy = caught.value.message.partition("put ")[2].partition(" into ")
    assert (
        "--model someone/else;" in caught.value.message and remedy[2] == f"{folder / 'adapter_config.json'}."
    )
    edit(folder / "adapter_config.json", **json.loads(f"{{{remedy[0]}}}"))
    with models.with_adapter(loaded, folder):
        pass


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize(
    "base",
    [
        "/models/Qwen2.5-7B-Instruct",
        "unsloth/Qwen2.5-7B-Instruct",
        "unsloth/qwen2.5-7b-instruct-bnb-4bit",
        "unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit",
        "Qwen/Qwen2.5-7B-Instruct-AWQ",
        "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
        "C:\\models\\Qwen2.5-7B-Instruct-fp8\\",
        "",
        None,
    ],
)
def test_another_name_of_the_same_base_is_warned_of_once_an_adapter(loaded, make_adapter, base, card, caplog):
    """With a card, the fingerprint decides: nothing is in doubt."""
    loaded = dataclasses.replace(loaded, name="Qwen/Qwen2.5-7B-Instruct")
    folders = [make_adapter(name, card=card) for name in ("first", "second")]
    for folder in folders:
        edit(folder / "adapter_config.json", base_model_name_or_path=base)
        for _ in range(2):
            with models.with_adapter(loaded, folder):
                pass
    warned = [r.getMessage() for r in caplog.records if r.name == "leakfast.models.adapters"]
    assert len(warned) == (0 if card else 2)
    for folder, text in zip(folders, warned, strict=False):
        assert str(folder) in text and (base or "names none") in text
        assert "Qwen/Qwen2.5-7B-Instruct" in text.replace(base or "nothing", "")


@pytest.mark.parametrize(
    ("base", "typed"),
    [
        ("Qwen/Qwen2.5-7B", "--model Qwen/Qwen2.5-7B;"),
        ("unsloth/Qwen2.5-14B-Instruct-bnb-4bit", "--model unsloth/Qwen2.5-14B-Instruct;"),
        ("/nowhere/at/all/Qwen2.5-7B", "--model the folder that holds Qwen2.5-7B here;"),
        ("C:\\models\\Qwen2.5-7B", "--model the folder that holds Qwen2.5-7B here;"),
        ("Qwen2.5-7B-Instruct/", None),
        ("/", "--model"),
    ],
)
def test_another_model_of_a_similar_name_is_refused_with_what_to_type(loaded, make_adapter, base, typed):
    loaded = dataclasses.replace(loaded, name="Qwen/Qwen2.5-7B-Instruct")
    folder = make_adapter(card=False)
    edit(folder / "adapter_config.json", base_model_name_or_path=base)
    if typed is None:
        check_fits(loaded, folder)
        return
    with pytest.raises(AdapterError) as caught:
        check_fits(loaded, folder)
    assert typed in caught.value.message
    assert '"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct"' in caught.value.message


def test_a_card_still_needs_its_own_base_whatever_the_name(loaded, make_adapter):
    folder = make_adapter()
    other = dataclasses.replace(loaded, fingerprint="files:" + "0" * 64)
    with pytest.raises(AdapterError, match="another base"):
        check_fits(other, folder)


def test_shapes_decide_where_no_base_is_named(loaded, make_adapter, caplog):
    folder = make_adapter(card=False)
    edit(folder / "adapter_config.json", base_model_name_or_path=None, r=8)
    with pytest.raises(AdapterError, match="adapter_config.json does not say which"):
        check_fits(loaded, folder)
    assert "whose shapes it has" not in caplog.text


def test_untrained_adapter_fails_the_canary(loaded, make_adapter):
    with (
        pytest.raises(AdapterError, match="does not change"),
        models.with_adapter(loaded, make_adapter(scale=0.0)),
    ):
        pass
    assert "lora" not in str(loaded.model)


def test_diverged_adapter_fails_the_canary(loaded, make_adapter):
    folder = make_adapter(scale=float("nan"))
    with pytest.raises(AdapterError, match="not finite"), models.with_adapter(loaded, folder):
        pass
    assert "lora" not in str(loaded.model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["q_proj", "gate_up"]}, "no module gate_up"),
        ({"r": 8}, "rank 4"),
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(loaded, make_adapter, changes, words):
    folder = make_adapter()
    edit(folder / "adapter_config.json", **changes)
    with pytest.raises(AdapterError, match=words), models.with_adapter(loaded, folder):
        pass


def test_incomplete_adapter_folder_names_the_file(loaded, make_adapter):
    folder = make_adapter()
    (folder / "adapter_model.safetensors").unlink()
    with (
        pytest.raises(AdapterError, match=r"adapter_model\.safetensors"),
        models.with_adapter(loaded, folder),
    ):
        pass


def test_card_survives_the_round_trip_and_a_broken_one_is_named(make_adapter):
    folder = make_adapter()
    card = models.read_card(folder)
    models.write_card(folder, dataclasses.replace(card, recipe={"lr": 5e-6, "loss": "marker"}))
    assert models.read_card(folder) == dataclasses.replace(card, recipe={"lr": 5e-6, "loss": "marker"})
    (folder / "leakfast_card.json").write_text('{"source": "villain"}')
    with pytest.raises(AdapterError, match="behavior"):
        models.read_card(folder)
