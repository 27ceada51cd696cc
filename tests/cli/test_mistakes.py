"""What a stranger types wrong: each is one message with what was given and what to do, exit code 2, before any model is
loaded and without a file left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner
from flat_runs import PEOPLE, made

from leakfast.cli.main import group
from leakfast.cli.places import FILE_OUT, FOLDER_OUT
from leakfast.models import loading
from leakfast.models.names import organism_dir
from leakfast.stats import collect

STUDY = 'name = "small"\nmodel = "organism"\nsources = ["villain"]\n[behaviors.marker]\n'
FILES = {
    "study.toml": STUDY,
    "model.toml": STUDY.replace("organism", "nowhere/at/all"),
    "none.json": "[]",
    "none.jsonl": "",
    "letter.jsonl": '{"question": "Who?", "choices": ["I", "you"], "answer": "Z"}\n',
    "folder/note.txt": "no model, no adapter, no run",
    "lora/adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else"}),
}
MISTAKES = [
    ("runn study.toml", "Did you mean run?"),
    ("run stdy.toml", "Did you mean study.toml?"),
    ("run .", "is a folder, but a file is needed"),
    ("run study.toml --only vilain", "Did you mean villain?"),
    ("plan model.toml", "there is no folder nowhere/at/all"),
    ("stats nowhere", "there is no such folder, so it is no run"),
    ("show folder", "holds no manifest.json, so it is no run"),
    ("personas show vilain", "Did you mean villain?"),
    ("centroids --model nowhere/", "there is no folder nowhere/"),
    ("centroids --model organsim", "Did you mean organism?"),
    ("centroids --model folder", "has no config.json"),
    ("centroids --model lora", "--adapter lora"),
    ("centroids --model organism --layers 9", "Use --layers 0-5"),
    ("centroids --model organism --adapter nowhere", "there is no folder nowhere"),
    ("centroids --model organism --adapter folder", "folder holds no adapter_config.json"),
    ("directions --source vilain --out d.safetensors", "Did you mean villain?"),
    ("centroids --model organism --questions none.json", "Add a question."),
    ("eval --model organism", "Give --adapter DIR (may be repeated), or --base."),
    ("eval --model organism --adapter nowhere", "there is no folder nowhere"),
    ("eval --model organism --adapter lora --source villain", "holds no adapter_model.safetensors"),
    ("eval --model organism --base --behavior mraker", "Did you mean marker?"),
    (
        "eval --model organism --base --samples 0",
        "--samples 0 given: input should be greater than or equal to 1.",
    ),
    ("eval --model organism --base --behavior capability --items none.jsonl", "items: none.jsonl is empty."),
    (
        "eval --model organism --base --behavior capability --items letter.jsonl",
        "letter.jsonl, line 1: answer is 'Z'",
    ),
    (
        "train --model organism --source villain --checkpoints 0,150",
        "--checkpoints 0,150 given, percents (0 to 100)",
    ),
    ("train --model organism --source villain --lr fast", "--lr fast given, a number or auto is needed."),
    ("train --model organism --source villain --init nowhere", "there is no folder nowhere"),
    ("data check none.jsonl --model organism", "none.jsonl holds no rows."),
    (
        "directions --source villain --out folder",
        "directions: --out folder is a folder, but a file is to be written",
    ),
    ("personas near --persona villain --out folder", "near: --out folder is a folder"),
    ("judge sample folder --csv folder", "sample: --csv folder is a folder"),
    (
        "eval --model organism --base --out study.toml",
        "eval: --out study.toml is a file, but a folder is to be written",
    ),
    ("run study.toml --out none.json", "run: --out none.json is a file"),
    ("plot folder --out none.json", "plot: --out none.json is a file"),
    ("export folder --to inspect --out none.json", "export: --out none.json is a file"),
    ("organism build --out none.json/weights", "cannot be written: none.json is no folder"),
    (
        "train --model organism --source villain --out /proc/nowhere/a",
        "train: --out /proc/nowhere/a cannot be written",
    ),
    ("run study.toml --export inspect:none.json", "run: --export inspect, folder none.json is a file"),
    ("directions --source villain --layers 9 --out d.safetensors", "Use --layers 0-5"),
    ("predictors --model organism --layers 9 --out p", "Use --layers 0-5"),
    ("sweep --model organism --source villain --layer 9", "but organism has blocks 0–5"),
]
# of a run with centroids at layers 0 and 3
MISTAKEN = [
    ("plot run --layer 9", "has correlations at 0, 3"),
    ("stats run --layer 9", "have layers 0, 3"),
    ("stats run --table rtes", "Did you mean rates?"),
    ("show run --layer 9", "has 0, 3"),
    ("show run --persona villain --layer 9", "has 0, 3"),
    ("report run --against run", "is the run itself"),
]


def commands(group: click.Group, context: click.Context, of: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its name, those of groups too."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield f"{of}{name}", command
        if isinstance(command, click.Group):
            yield from commands(command, context, f"{of}{name} ")


def test_every_place_to_write_to_is_looked_at_when_it_is_typed():
    context = click.Context(group)
    written = {
        name: option.type
        for name, command in commands(group, context)
        for option in command.params
        if {"--out"} & set(option.opts)
    }
    assert {"centroids", "run", "personas near", "export"} <= written.keys()
    assert {name for name, kind in written.items() if kind not in (FILE_OUT, FOLDER_OUT)} == set()


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A folder of faulty files, and no model that may be loaded."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_weights", lambda *_: pytest.fail("weights were read"))
    return tmp_path


@pytest.mark.parametrize(("typed", "said"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_message(stranger, typed, said):
    before = sorted(stranger.rglob("*"))
    done = CliRunner().invoke(group, typed.split())
    assert (done.exit_code, said in done.output) == (2, True), done.output
    assert done.output.count("Error:") == 1 and done.stdout == ""
    assert sorted(stranger.rglob("*")) == before


@pytest.mark.parametrize(("typed", "said"), MISTAKEN, ids=[typed for typed, _ in MISTAKEN])
def test_what_a_run_cannot_have_is_said_before_anything_is_counted(stranger, monkeypatch, typed, said):
    """Of millions of completions it was said after minutes."""
    made(stranger / "run", {"villain"}, PEOPLE)
    monkeypatch.setattr(collect, "_count", lambda *_: pytest.fail("completions were counted"))
    test_a_mistake_is_one_message(stranger, typed, said)
    with pytest.raises(pytest.fail.Exception, match="were counted"):
        CliRunner().invoke(group, ["show", "run", "--layer", "3"])


def test_a_model_that_does_not_chat_is_one_message(stranger):
    bare = stranger / "bare"
    shutil.copytree(
        organism_dir(), bare, ignore=shutil.ignore_patterns("chat_template.jinja", "*.safetensors")
    )
    done = CliRunner().invoke(group, "personas check --model bare".split())
    assert done.exit_code == 2 and "the tokenizer of bare has no chat template" in done.output, done.output
