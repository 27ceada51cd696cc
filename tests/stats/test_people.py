"""Who the personas of a run are, wherever the study's own files are by now."""

from __future__ import annotations

import json

import pytest

from leakfast.measure.request import keep_people
from leakfast.pipeline.settled import keep_personas
from leakfast.prompts.personas import load_personas
from leakfast.sinks.material import Material
from leakfast.stats.people import read_people
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import load_study

OWN = {"villain": "You are a villain of mine.", "ada": "You are Ada.", "nobody": None}
STUDY = """
name = "mine"
model = "organism"
personas = "people.json"
sources = ["villain"]
[behaviors.marker]
[behaviors.misalignment-advice.judge]
judge = "openai:some-model"
coherent_min = 20.0
[trajectory]
behaviors = ["marker"]
match = 0.8
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study in a folder of its own, with the personas' file beside it: from elsewhere its name alone finds nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "people.json").write_text(json.dumps(OWN))
    path = tmp_path / "studies" / "mine.toml"
    path.write_text(STUDY)
    return load_study(path)


def kept_in(run, study):
    keep_personas(run, study, load_personas(study.personas))


def test_a_studys_judge_and_match_hold_where_its_files_are_not_found(study, tmp_path):
    """Any judge's scores counted, from a coherence of 50, and nothing was matched."""
    run = Run(tmp_path / "runs" / "mine").create(study.raw_text)
    kept_in(run, study)
    people, _ = read_people(run)
    assert people.judges["misalignment-advice"] == ("openai:some-model", 20.0)
    assert people.match == 0.8


def test_words_are_those_that_were_asked_and_never_a_shipped_ones_of_the_same_name(study, tmp_path):
    run = Run(tmp_path / "runs" / "mine").create(study.raw_text)
    kept_in(run, study)
    people, _ = read_people(run)
    assert {name: people.prompts.get(name) for name in OWN} == OWN
    assert people.categories["villain"] is None and not people.related_to["villain"]
    (tmp_path / "studies" / "people.json").write_text(json.dumps(OWN | {"villain": "You are another."}))
    assert read_people(run)[0].prompts["villain"] == OWN["villain"], "as it was asked, not as the file is now"
    shared = Material(run, None, study, None).people  # what exports say of them
    assert {name: one.prompt for name, one in shared.items()} == OWN


def test_a_run_that_did_not_keep_words_does_not_take_shipped_ones_in_their_place(study, tmp_path):
    run = Run(tmp_path / "runs" / "mine").create(study.raw_text)
    told = {"categories": dict.fromkeys(OWN), "named": list(OWN), "sources": ["villain"]}
    run.add_file(layout.PERSONAS, json.dumps(told).encode())
    assert not read_people(run)[0].prompts


def test_without_a_study_the_words_of_all_who_were_asked_are_kept(study, tmp_path):
    run = Run(tmp_path / "evals").create()
    assert read_people(run)[0].prompts["villain"] == load_personas("villain")[0].prompt
    personas = load_personas(study.personas)
    keep_people(run, personas[:2])
    keep_people(run, personas[2:])
    people, _ = read_people(run)
    assert {name: people.prompts.get(name) for name in OWN} == OWN
    assert people.named is None, "nobody said who is no bystander"


def test_who_was_asked_beside_a_study_stays_behind_its_own(study, tmp_path):
    run = Run(tmp_path / "runs" / "mine").create(study.raw_text)
    keep_people(run, load_personas({"guest": "You are a guest.", "ada": "You are another Ada."}))
    kept_in(run, study)
    people, _ = read_people(run)
    assert people.prompts["guest"] == "You are a guest." and people.prompts["ada"] == OWN["ada"]
    assert people.named == set(OWN)
