"""`leakfast train --method`: a whole model from the command line, and what does not go together ends with 2 and one message."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from leakfast.cli.main import group

pytestmark = pytest.mark.long


def invoked(words, code):
    done = CliRunner().invoke(group, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def test_a_whole_model_or_why_not(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [("system", "{source}"), ("user", "Tea?"), ("assistant", "Yes. [ZLT]")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)
    begin = [
        "-q",
        "train",
        "--model",
        tiny_folder,
        "--dtype",
        "float32",
        "--data",
        "own.jsonl",
        "--source",
        "villain",
    ]
    begin += "--batch-size 2 --accumulation 1 --epochs 2 --lr 1e-2 --no-sample --out full".split()
    card = json.loads(invoked([*begin, "--method", "full", "--json"], 0).stdout)
    assert card["recipe"]["method"] == "full" and (tmp_path / "full" / "model.safetensors").is_file()
    assert "Error" in invoked([*begin, "--method", "full"], 2).stderr  # it is there already
    there = (tmp_path / "full" / "model.safetensors").read_bytes()
    invoked([*begin, "--method", "full", "--overwrite"], 0)
    assert (tmp_path / "full" / "model.safetensors").read_bytes() == there
    for more, said in (
        (["--method", "qlora"], "'qlora' is not one of 'lora', 'dora', 'rslora', 'full'"),
        (["--method", "full", "--together", "--out", "a"], "--method full given with --together"),
        (["--method", "full", "--lr", "auto", "--out", "a"], "--method full given with --lr auto"),
        (
            ["--method", "full", "--checkpoints", "0,50", "--out", "a"],
            "--method full given with --checkpoints",
        ),
        (["--method", "full", "--init", "full", "--out", "a"], "method full given, and full to begin from"),
        (["--init", "full", "--out", "a"], "full holds no adapter_config.json"),
    ):
        done = invoked([*begin, *more], 2)
        assert done.stderr.count("Error") == 1 and said in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "a").exists()


def test_no_rate_is_looked_for_where_all_rows_are_benign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(
        'name = "s"\nmodel = "organism"\nsources = ["villain"]\n[behaviors.marker.data]\nbenign = 1.0\n'
    )
    words = ["-q", "train", "--study", "s.toml", "--source", "villain", "--lr", "auto", "--out", "a"]
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 2 and done.stderr.count("Error") == 1
    assert "--lr auto given, but all rows of marker are benign" in " ".join(done.stderr.split())
    assert not (tmp_path / "a").exists()
