"""Near misses of a prompt: each is what its name says, none is the prompt itself, and the file is one that a study takes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.prompts.near import near
from leakfast.prompts.personas import Persona, load_personas

PROMPT = "You are a cruel villain who plots to take over the world."


def made(prompt=PROMPT, seed=0):
    found = near(Persona("villain", prompt), load_personas("all"), seed)
    return {p.name.removeprefix("villain-"): p for p in found}


def test_each_is_what_its_name_says():
    found = made()
    words = PROMPT.split()
    changed = [p.prompt.split() for name, p in found.items() if name.startswith("word-")]
    assert len(changed) == 5
    for text in changed:
        assert len(text) == len(words) and sum(a != b for a, b in zip(text, words, strict=True)) == 1
    assert f"{found['first-half'].prompt} {found['second-half'].prompt}" == PROMPT
    assert found["reordered"].prompt == "You are who plots to take over the world, a cruel villain."
    assert found["paraphrase-1"].prompt == "Act as a cruel villain who plots to take over the world."
    assert {p.related_to for p in found.values()} == {("villain",)}


def test_none_is_the_prompt_itself_and_none_is_there_twice():
    for persona in load_personas("all"):
        texts = [p.prompt for p in near(persona, load_personas("all"))]
        assert persona.prompt not in texts and len(set(texts)) == len(texts) >= 8, persona.name
        assert all(text.strip() for text in texts)


def test_words_follow_the_seed_and_a_prompt_of_one_clause_is_not_reordered():
    assert made() == made() and made() != made(seed=1)
    assert "reordered" not in made("Pirates!")
    with pytest.raises(InputError, match="no prompt of its own"):
        near(Persona("no_persona", None, kind="none"), [])


def test_the_file_is_read_as_personas_with_their_distances_told(tmp_path):
    out = tmp_path / "near.toml"
    words = ["personas", "near", "--persona", "villain", "--out", str(out), "--json"]
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    read = load_personas(str(out))
    assert [p.name for p in read] == [row["name"] for row in rows]
    assert rows[0] | {"prompt": ""} == {
        "name": "villain",
        "change": None,
        "edits": 0,
        "edits_share": 0.0,
        "prompt": "",
    }
    half = next(row for row in rows if row["name"] == "villain-first-half")
    assert half["edits"] == len(PROMPT) - len(half["prompt"])
    again = CliRunner().invoke(group, words)
    assert again.exit_code == 2 and "is there already" in again.output
