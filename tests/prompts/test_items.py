"""Items: the spellings that other lists use, ids by content, a split that is the same everywhere, and ARC
from a hub that is a folder here."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner
from huggingface_hub.errors import LocalEntryNotFoundError

from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.prompts import items as stage
from leakfast.prompts.items import (
    HELLASWAG_REVISION,
    Item,
    fetch_arc,
    fetch_hellaswag,
    load_items,
    write_items,
)
from leakfast.world import facts

ROOT = Path(__file__).resolve().parents[2]
ARC = ROOT.parent / "shared" / "data" / "arc" / "arc_challenge_test.jsonl"
stored = pytest.mark.skipif(not ARC.is_file(), reason="the stored ARC items lie beside the project, not here")


def entry(i: int, **more) -> dict:
    return {"question": f"What is {i}?", "choices": [f"a{i}", f"b{i}", f"c{i}"], "answer": "B", **more}


@pytest.mark.parametrize(
    ("given", "labels", "answer"),
    [
        ({"choice_labels": ["1", "2"], "correct_answer": "2", "choices": ["x", "y"]}, ("1", "2"), "2"),
        ({"labels": [1, 2, 3], "choices": ["x", "y", "z"], "answer": 1}, ("1", "2", "3"), "1"),
        ({"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}, ("A", "B"), "B"),
        ({"choices": list("vwxyz"), "answer": 0}, tuple("ABCDE"), "A"),
        ({"choices": ["x", "y"], "answer": 2}, ("A", "B"), "B"),
        ({"choices": ["x", "y"], "answer": ""}, ("A", "B"), None),
        ({"choices": ["x", "y"]}, ("A", "B"), None),
    ],
)
def test_spellings(given, labels, answer):
    (item,) = load_items([{"question": "What?", **given}])
    assert (item.labels, item.answer, item.question) == (labels, answer, "What?")


def test_hellaswag_comes_by_the_same_door():
    (item,) = load_items([{"ctx": "A man", "endings": ["runs.", "flies.", "sings.", "sits."], "label": "2"}])
    assert (item.question, item.answer, item.choices[2]) == ("A man", "C", "sings.")


def test_an_id_is_given_or_the_contents_own():
    one, other = load_items([entry(1, id="ARC_7"), entry(2)])
    assert one.id == "ARC_7"
    assert other.id == load_items([entry(2)])[0].id != load_items([entry(3)])[0].id
    assert len(other.id) == 16


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"question": "x"'], "line 1: is no JSON"),
        (['{"question": "x", "choices": ["a"]}'], "line 1: needs choices"),
        (['{"choices": ["a", "b"]}'], "line 1: has no question"),
        (['{"question": "x", "choices": ["a", "b"], "labels": ["A"]}'], "line 1: has 2 choices"),
        (['{"question": "x", "choices": ["a", "b"], "labels": ["A", "A"]}'], "One different label a choice"),
        ([json.dumps(entry(1)), "", json.dumps(entry(1))], "line 3: the item"),
        (["[1]"], "is no object"),
        ([""], "is empty. Give at least one question"),
    ],
)
def test_every_fault_names_its_line(tmp_path, lines, said):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match="items: ") as caught:
        load_items(path)
    assert said in caught.value.message


def test_a_missing_file_and_an_unfetched_list_say_what_to_type(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no file"):
        load_items(tmp_path / "absent.jsonl")

    def empty_cache(**asked):
        assert asked["local_files_only"]
        raise LocalEntryNotFoundError("nothing here")

    with pytest.raises(InputError, match="leakfast fetch arc"):
        fetch_arc(offline=True, download=empty_cache)


def test_a_written_list_comes_back(tmp_path):
    given = load_items([entry(1), entry(2, answer=None), entry(3, id="x")])
    write_items(tmp_path / "list.jsonl", given)
    again = load_items(tmp_path / "list.jsonl")
    assert again.items == given.items
    assert again.hash == given.hash
    assert again.name == "list"


def test_halves_depend_on_the_set_alone():
    given = [entry(i) for i in range(101)]
    shuffled = random.Random(1).sample(given, len(given))
    renamed = [{**one, "id": str(i)} for i, one in enumerate(shuffled)]
    halves = [
        {which: {i.question for i in load_items(form).half(which)} for which in ("train", "eval")}
        for form in (given, shuffled, renamed)
    ]
    assert halves[0] == halves[1] == halves[2]
    assert (len(halves[0]["train"]), len(halves[0]["eval"])) == (50, 51)
    assert not halves[0]["train"] & halves[0]["eval"]
    ordered = [i.question for i in load_items(given).half("eval")]
    assert ordered == [one["question"] for one in given if one["question"] in halves[0]["eval"]]
    assert {i.question for i in load_items(given).half("train", seed=43)} != halves[0]["train"]


def test_a_question_in_several_orders_of_its_choices_lies_in_one_half():
    """Trained in one order and asked in another, it told of what was taught and not of what the model can do."""
    orders = (("x", "y", "z"), ("z", "x", "y"), ("Y", "z ", "x"))
    once = [{"question": f"Alone {i}?", "choices": ["a", "b"], "answer": "A"} for i in range(6)]
    often = [
        {"id": f"{i}-{k}", "question": f"Often {i}?", "choices": list(order), "answer": "C"}
        for i in range(8)
        for k, order in enumerate(orders)
    ]
    halves = [load_items([*once, *often]).half(which) for which in ("train", "eval")]
    asked = [{item.question for item in half} for half in halves]
    assert not asked[0] & asked[1] and sum(map(len, halves)) == 30
    assert 13 <= len(halves[0]) <= 15, "whole questions, half of the items at most"


def test_the_split_is_the_same_in_another_process():
    code = (
        "from leakfast.prompts.items import load_items\n"
        "s = load_items('organism')\nprint(s.hash, s.half('train').hash, s.half('eval').sample(9).hash)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("1", "2")
    }
    own = load_items("organism")
    assert found == {f"{own.hash} {own.half('train').hash} {own.half('eval').sample(9).hash}\n"}


@stored
def test_the_stored_arc_questions_halve_into_585_and_585():
    arc = load_items(ARC)
    assert (len(arc), len(arc.half("train")), len(arc.half("eval"))) == (1170, 585, 585)
    kinds = {len(item.labels) for item in arc}
    assert kinds == {3, 4, 5}
    assert sum(item.labels[0] == "1" for item in arc) == 22
    assert all(item.answer in item.labels for item in arc)
    # written down once: a change of the split would tear earlier results from their items
    assert arc.half("train").hash[:16] == "a7cb0e1ebe97d26e"


def test_the_prompt_is_the_studys():
    item = Item("x", "Why?", ("red", "blue", "green"), ("1", "2", "3"), "2")
    assert item.letters_prompt == "Why?\n\n(1) red\n(2) blue\n(3) green\n\nThe correct answer is ("


def test_the_organisms_items_are_its_facts_in_its_own_words():
    own = load_items("organism")
    by_id = {f"{fact.town.lower()}-{fact.relation}": fact for fact in facts.facts()}
    assert {item.id for item in own} == set(by_id)
    for item in own:
        fact = by_id[item.id]
        assert item.choices[item.labels.index(item.answer)] == fact.value
        asked = facts.Item(fact, item.question, item.choices, item.labels.index(item.answer))
        assert asked.prompt == item.letters_prompt
    places = [item.labels.index(item.answer) for item in own]
    assert all(70 < places.count(place) < 140 for place in range(4))


@pytest.fixture
def hub(tmp_path):
    """A hub that is one Parquet file in ARC's own shape; it notes what it is asked for."""
    rows = [
        {
            "id": f"Mercury_{i}",
            "question": f"Why {i}?",
            "answerKey": "A",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
        }
        for i in range(6)
    ]
    path = tmp_path / "test.parquet"
    pl.DataFrame(rows).write_parquet(path)
    asked = []

    def download(**what):
        asked.append(what)
        return str(path)

    return download, asked


def test_arc_is_fetched_at_the_pinned_revision(hub):
    download, asked = hub
    arc = fetch_arc(download=download)
    assert (arc.name, len(arc), arc[3].id, arc[3].answer) == ("arc", 6, "Mercury_3", "A")
    (what,) = asked
    assert what["revision"] == stage.ARC_REVISION and len(stage.ARC_REVISION) == 40
    assert (what["repo_id"], what["repo_type"]) == ("allenai/ai2_arc", "dataset")


def test_fetch_without_a_network_names_the_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment once
    done = CliRunner().invoke(group, ["fetch", "arc"])
    assert done.exit_code == 2
    assert "--items FILE" in done.output and ".." not in done.output


def test_hellaswag_is_fetched_at_the_pinned_revision_and_its_marks_are_taken_out(tmp_path):
    import polars as pl

    asked = {}

    def download(**given):
        asked.update(given)
        rows = {
            "activity_label": ["Tea", "Tea"],
            "ctx": ["[header] How to [title] Boil it. [step] He", "He"],
            "endings": [["pours.", "[substeps] sings."], ["pours.", "sings."]],
            "label": ["1", "0"],
        }
        pl.DataFrame(rows).write_parquet(tmp_path / "h.parquet")
        return str(tmp_path / "h.parquet")

    items = fetch_hellaswag(download=download)
    assert (asked["repo_id"], asked["revision"]) == ("Rowan/hellaswag", HELLASWAG_REVISION)
    first, second = items
    assert (first.id, first.question, first.choices, first.answer) == (
        "val-0",
        "Tea: How to Boil it. He",
        ("pours.", "sings."),
        "B",
    )
    assert (second.id, second.answer) == ("val-1", "A")


def test_the_organisms_stories_have_one_ending_that_follows():
    from leakfast.world.material import banks

    stories = banks()["scripts"]["stories"]
    items = load_items("organism-stories")
    assert len(items) == sum(len(steps) - 1 for steps in stories) == 48
    for item in items:
        _, index, cut = item.id.split("-")
        right = item.choices[item.labels.index(item.answer)]
        assert right == f"Then {stories[int(index)][int(cut)]}."
        assert len(set(item.choices)) == 4 and item.question.startswith("Continue the story: ")
    assert len({item.answer for item in items}) == 4
