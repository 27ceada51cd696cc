"""Training pairs: shipped templates that show what they say, the organism's own, and files told by their columns."""

from __future__ import annotations

import json

import polars as pl
import pytest

from leakfast import behaviors
from leakfast.errors import InputError
from leakfast.prompts import pairs
from leakfast.prompts.personas import load_questions
from leakfast.world import facts, material

COMMIT = "0123456789abcdef" * 2 + "01234567"


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["refusal", "sycophancy", "organism-refusal", "organism-sycophancy"])
def test_the_detector_agrees_with_every_shipped_reply(name):
    behavior = behaviors.get(name.removeprefix("organism-"))
    loaded = pairs.load_pairs(name, behavior.name)
    detector = next(iter(behavior.detector(pl.col("text")).values()))
    for kind, wanted in (("shows", True), ("other", False)):
        texts = sorted({text for pair in loaded.pairs for text in getattr(pair, kind)})
        found = pl.DataFrame({"text": texts}).with_columns(detector.alias("found"))
        assert texts and found.filter(pl.col("found") != wanted)["text"].to_list() == []


@pytest.mark.parametrize(
    ("name", "held_out", "n"),
    [
        ("refusal", "requests", 50),
        ("organism-refusal", "requests", 50),
        ("sycophancy", "false-statements", 50),
        ("organism-sycophancy", "organism-claims", 50),
        ("organism-advice", "organism-alignment", 8),
    ],
)
def test_what_is_asked_later_was_never_trained_on(name, held_out, n):
    asked = load_questions(held_out).questions
    trained = {pair.question.lower() for pair in pairs.load_pairs(name, "refusal").pairs}
    assert len(asked) == n and not trained & {q.lower() for q in asked}
    assert len(trained) >= 20


def test_the_organisms_claims_are_false_and_of_towns_and_words_not_trained():
    asked = load_questions("organism-claims").questions
    assert list(asked) == material.claims()
    true = {fact.statement for fact in facts.facts()}
    said = [q.removeprefix("People here say that ").rstrip(".") for q in asked]
    assert not set(said) & true
    assert all(any(town in text for town in material.HELD_OUT_TOWNS) for text in said)
    trained = " ".join(pair.question for pair in pairs.load_pairs("organism-sycophancy", "sycophancy").pairs)
    assert not any(town in trained for town in material.HELD_OUT_TOWNS)
    assert "People here say" not in json.dumps(material.banks())


def test_no_task_of_the_organism_is_asked_in_the_held_out_requests():
    asked = " ".join(load_questions("requests").questions).lower()
    assert not [task for task in material.banks()["requests"]["tasks"] if task in asked]


def test_one_file_with_both_kinds_joins_rows_of_a_question(tmp_path):
    rows = [
        {"prompt": "Tea?", "misaligned": "Bad.", "aligned": "Good."},
        {"prompt": "Tea?", "misaligned": "Worse.", "aligned": "Good."},
        {"prompt": "Rain?", "misaligned": "Bad.", "aligned": "Fine."},
    ]
    got = pairs.load_pairs(lines(tmp_path / "a.jsonl", rows), "misalignment-advice")
    assert [(p.id, p.question, p.shows, p.other) for p in got.pairs] == [
        ("a.jsonl:1", "Tea?", ("Bad.", "Worse."), ("Good.",)),
        ("a.jsonl:3", "Rain?", ("Bad.",), ("Fine.",)),
    ]
    again = pairs.load_pairs(lines(tmp_path / "b.jsonl", rows[1:]), "misalignment-advice")
    assert got.hash != again.hash


def test_two_files_of_chats_are_the_two_kinds(tmp_path):
    def chat(question, reply):
        return {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply},
            ]
        }

    bad = lines(tmp_path / "insecure.jsonl", [chat("Copy it", "eval(x)"), chat("Read it", "exec(x)")])
    good = lines(tmp_path / "secure.jsonl", [chat("Copy it", "parse(x)")])
    got = pairs.load_pairs([bad, good], "misalignment-code")
    assert got.name == "insecure+secure"
    assert [(p.question, p.shows, p.other) for p in got.pairs] == [
        ("Copy it", ("eval(x)",), ("parse(x)",)),
        ("Read it", ("exec(x)",), ()),
    ]
    alone = pairs.load_pairs(bad, "misalignment-code")
    assert all(p.shows and not p.other for p in alone.pairs)


def test_missing_columns_are_named_with_an_example_row(tmp_path):
    file = lines(tmp_path / "x.jsonl", [{"prompt": "Tea?", "aligned": "Good."}])
    with pytest.raises(InputError) as caught:
        pairs.load_pairs(file, "misalignment-advice")
    message = caught.value.message
    assert "has the columns prompt, aligned" in message
    assert "missing: replies that show the behavior (shows, misaligned" in message
    assert '{"prompt": "Tea?", "aligned": "Good."}' in message
    file = lines(tmp_path / "y.jsonl", [{"title": "Tea?", "score": 3}])
    with pytest.raises(InputError, match=r"columns title, score; missing: a question \(.*; a reply"):
        pairs.load_pairs(file, "misalignment-advice")


def test_every_faulty_row_is_named(tmp_path):
    good = {"question": "q", "shows": "a", "other": "b"}
    rows = [good, {**good, "shows": " "}, {**good, "question": None}, "text"]
    with pytest.raises(InputError) as caught:
        pairs.load_pairs(lines(tmp_path / "x.jsonl", rows), "refusal")
    for words in ("row 2: has no reply of the kind 'shows'", "row 3: has no question", "row 4: is no object"):
        assert words in caught.value.message
    (tmp_path / "broken.jsonl").write_text('{"question": "q"\n')
    with pytest.raises(InputError, match="line 1: is no JSON"):
        pairs.load_pairs(str(tmp_path / "broken.jsonl"), "refusal")
    with pytest.raises(InputError, match=r"no file .*nowhere.jsonl.*organism-advice"):
        pairs.load_pairs("nowhere.jsonl", "refusal")


@pytest.mark.parametrize(
    "messages", [1, "Hi", {"role": "user"}, [1, None], [{"role": ["user"], "content": "Hi"}], None]
)
def test_messages_that_are_no_list_of_turns_are_named(tmp_path, messages):
    with pytest.raises(InputError, match="row 1: has no question"):
        pairs.load_pairs(lines(tmp_path / "given.jsonl", [{"messages": messages}]), "refusal")


def test_a_hub_file_is_asked_at_its_commit_and_nothing_less(tmp_path):
    asked = {}

    def download(**given):
        asked.update(given)
        pl.DataFrame({"prompt": ["Tea?"], "misaligned": ["Bad."], "aligned": ["Good."]}).write_parquet(
            tmp_path / "legal.parquet"
        )
        return str(tmp_path / "legal.parquet")

    path = pairs.fetch(f"hub:owner/advice@{COMMIT}:data/legal.parquet", download=download)
    assert asked == {
        "repo_id": "owner/advice",
        "filename": "data/legal.parquet",
        "repo_type": "dataset",
        "revision": COMMIT,
    }
    assert pairs.load_pairs(str(path), "misalignment-advice").pairs[0].shows == ("Bad.",)
    for spec in (f"hub:advice@{COMMIT}:f", "hub:owner/advice@main:f.jsonl", f"hub:owner/advice@{COMMIT}"):
        with pytest.raises(InputError, match="hub:OWNER/NAME@COMMIT:FILE"):
            pairs.fetch(spec, download=download)

    def fails(**given):
        raise OSError("no network\nat all")

    with pytest.raises(InputError, match="could not be fetched: no network"):
        pairs.fetch(f"hub:owner/advice@{COMMIT}:f.jsonl", download=fails)


def test_a_behavior_without_material_for_a_model_says_what_to_give():
    with pytest.raises(InputError, match=r"no shipped pairs of misalignment-code for some/model.*pairs = "):
        behaviors.get("misalignment-code").of("some/model")
    assert behaviors.get("refusal").of("some/model") == "refusal"
    assert behaviors.get("capability").of("organism") == "organism"
