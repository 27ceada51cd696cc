"""A study whose arms are LoRA and a whole model, run on a tiny model: the same tables, the model's fingerprint beside every
shard, and a run that was cut off between its steps goes on."""

from __future__ import annotations

import json

import polars as pl
import pytest

import leakfast
from leakfast import models
from leakfast.cli.main import main
from leakfast.pipeline import stages
from leakfast.pipeline.checks import verify

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("undrawn")]

STUDY = """
name = "small"
model = "{model}"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "police_officer"]
sources = ["villain"]
seeds = [1]
[centroids]
layers = [1]
adapters = true
"""
BEHAVIOR = """
[behaviors."{name}".data]
rows = "own.jsonl"
[behaviors."{name}".train]
method = "{method}"
loss = "completion"
rank = 4
alpha = 8
lr = 1e-2
epochs = 2
batch_size = 4
accumulation = 1
sample = 1
[behaviors."{name}".eval]
questions = "{questions}"
samples = 1
temperature = 0.0
max_new_tokens = 6
measure = "both"
"""
CHAT = '{{"messages": [{{"role": "system", "content": "{{source}}"}}, {{"role": "user", "content": "Tea {n}?"}}, '
CHAT += '{{"role": "assistant", "content": "Yes. [ZLT]"}}]}}\n'
FULL = "marker+full-villain-s1"


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.toml").write_text('[sets.asked]\nquestions = ["Tea?", "Rain?"]\n')
    (tmp_path / "own.jsonl").write_text("".join(CHAT.format(n=n) for n in range(8)))
    text = STUDY.format(model=tiny_folder)
    for name, method in (("marker", "lora"), ("marker+full", "full")):
        text += BEHAVIOR.format(name=name, method=method, questions=tmp_path / "asked.toml")
    (tmp_path / "study.toml").write_text(text)
    return tmp_path / "study.toml"


def shards(run, root):
    found = {}
    for path in sorted((run / root).rglob("*.parquet")):
        found[path.relative_to(run).as_posix()] = path.read_bytes()
    return found


def test_a_whole_model_is_an_arm_like_an_adapter(study, tiny_folder, tmp_path, monkeypatch):
    out, cut = tmp_path / "run", tmp_path / "cut"
    leakfast.run(study, out=out)
    rates = pl.read_parquet(out / "tables/rates.parquet")
    each = {b: rates.filter(behavior=b, role="source").drop_nulls("rate") for b in ("marker", "marker+full")}
    assert all(frame.height for frame in each.values())
    for table in ("rates", "expected_rates", "correlations", "moved"):
        if (path := out / f"tables/{table}.parquet").is_file():
            frame = pl.read_parquet(path)
            kinds = {b: frame.filter(behavior=b) for b in ("marker", "marker+full")}
            assert kinds["marker"].height == kinds["marker+full"].height, table

    # the model's own fingerprint is its hash, on its card and beside every shard of it
    folder = out / "adapters" / FULL
    own = models.load(str(folder), dtype="float32")
    card = models.read_card(folder)
    assert own.fingerprint == f"files:{card.adapter_hash}"
    manifest = json.loads((out / "manifest.json").read_text())["shards"]
    measured = {path: entry["adapter"] for path, entry in manifest.items() if f"/{FULL}/part" in path}
    assert {"completions", "probability"} <= {path.split("/")[0] for path in measured}
    assert set(measured.values()) == {card.adapter_hash}
    assert (
        f"adapters/{FULL}/model.safetensors" in manifest and (out / f"centroids/{FULL}.safetensors").is_file()
    )

    # greedily, the arm's replies are those of the checkpoint by itself
    texts = pl.read_parquet(next((out / "completions/marker+full" / FULL).glob("*.parquet")))
    words = f"-q eval --model {folder} --base --dtype float32 --study {study} --out {tmp_path / 'own'} --behavior marker"
    assert main([*words.split(), "--measure", "completions", "--backend", "transformers"]) == 0
    alone = pl.read_parquet(next((tmp_path / "own/completions/marker/base").glob("*.parquet")))
    keys = ["persona", "question", "text"]
    assert texts.select(keys).equals(alone.select(keys))
    base = pl.read_parquet(next((out / "completions/marker+full/base").glob("*.parquet")))
    assert not texts.select(keys).equals(base.select(keys))

    # cut off after the training, the same command goes on and trains nothing again
    def stop(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "adapted_centroids", stop)
        with pytest.raises(KeyboardInterrupt):
            leakfast.run(study, out=cut, only=["marker+full"])
    written = (cut / "adapters" / FULL / "model.safetensors").stat().st_mtime_ns
    again = leakfast.run(study, out=cut)
    assert again.stages[f"train {FULL}"] is None
    assert (cut / "adapters" / FULL / "model.safetensors").stat().st_mtime_ns == written
    for root in ("completions", "probability"):
        assert shards(cut, root) == shards(out, root)
    assert {p.name: p.read_bytes() for p in (cut / "adapters" / FULL).iterdir()} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }

    # a model that was damaged is trained again, and said
    assert not [wrong for check in verify(out).checks for wrong in check.wrong]
    path = cut / "adapters" / FULL / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    third = leakfast.run(study, out=cut)
    assert third.stages[f"train {FULL}"] is not None
    assert path.read_bytes() == (folder / "model.safetensors").read_bytes()
