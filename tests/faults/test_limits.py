"""Files that are too deep, too large or hold half a character, and names that would leave their folder: each is refused with a
word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leakfast.errors import InputError, LeakfastError, StoreError
from leakfast.prompts.items import load_items
from leakfast.prompts.pairs import load_pairs
from leakfast.prompts.personas import load_personas, read_personas
from leakfast.prompts.questions import read_questions
from leakfast.storage.documents import MAX_BYTES, MAX_DEPTH, parse_json, parse_toml, read_document
from leakfast.storage.manifests import parse_manifest
from leakfast.storage.run import Run
from leakfast.study.config import parse_study
from tests.faults.manifests_made import checked

DEMO = (Path(__file__).resolve().parents[2] / "configs" / "demo.toml").read_text(encoding="utf-8")


# ── too deep, too large, half characters ─────────────────────────────────────────────────────────────
@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 2_000, 100_000])
def test_what_is_nested_too_deeply_is_said(tmp_path, depth):
    with pytest.raises(InputError, match="nested more than"):
        parse_toml(f"a = {'[' * depth}{']' * depth}", "a.toml")
    with pytest.raises(InputError, match="nested more than"):
        parse_toml("a." * min(depth, 5_000) + "a = 1", "a.toml")
    with pytest.raises(ValueError, match="nested more than"):
        parse_json("[" * depth + "]" * depth)
    (tmp_path / "deep.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(InputError, match=r"deep.json.*nested more than"):
        read_document(tmp_path / "deep.json")
    (tmp_path / "deep.jsonl").write_text('{"question": ' + "[" * depth + "]" * depth + "}")
    for load in (load_items, lambda file: load_pairs(str(file), "refusal")):
        with pytest.raises(InputError, match="line 1.*nested more than"):
            load(tmp_path / "deep.jsonl")
    assert parse_manifest(b'{"checksum": ' + b"[" * depth + b"]" * depth + b"}") is None


def test_what_is_not_too_deep_is_read():
    depth = MAX_DEPTH - 1
    assert parse_json("[" * depth + "]" * depth) is not None
    assert parse_toml(f"a = {'[' * depth}{']' * depth}", "a.toml").data["a"] is not None


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(MAX_BYTES + (1 << 20))
    with pytest.raises(InputError, match="65 MB, but 64 MB are the most"):
        load_personas(tmp_path / "large.toml")


def test_a_number_of_too_many_digits_is_said(tmp_path):
    with pytest.raises(InputError, match="not TOML that can be read"):
        parse_toml("a = " + "1" * 10_000, "a.toml")
    (tmp_path / "a.json").write_text("[" + "1" * 10_000 + "]")
    with pytest.raises(InputError, match="not JSON that can be read"):
        read_document(tmp_path / "a.json")


def test_half_a_character_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "\\ud800?", "choices": ["a", "b"], "answer": "A"}')
    with pytest.raises(InputError, match="half a character"):
        load_items(tmp_path / "a.jsonl")
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"


# ── names that leave the folder ──────────────────────────────────────────────────────────────────────
LEAVING = ["../x", "..", ".", "/x", "a/b", "a\\b", "\x00", "a\x00b", "", " ", "x/../../y", "~/x", "a\nb"]


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_become_folders_stay_inside(tmp_path, name):
    spelled = json.dumps(name)
    with pytest.raises(LeakfastError):
        load_personas({name: "You are x."})
    (tmp_path / "own.toml").write_text(f'[[persona]]\nname = {spelled}\nprompt = "You are x."\n')
    with pytest.raises(InputError):
        read_personas(tmp_path / "own.toml")
    (tmp_path / "asked.toml").write_text(f'[sets.{spelled}]\nquestions = ["What?"]\n')
    with pytest.raises(InputError):
        read_questions(tmp_path / "asked.toml")
    study = DEMO.replace('name = "demo"', f"name = {spelled}")
    assert study != DEMO
    with pytest.raises(InputError):
        parse_study(study, "demo.toml")
    for key, value in (("sources", f"[{spelled}]"), ("personas", f'["villain", {spelled}]')):
        lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in DEMO.splitlines()]
        with pytest.raises(InputError):
            parse_study("\n".join(lines), "demo.toml")
    with pytest.raises(InputError):
        parse_study(
            DEMO.replace("[behaviors.marker.", f"[behaviors.{json.dumps('marker+' + name)}."), "demo.toml"
        )
    with pytest.raises(InputError):
        parse_study(DEMO + f"\n[[steering]]\nname = {spelled}\nlayers = [1]\n", "demo.toml")


@pytest.mark.parametrize("word", ["all", "base", "originals", "pooled"])
def test_words_with_a_meaning_of_their_own_are_no_names_of_personas(word):
    with pytest.raises(InputError, match="means something else here"):
        load_personas({word: "You are x."})


@pytest.mark.parametrize("path", ["../x.parquet", "/x.parquet", "a/../../x.parquet", "", "."])
def test_a_run_writes_inside_its_folder_alone(tmp_path, path):
    store = Run(tmp_path / "run").create()
    with pytest.raises(ValueError, match="inside the run"):
        store.add_file(path, b"x")
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("path", ["../x", "a/../../x", "."])
def test_a_manifest_or_journal_that_names_a_file_outside_moves_nothing(tmp_path, path):
    (tmp_path / "x").write_text("not of the run")
    (tmp_path / "run").mkdir()
    entry = {"sha256": "0" * 64}
    (tmp_path / "run" / "manifest.json").write_bytes(checked({"shards": {path: entry}, "stages": {}}))
    (tmp_path / "run" / "log.jsonl").write_text(
        json.dumps({"time": "", "event": "shard", "path": path, **entry}) + "\n"
    )
    assert Run(tmp_path / "run").shards() == []
    assert (tmp_path / "x").read_text() == "not of the run"


def test_a_card_in_a_strange_place_names_no_folder(tmp_path):
    """A name of an adapter that a worker is sent for cannot leave either."""
    store = Run(tmp_path / "run").create()
    with pytest.raises(StoreError, match="do not match their hash"):
        store.add_bytes("adapters/a/x", b"x", "0" * 64, {})
