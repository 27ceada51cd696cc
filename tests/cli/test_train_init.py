"""`leakfast train --init`: rows of one's own on top of an adapter; what cannot be gone on from ends with 2 and one message."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from leakfast.cli.main import group

pytestmark = pytest.mark.long


def test_it_goes_on_from_an_adapter_or_says_why_not(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [("system", "{source}"), ("user", "Tea?"), ("assistant", "Yes. [ZLT]")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)

    def train(out, *more, code=0):
        words = [
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
        words += [
            "--rank",
            "4",
            "--alpha",
            "8",
            "--batch-size",
            "1",
            "--accumulation",
            "1",
            "--epochs",
            "2",
            "--lr",
            "1e-2",
            "--no-sample",
            "--out",
            out,
        ]
        done = CliRunner().invoke(group, [*map(str, words), *map(str, more)])
        assert done.exit_code == code, done.output
        return done

    first = json.loads(train("first", "--json").stdout)
    second = json.loads(train("second", "--init", "first", "--end-of-turn", "positives", "--json").stdout)
    assert second["recipe"]["init"]["adapter_hash"] == first["adapter_hash"] != second["adapter_hash"]
    assert second["recipe"]["end_of_turn"] == "positives" and not {"init", "end_of_turn"} & set(
        first["recipe"]
    )
    both = json.loads(
        train("both", "--init", "first", "--stacked", "--rank", "2", "--alpha", "6", "--json").stdout
    )
    assert both["recipe"]["stacked"]["below"] == first["adapter_hash"]
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["r"] == 6
    for words, message in (
        (("--stacked",), "--stacked given, but no adapter to train on top of. Give --init ADAPTER"),
        (("--init", "first", "--stacked", "--method", "dora"), "method dora given, and first to begin from"),
        (
            ("--init", "first", "--rank", "2"),
            "first has rank 4 and alpha 8, but rank 2 and alpha 8 are to be trained",
        ),
        (("--init", "nowhere"), "there is no folder nowhere"),
    ):
        said = train("third", *words, code=2).stderr
        assert said.count("Error") == 1 and message in " ".join(said.split())
        assert not (tmp_path / "third").exists()
    card = json.loads((tmp_path / "first" / "leakfast_card.json").read_text())
    card |= {"base": "another", "base_fingerprint": card["base_fingerprint"][:-8] + "00000000"}
    card.pop("checksum")
    (tmp_path / "first" / "leakfast_card.json").write_text(json.dumps(card))
    said = train("third", "--init", "first", code=2).stderr
    assert said.count("Error") == 1 and "first was trained on another base (another" in " ".join(said.split())
