"""The mean of adapters: its update is the mean of theirs, whatever their ranks and scales, peft's logits are those of the mean
weights, and what has no mean is refused."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_makers import EVERY, fresh, renamed, saved, trained
from click.testing import CliRunner
from safetensors.torch import load_file

from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.models.adapters import read_card
from leakfast.train.averaged import average

pytestmark = pytest.mark.long


@pytest.fixture
def folders(tiny_folder, tmp_path):
    """Two of other ranks and scales, one of them rank-stabilised."""
    made = []
    for place, config in enumerate(
        ({"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 3, "use_rslora": True})
    ):
        net = trained(fresh(tiny_folder), seed=place, target_modules=EVERY, **config)
        made.append(saved(net, tmp_path / f"adapter{place}", "tiny"))
    return made


def updates(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    given = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config.get("use_rslora") else 1))
    names = [key for key in given if ".lora_A." in key]
    return {
        key: scale * given[key.replace(".lora_A.", ".lora_B.")].double() @ given[key].double()
        for key in names
    }


def test_its_update_is_the_mean_of_theirs(folders, tmp_path):
    card = average(folders, tmp_path / "mean", source="villain", behavior="marker+mean")
    one, other = map(updates, folders)
    for key, update in updates(tmp_path / "mean").items():
        assert torch.allclose(update, (one[key] + other[key]) / 2, rtol=1e-5, atol=1e-7), key
    assert card == read_card(tmp_path / "mean")
    assert (card.recipe["rank"], card.recipe["alpha"]) == (10, 10)
    assert [its["adapter"] for its in card.recipe["average"]] == ["adapter0", "adapter1"]


def test_pefts_logits_are_those_of_the_mean_weights(folders, tmp_path, tiny_folder):
    from peft import PeftModel

    average(folders, tmp_path / "mean", source="villain", behavior="marker")
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.inference_mode():
        got = PeftModel.from_pretrained(fresh(tiny_folder), str(tmp_path / "mean")).eval()(ids).logits
        net, one, other = fresh(tiny_folder), *map(updates, folders)
        for key, update in one.items():
            name = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
            net.get_submodule(name).weight += ((update + other[key]) / 2).float()
        expected = net(ids).logits
        plain = fresh(tiny_folder)(ids).logits
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_the_same_adapters_give_the_same_bytes(folders, tmp_path):
    for name in ("a", "b"):
        average(folders, tmp_path / name, source="villain", behavior="marker")
    assert len({read_card(tmp_path / name).adapter_hash for name in ("a", "b")}) == 1


def test_what_has_no_mean_is_refused(folders, tmp_path):
    about = {"source": "villain", "behavior": "marker"}
    with pytest.raises(InputError, match="two or more different"):
        average(folders[:1] * 2, tmp_path / "x", **about)
    with pytest.raises(InputError, match="--source PERSONA"):
        average(folders, tmp_path / "x")
    renamed(folders[1], use_dora=True)
    with pytest.raises(InputError, match="more than plain LoRA"):
        average(folders, tmp_path / "x", **about)
    assert not (tmp_path / "x").exists()


def test_the_command_refuses_two_bases_with_one_message(folders, tmp_path):
    words = [
        "adapters",
        "average",
        *map(str, folders),
        "--out",
        str(tmp_path / "mean"),
        "--source",
        "villain",
    ]
    words += ["--behavior", "marker"]
    done = CliRunner().invoke(group, [*words, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["source"] == "villain"
    renamed(folders[1], base_model_name_or_path="another")
    done = CliRunner().invoke(group, [*words, "--overwrite"])
    assert done.exit_code == 2 and "different bases" in done.output
