"""Bit flips and truncation in every kind of file of a run: found, named, set aside, and only what the file held is
made again. The whole study on a tiny random model, so every stage is the real one."""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import types
from pathlib import Path

import polars as pl
import pytest

import leakfast
from leakfast.behaviors import registry
from leakfast.behaviors.registry import Behavior
from leakfast.errors import AdapterError, StoreError
from leakfast.geometry import Centroids
from leakfast.models.adapters import AdapterCard, read_card, write_card
from leakfast.storage.disk import file_hash
from leakfast.storage.run import Run

pytestmark = pytest.mark.long

STUDY = """
name = "tiny"
model = "{model}"
dtype = "float32"
personas = ["villain", "hero", "comedian", "clown", "assistant"]
sources = ["villain"]
[centroids]
questions = "{questions}"
layers = [0, 1]
[behaviors.marker.data]
questions = "{questions}"
positives = 4
negatives = 4
negative_personas = ["comedian"]
max_new_tokens = 32
[behaviors.marker.train]
rank = 2
alpha = 4
epochs = 1
batch_size = 4
accumulation = 1
max_length = 256
gradient_checkpointing = false
[behaviors.marker.eval]
questions = "{questions}"
samples = 2
max_new_tokens = 4
"""
MORE = """
[behaviors.hellaswag.eval]
items = "{items}"
half = "all"
[behaviors.advice.eval]
questions = "{questions}"
samples = 1
max_new_tokens = 4
[behaviors.advice.judge]
judge = "organism"
[trajectory]
behaviors = ["marker", "hellaswag", "advice"]
shares = [0.5, 1.0]
personas = ["hero"]
"""
ADAPTER = "adapters/marker-villain-s42"
SHARD = "completions/marker/marker-villain-s42/part-00000.parquet"
# kind of file → (path in the run, files that are made again with it beside itself)
KINDS = {
    "manifest": ("manifest.json", set()),
    "log": ("log.jsonl", set()),
    "study": ("study.toml", set()),
    "personas": ("personas.json", set()),
    "centroids": ("centroids/base.safetensors", set()),
    "data": ("data/marker-villain-s42.jsonl", set()),
    "weights": (f"{ADAPTER}/adapter_model.safetensors", {ADAPTER}),
    "config": (f"{ADAPTER}/adapter_config.json", {ADAPTER}),
    "card": (f"{ADAPTER}/leakfast_card.json", {ADAPTER}),
    "shard": (SHARD, set()),
    "table": ("tables/pairs.parquet", {"tables"}),
}
# the same of a study with a control, a judge and points of training
MORE_KINDS = {
    "checkpoint": (f"{ADAPTER}/checkpoints/p050/adapter_model.safetensors", {ADAPTER}),
    "scores": ("choices/marker-villain-s42/items-full-text/part-00000.parquet", set()),
    "judgements": ("judgements/advice/marker-villain-s42/organism.parquet", set()),
    "series": ("series/completions/marker/marker-villain-s42@p050/part-00000.parquet", set()),
    "series of scores": ("trajectory/marker-villain-s42/items-full-text/p050/part-00000.parquet", set()),
    "series of judgements": ("series/judgements/advice/marker-villain-s42@p050/organism.parquet", set()),
}
# read out again by every call of a lexicon, and of the tables; their bytes must stay
READ_OUT = ("judgements/", "series/judgements/", "tables/trajectory.parquet")
ALWAYS = (
    "report.html",
    "figures/",
    "log.jsonl",
    "manifest.json",
    "personas.json",
    ".lock",
)  # written by every call


def flip(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def outcome(call, kind):
    """(message, None) where `call` raises a `kind`, else (None, what it returns)."""
    try:
        return None, call()
    except kind as error:
        return error.message, None


def stamps(folder: Path) -> dict[str, tuple[int, str]]:
    """Path in the run → (time it was written, hash) of all files that not every call writes."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: (path.stat().st_mtime_ns, file_hash(path))
        for name, path in found.items()
        if not name.startswith((*ALWAYS, "quarantine/"))
    }


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """The model, the questions and the items of both studies."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    net = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.25,
            tie_word_embeddings=True,
            eos_token_id=tiny_tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tiny_tokenizer.pad_token_id,
        )
    )
    net.generation_config.eos_token_id = [*range(60), tiny_tokenizer.eos_token_id]  # replies that end soon
    net.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    (folder / "asked.json").write_text(json.dumps([f"Number {i}?" for i in range(4)]))
    items = [{"question": f"What of {i}?", "choices": ["tea", "rain"], "answer": "B"} for i in range(3)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def whole(folder, name, text):
    """(study file, run folder) of a whole study."""
    study = folder / f"{name}.toml"
    places = {"model": folder / "model", "questions": folder / "asked.json", "items": folder / "items.jsonl"}
    study.write_text(text.format(**places))
    return study, leakfast.run(study, out=folder / name).run


@pytest.fixture(scope="module")
def made(folder):
    return whole(folder, "tiny", STUDY)


@pytest.fixture(scope="module")
def made_with_more(folder):
    """A judged control beside; training long enough that a point on its way has learned something."""
    module = types.ModuleType("advice_of_the_study")
    module.BEHAVIOR = Behavior(
        name="advice",
        unit="points",
        sign=-1,
        detector=None,
        baseline="well-meant",
        data_builder="",
        description="mean aligned score",
        measured_by="judge",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        patch.setitem(registry._MODULES, "advice", module.__name__)
        yield whole(folder, "more", STUDY.replace("epochs = 1", "epochs = 2") + MORE)


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_found_named_set_aside_and_made_again_alone(made, tmp_path, caplog, kind, damage):
    made_again_alone(made, KINDS[kind], kind, damage, tmp_path / "run", caplog)


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_so_are_scores_judgements_and_points_of_training(made_with_more, tmp_path, caplog, kind, damage):
    made_again_alone(made_with_more, MORE_KINDS[kind], kind, damage, tmp_path / "run", caplog)


def made_again_alone(made, place, kind, damage, folder, caplog):
    study, pristine = made
    shutil.copytree(pristine, folder)
    relpath, others = place
    path = folder / relpath
    before, content = stamps(folder), path.read_bytes()
    path.write_bytes(damage(content, random.Random(f"{kind} {damage.__name__}")))
    if kind == "log":  # read where the manifest is gone
        (folder / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, logger="leakfast"):
        leakfast.run(study, out=folder)
    if kind == "log":
        assert "log.jsonl: lines " in caplog.text and "are damaged" in caplog.text
    else:
        assert relpath in caplog.text, "the message names the file"
        assert (folder / "quarantine" / relpath).is_file(), "kept for a look"
    after = stamps(folder)
    assert set(after) == set(before)
    again = {name for name in after if after[name][0] != before[name][0] and not name.startswith(READ_OUT)}
    if kind != "log":  # there, what the damaged lines told of
        extra = {name for name in again if name != relpath and not name.startswith(tuple(others) or ("-",))}
        assert extra == set(), "nothing else was made again"
    assert {n: h for n, (_, h) in after.items()} == {n: h for n, (_, h) in before.items()}, (
        "and it is as it was"
    )
    if kind not in ("manifest", "log", "personas"):
        assert path.read_bytes() == content
    assert Run(folder).read("completions").equals(Run(pristine).read("completions"))


def test_any_bit_of_the_log_and_the_manifest_may_flip(tmp_path):
    """Whatever bit of the log: no crash, no shard counted that is not intact, and at most two lines are lost."""
    draw, frame = random.Random(0), pl.DataFrame({"n": [1, 2]})
    run = Run(tmp_path / "run").create("name = 'x'\n")
    names = [f"completions/marker/base/part-{i:05d}.parquet" for i in range(4)]
    for name in names:
        run.add_shard(name, frame, request="abc")
    run.mark_done("eval", "abc", files=names)
    entries = run.manifest["shards"]
    told = (run.path / "log.jsonl").read_bytes()
    for number in range(150):
        folder = tmp_path / str(number)
        shutil.copytree(run.path, folder)
        (folder / "manifest.json").unlink()
        (folder / "log.jsonl").write_bytes(flip(told, draw))
        fresh = Run(folder)
        found = fresh.shards()
        assert len(found) >= 2 and all(fresh.manifest["shards"][name] == entries[name] for name in found)
        shutil.rmtree(folder)
    manifest = (run.path / "manifest.json").read_bytes()
    for number in range(50):
        folder = tmp_path / f"m{number}"
        shutil.copytree(run.path, folder)
        (folder / "manifest.json").write_bytes(flip(manifest, draw))
        fresh = Run(folder)
        assert fresh.shards() == names and fresh.stage_done("eval", "abc")
        assert fresh.manifest["study"] == run.manifest["study"]
        shutil.rmtree(folder)


def test_a_study_that_was_damaged_is_not_read_as_it_stands(tmp_path):
    run = Run(tmp_path).create("name = 'x'\nseeds = [42]\n")
    (tmp_path / "study.toml").write_text("name = 'x'\nseeds = [46]\n")
    with pytest.raises(StoreError, match=r"study.toml: its bytes do not match.*leakfast run STUDY.toml"):
        _ = Run(tmp_path).study_text
    run.create("name = 'x'\nseeds = [42]\n")
    assert run.study_text.endswith("[42]\n")
    assert (tmp_path / "quarantine" / "study.toml").read_text().endswith("[46]\n")


def test_any_bit_of_a_card_or_centroids_file_may_flip(tmp_path):
    """Outside a run nobody else has their hash: they carry it."""
    import numpy as np

    draw = random.Random(1)
    card = AdapterCard("villain", "marker", 42, "organism", "files:ab", "cd", {"lr": 1e-3, "epochs": 3}, "ef")
    path = write_card(tmp_path, card)
    assert read_card(tmp_path) == card
    whole = path.read_bytes()
    metadata = {"personas": ["a", "b"], "layers": [0], "centered_on": ["a", "b"], "model": "x"}
    file = tmp_path / "c.safetensors"
    means = {0: np.arange(12, dtype=np.float32).reshape(2, 6)}
    Centroids(["a", "b"], [0], metadata, means).save(file)
    kept = file.read_bytes()
    assert np.array_equal(Centroids.load(file).layer(0), means[0])
    for _ in range(200):
        path.write_bytes(flip(whole, draw))
        said, found = outcome(lambda: read_card(tmp_path), AdapterError)
        assert str(path) in said if said else found == card  # white space, or the name of the checksum
        file.write_bytes(flip(kept, draw))
        said, found = outcome(lambda: Centroids.load(file), StoreError)
        if said:
            assert str(file) in said
        else:
            assert all(found.metadata[key] == value for key, value in metadata.items())  # the hash's own name
            assert np.array_equal(found.layer(0), means[0])
    path.write_bytes(json.dumps({k: v for k, v in json.loads(whole).items() if k != "checksum"}).encode())
    assert read_card(tmp_path) == card, "a card of an earlier version"
