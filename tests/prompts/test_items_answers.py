"""How lists write the right answer: every usual spelling comes to the same items, one reading a list, and what can be
read in two ways is refused with the key that decides."""

from __future__ import annotations

import json
import logging

import pytest

from leakfast.errors import InputError
from leakfast.prompts.items import load_items

PLACES = (0, 3, 1, 2, 3, 0)  # of the right choice; from 0 and from 1 are told apart by 0 and by 4
CHOICES = [[f"{word}{i}" for word in ("oats", "corn", "rye", "beans")] for i in range(len(PLACES))]


def listed(**made) -> list[dict]:
    """A line an item; each key's function is given the place of the right choice and the item's choices."""
    lines = []
    for i, (place, choices) in enumerate(zip(PLACES, CHOICES, strict=True)):
        line = {"question": f"What grows in field {i}?", "choices": choices}
        lines.append(line | {key: make(place, choices) for key, make in made.items()})
    return lines


def letters(place, choices):
    return list("ABCD")


def digits(place, choices):
    return list("1234")


def onehot(place, choices):
    return [int(k == place) for k in range(4)]


SPELLINGS = {
    "labels": (listed(answer=lambda p, c: "ABCD"[p]), "answer read as labels"),
    "lower": (listed(labels=letters, answer=lambda p, c: "abcd"[p]), "answer read as labels"),
    "brackets": (listed(answer=lambda p, c: f"({'ABCD'[p]})"), "answer read as labels"),
    "dots": (listed(answer=lambda p, c: f"{'ABCD'[p]}."), "answer read as labels"),
    "spaces": (listed(answer=lambda p, c: f" {'ABCD'[p]} "), "answer read as labels"),
    "label and text": (listed(answer=lambda p, c: f"{'ABCD'[p]}. {c[p]}"), "answer read as labels"),
    "from 0": (listed(answer=lambda p, c: p), "answer read as places counted from 0"),
    "from 0 as text": (listed(gold=lambda p, c: str(p)), "gold read as places counted from 0"),
    "float": (listed(answer=lambda p, c: float(p)), "answer read as places counted from 0"),
    "from 0 beside digits": (
        listed(labels=digits, answer=lambda p, c: p),
        "answer read as places counted from 0",
    ),
    "from 1": (listed(answerKey=lambda p, c: str(p + 1)), "answerKey read as places counted from 1"),
    "digits as labels": (listed(labels=digits, answer=lambda p, c: str(p + 1)), "answer read as labels"),
    "numbers as labels": (
        listed(labels=lambda p, c: [1, 2, 3, 4], answer=lambda p, c: p + 1),
        "answer read as labels",
    ),
    "text": (listed(answer=lambda p, c: c[p].upper()), "answer read as texts of choices"),
    "text and letter": (
        listed(answer=lambda p, c: c[p], answer_idx=lambda p, c: "ABCD"[p]),
        "answer read as texts of choices; answer_idx read as labels",
    ),
    "a 1 among 0s": (listed(labels=onehot), "labels read as a 1 among 0s"),
    "TruthfulQA": (
        [
            {
                "question": line["question"],
                "mc1_targets": {"choices": line["choices"], "labels": line["labels"]},
            }
            for line in listed(labels=onehot)
        ],
        "labels read as a 1 among 0s",
    ),
    "ARC": (
        [
            {
                "question": line["question"],
                "choices": {"text": line["choices"], "label": list(names)},
                "answerKey": names[place],
            }
            for line, place, names in zip(listed(), PLACES, ["ABCD", "1234"] * 3, strict=True)
        ],
        "answerKey read as labels",
    ),
    "a dict of choices": (
        [
            {
                "question": line["question"],
                "options": dict(zip("ABCD", line["choices"], strict=True)),
                "answer": line["answer"],
            }
            for line in listed(answer=lambda p, c: "ABCD"[p])
        ],
        "answer read as labels",
    ),
    "words beside a letter": (
        listed(answer=lambda p, c: "because it rains", answer_idx=lambda p, c: "ABCD"[p]),
        "answer_idx read as labels; answer left aside, as it names no choices",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_comes_to_the_same_answers(name, caplog):
    lines, reading = SPELLINGS[name]
    with caplog.at_level(logging.INFO, "leakfast"):
        found = load_items(lines)
    assert [item.labels.index(item.answer) for item in found] == list(PLACES)
    assert [list(item.choices) for item in found] == CHOICES
    assert found.reading == reading and reading in caplog.text
    assert found.half("eval").sample(2).reading == reading


def test_without_a_zero_or_a_last_place_the_list_is_refused_until_it_says_which(tmp_path):
    kept = [line for line in listed(answerKey=lambda p, c: str(p)) if line["answerKey"] in "12"]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, kept)))
    with pytest.raises(InputError) as caught:
        load_items(path)
    said = caught.value.message
    assert "some.jsonl, line 1: answerKey is '1': choice B if these are places counted from 0, A if" in said
    assert '"answer_as": "index0" or "answer_as": "index1"' in said
    for reading, places in (("index0", [1, 2]), ("index1", [0, 1])):
        told = load_items([kept[0] | {"answer_as": reading}, *kept[1:]])
        assert [item.labels.index(item.answer) for item in told] == places


def test_numbers_beside_labels_that_are_digits_are_refused_where_both_fit():
    lines = [line for line in listed(labels=digits, answer=lambda p, c: p) if line["answer"] in (1, 2)]
    with pytest.raises(InputError, match="if these are labels"):
        load_items(lines)
    zero = [line | {"labels": list("0123")} for line in lines]  # the label 1 is the place 1, from 0
    assert [item.answer for item in load_items(zero)] == ["1", "2"]


def test_an_answer_of_another_kind_names_its_line():
    lines = listed(answer=lambda p, c: "ABCD"[p])
    lines[4]["answer"] = "E"
    with pytest.raises(
        InputError, match=r"item 5: answer is 'E', which cannot be read as labels \(labels A, B, C, D\)"
    ):
        load_items(lines)
    mixed = listed(answer=lambda p, c: p)
    mixed[2]["answer"] = 4
    with pytest.raises(
        InputError, match="item 3: answer is 4, which cannot be read as places counted from 0"
    ):
        load_items(mixed)


def test_two_keys_that_say_different_choices_are_refused():
    lines = listed(answer=lambda p, c: c[p], answer_idx=lambda p, c: "ABCD"[p])
    lines[1]["answer_idx"] = "A"
    with pytest.raises(InputError, match="item 2: answer says D and answer_idx says A"):
        load_items(lines)


def test_an_answer_that_is_absent_is_none_and_decides_nothing():
    lines = listed(answer=lambda p, c: p)
    lines[2]["answer"], lines[3]["answer"] = None, " "
    del lines[4]["answer"]
    assert [item.answer for item in load_items(lines)] == ["A", "D", None, None, None, "A"]


def test_yes_and_no_as_a_1_among_0s_are_told_from_the_labels_0_and_1():
    asked = [
        {"question": f"{i}?", "choices": ["yes", "no"], "labels": marks}
        for i, marks in enumerate(([0, 1], [1, 0]))
    ]
    assert [item.answer for item in load_items(asked)] == ["B", "A"]
    (plain,) = load_items([{"question": "?", "choices": ["yes", "no"], "labels": [0, 1], "answer": 1}])
    assert (plain.labels, plain.answer) == (("0", "1"), "1")


@pytest.mark.parametrize("given", ["index2", ["index0"], 0])
def test_another_word_for_a_reading_is_refused(given):
    lines = listed(answer=lambda p, c: p)
    lines[0]["answer_as"] = given
    with pytest.raises(
        InputError, match="item 1: answer_as is .* One of label, text, index0, index1, onehot"
    ):
        load_items(lines)
