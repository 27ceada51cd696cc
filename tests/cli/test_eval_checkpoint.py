"""`leakfast eval --model CHECKPOINT --base MODEL`: a model that somebody trained elsewhere is measured as an adapter is; what is
no model of that base is refused in one message, before anything is written."""

from __future__ import annotations

import json
import shutil

import polars as pl
import pytest
import torch
from click.testing import CliRunner

from leakfast.cli.main import group

pytestmark = pytest.mark.long
ASK = "--samples 1 --max-new-tokens 4 --dtype float32 --backend transformers --behavior marker".split()


@pytest.fixture
def made(tiny_folder, tiny_qwen2, tiny_tokenizer, tmp_path, monkeypatch):
    """A checkpoint as another program saves it: other weights, the base's tokenizer, no card."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.toml").write_text('[sets.asked]\nquestions = ["Tea?", "Rain?"]\n')
    with torch.no_grad():
        for number, weight in enumerate(tiny_qwen2.model.parameters()):
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    tiny_qwen2.model.save_pretrained(tmp_path / "mine")
    tiny_tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def measured(words, code=0):
    given = [
        "-q",
        "eval",
        "--questions",
        "asked.toml",
        "--personas",
        "villain,comedian,assistant",
        *ASK,
        *words,
    ]
    done = CliRunner().invoke(group, [str(word) for word in given])
    assert done.exit_code == code, done.output
    return done


def refused(words, code=1):
    done = measured(words, code)
    assert done.stderr.count("Error") == 1
    return " ".join(done.stderr.split())


def test_a_checkpoint_is_measured_as_an_adapter(made, tiny_folder, tmp_path):
    words = ("--model", made, "--base", tiny_folder, "--source", "villain", "--out", "run", "--json")
    told = json.loads(measured(words).stdout)
    text = json.dumps(told)
    assert '"mine"' in text and '"villain"' in text
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())["shards"]
    folders = {
        path.split("/")[2]: entry for path, entry in manifest.items() if path.startswith("completions/")
    }
    assert set(folders) == {"mine", "base"}
    from leakfast.models.loading import folder_fingerprint

    assert f"files:{folders['mine']['adapter']}" == folder_fingerprint(made)
    assert folders["mine"]["base"] == folders["base"]["base"] == folder_fingerprint(tiny_folder)
    frame = pl.read_parquet(next((tmp_path / "run/completions/marker/mine").glob("*.parquet")))
    assert (
        frame.columns
        == pl.read_parquet(next((tmp_path / "run/completions/marker/base").glob("*.parquet"))).columns
    )
    assert set(frame["source"]) == {"villain"}

    # once more: nothing is drawn; anew elsewhere: the same bytes
    before = (tmp_path / "run/completions/marker/mine/part-00000.parquet").read_bytes()
    stamp = (tmp_path / "run/completions/marker/mine/part-00000.parquet").stat().st_mtime_ns
    measured(words)
    assert (tmp_path / "run/completions/marker/mine/part-00000.parquet").stat().st_mtime_ns == stamp
    measured([*words[:-2], "other"])
    assert (tmp_path / "other/completions/marker/mine/part-00000.parquet").read_bytes() == before
    # as an adapter, which it stands for, it is the same
    measured(("--adapter", made, "--model", tiny_folder, "--base", "--source", "villain", "--out", "third"))
    assert (tmp_path / "third/completions/marker/mine/part-00000.parquet").read_bytes() == before


def test_what_is_no_checkpoint_of_that_base_says_what_differs(made, tiny_folder, tiny_tokenizer, tmp_path):
    def another(name, change):
        shutil.copytree(made, tmp_path / name)
        change(tmp_path / name)
        return ("--model", tmp_path / name, "--base", tiny_folder, "--source", "villain", "--out", "run")

    def config(**changes):
        def change(folder):
            told = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**told, **changes}))

        return change

    def token(folder):
        told = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = told["model"]["vocab"]
        first, second = sorted(vocabulary)[40:42]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (folder / "tokenizer.json").write_text(json.dumps(told))

    def template(folder):
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("a small model", "a large model"))

    def broken(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        save_file(
            {k: w * float("nan") for k, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )

    for name, change, said in (
        (
            "other-kind",
            config(model_type="llama", architectures=["LlamaForCausalLM"]),
            "its architecture (model_type: llama",
        ),
        ("wide", config(hidden_size=64), "its architecture (hidden_size: 64, the base has 32)"),
        ("words", config(vocab_size=400), "its vocabulary (vocab_size: 400, the base has"),
        ("tokens", token, "its tokenizer ("),
        ("template", template, "its chat template"),
        ("nan", broken, "logits that are not finite"),
    ):
        assert said in refused(another(name, change), 1 if name == "nan" else 2), name
        assert not list((tmp_path / "run").rglob("*.parquet"))
    same = another("same", lambda folder: shutil.copy(tiny_folder / "model.safetensors", folder))
    assert "does not change the model at all" in refused(same)
    assert "no leakfast_card.json" in refused(("--model", made, "--base", tiny_folder, "--out", "run"), 2)
    assert "a base stands beside a checkpoint" in refused(("--model", "organism", "--base", tiny_folder), 2)
    assert "a base stands beside a checkpoint" in refused(("--base", tiny_folder), 2)
    vllm = (
        "--model",
        made,
        "--base",
        tiny_folder,
        "--source",
        "villain",
        "--backend",
        "vllm",
        "--out",
        "run",
    )
    assert "is a whole model, not an adapter" in refused(vllm, 2)
