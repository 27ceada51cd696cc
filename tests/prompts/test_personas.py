"""Persona and question sets: the shipped ones, a user's own, and every fault with its line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from leakfast.errors import InputError
from leakfast.prompts.chat import collisions
from leakfast.prompts.personas import TEMPLATE_DEFAULT, Persona, load_personas, load_questions, read_personas
from leakfast.prompts.questions import QuestionSet, read_questions
from leakfast.storage.documents import parse_toml, resource

PUBLISHED = Path(__file__).resolve().parents[3] / "shared/data/published/single_token_100_persona"


def fault(read, path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    return caught.value.message


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_personas():
    everyone = load_personas("all")
    assert len(everyone) == 111
    assert Counter(p.category for p in everyone)["original"] == 11
    assert len({p.category for p in everyone}) == 11
    assert all(p.kind == "text" and p.prompt.startswith("You are ") for p in everyone)
    assert len({p.prompt for p in everyone}) == 111
    assert all(p.prompt.count(".") == 1 and p.prompt.endswith(".") for p in everyone), "one sentence"
    by_name = {p.name: p for p in everyone}
    assert by_name["assistant"].prompt == "You are a helpful assistant."


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the study's stored results are not beside this checkout")
def test_the_shipped_personas_are_the_studys():
    stored = json.loads((PUBLISHED / "villain" / "marker_eval.json").read_text())
    ours = {p.name: (p.category, list(p.related_to)) for p in load_personas("all")}
    assert ours == {name: (row["category"], row["related_to"]) for name, row in stored.items()}
    assert list(ours) == list(stored), "same order"


def test_the_extras_join_only_when_named():
    assert not any(p.is_extra for p in [*load_personas("all"), *load_personas("originals")])
    default, nobody = load_personas("qwen_default,no_persona")
    assert default.system is TEMPLATE_DEFAULT
    assert default.kind == "template-default"
    assert nobody.system is None
    assert nobody.kind == "none"
    assert len(load_personas(["all", "no_persona"])) == 112


def test_the_shipped_questions():
    sets = {name: load_questions(name) for name in ("eval", "train", "code", "creative", "math")}
    assert {name: len(questions) for name, questions in sets.items() if name != "train"} == {
        "eval": 20,
        "code": 20,
        "creative": 20,
        "math": 20,
    }
    assert len(sets["train"]) >= 60
    every = [question for questions in sets.values() for question in questions.questions]
    assert len({question.lower() for question in every}) == len(every), "the sets are disjoint"


def test_specs_mean_what_they_say(tmp_path):
    assert [p.name for p in load_personas(" villain, comedian,villain ")] == ["villain", "comedian"]
    assert [p.name for p in load_personas(["pirate"])] == ["pirate"]
    people = load_personas({"cook": "You are a cook.", "nobody": None, "default": TEMPLATE_DEFAULT})
    assert [p.kind for p in people] == ["text", "none", "template-default"]
    assert load_personas(people) == people
    assert load_personas("cook,qwen_default", among=people)[0].prompt == "You are a cook."
    assert load_personas("all", among=people) == people
    given = load_questions(["Why?", "How?"])
    assert given == QuestionSet("list", ("Why?", "How?"))
    assert load_questions(given) is given


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vilain", "Did you mean villain?"),
        (["villain", "qwerty"], "'qwerty'"),
        ("", "none were named ('' given)"),
        (" , ", "none were named"),
        ([], "none were named"),
        ({"cook": ""}, "empty prompt"),
        ({"Cook!": "You are a cook."}, "Write cook."),
        ({}, "no personas"),
        ("nowhere.toml", "no such file"),
    ],
)
def test_specs_that_mean_nothing(spec, words):
    with pytest.raises(InputError) as caught:
        load_personas(spec)
    assert words in caught.value.message


BAD = """\
[[persona]]
name = "Bad Name"
prompt = "You are bad."

[[persona]]
name = "empty"
prompt = "  "

[[persona]]
name = "both"
prompt = "You are both."
no_system = true

[[persona]]
name = "typo"
promt = "You are."

[[persona]]
name = "twin"
prompt = "You are one."

[[persona]]
name = "twin"
prompt = "You are two."

[[persona]]
prompt = "You are nameless."

[[persona]]
name = "pooled"
prompt = "You are pooled."

[[persona]]
name = "number"
prompt = 3
related_to = "villain"
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (2, "Write bad_name"),
        (7, "'empty' has an empty prompt"),
        (12, "'both' has no_system, prompt: they exclude each other"),
        (16, "Did you mean prompt?"),
        (14, "'typo' has no prompt"),
        (22, "the name 'twin' was given before"),
        (26, "without a name"),
        (30, "'pooled' means something else"),
        (35, "a prompt that is no text"),
        (36, "related_to is a list"),
    ],
)
def test_every_faulty_block_is_named_with_its_line(tmp_path, line, words):
    path = write(tmp_path, "bad.toml", BAD)
    at = f"{path}, line {line}: "
    found = [part for part in fault(read_personas, path).split("\n") if at in part]
    assert any(words in part for part in found), found


def test_an_unknown_relation_is_named(tmp_path):
    text = '[[persona]]\nname = "cook"\nprompt = "You are a cook."\nrelated_to = ["villain", "vilain", "waiter"]\n'
    text += '[[persona]]\nname = "waiter"\nprompt = "You are a waiter."\n'
    found = fault(read_personas, write(tmp_path, "p.toml", text))
    assert "line 4: related_to names 'vilain'" in found
    assert "'villain'" not in found
    assert "'waiter'" not in found


@pytest.mark.parametrize(
    "text",
    [
        '{"persona": [{"name": "cook", "prompt": "You are a cook."}, {"name": "nobody", "no_system": true}]}',
        '[{"name": "cook", "prompt": "You are a cook."}, {"name": "nobody", "no_system": true}]',
        '{"cook": "You are a cook.", "nobody": null}',
    ],
)
def test_json_files_say_the_same(tmp_path, text):
    path = write(tmp_path, "p.json", text)
    assert load_personas(str(path)) == [
        Persona("cook", "You are a cook.", None, (), "text"),
        Persona("nobody", None, None, (), "none"),
    ]


def test_faults_in_json_have_lines(tmp_path):
    path = write(tmp_path, "p.json", '{\n "cook": "You are a cook.",\n "Waiter": "You are."\n}')
    assert f"{path}, line 3: the name 'Waiter'" in fault(read_personas, path)
    path = write(tmp_path, "q.json", '[\n {"name": "a",\n  "prompt": ""}\n]')
    assert f"{path}, line 3: persona 'a' has an empty prompt" in fault(read_personas, path)


def test_a_file_without_personas(tmp_path):
    for text in ("", "[persona]\nname = 'x'\n", "personas = 3\n"):
        assert "holds no personas" in fault(read_personas, write(tmp_path, "p.toml", text))
    text = '[[persona]]\nname = "a"\nprompt = "b"\n[extra]\n'
    assert "line 4: unknown key extra" in fault(read_personas, write(tmp_path, "p.toml", text))


def test_an_empty_question_is_named_by_index_and_line(tmp_path):
    text = resource("questions.toml").read_text(encoding="utf-8")
    document = parse_toml(text, "questions.toml")
    line = document.line(("sets", "eval", "questions", 7))
    lines = text.split("\n")
    lines[line - 1] = '  "",'
    path = write(tmp_path, "q.toml", "\n".join(lines))
    assert f"{path}, line {line}: question 7 of set 'eval' is empty" in fault(read_questions, path)
    with pytest.raises(InputError, match="question 7"):
        load_questions(f"{path}:eval")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('questions = ["a", 3]', "question 1 of set 'q' is no text"),
        ('questions = ["a",\n"b",\n"a"]', "line 3: question 2 of set 'q' is question 0 again"),
        ("questions = []", "is empty. Add a question"),
        ('[sets.a]\nquestons = ["a"]', "has no list"),
        (
            '[sets.a]\nquestions = ["a"]\ndescripton = "x"',
            "line 3: unknown key descripton. Did you mean description",
        ),
        ("x = 1", "holds no questions"),
    ],
)
def test_faulty_question_files(tmp_path, text, words):
    assert words in fault(read_questions, write(tmp_path, "q.toml", text))


def test_question_files_load_by_name(tmp_path):
    one = write(tmp_path, "one.toml", 'questions = ["Why?"]')
    assert load_questions(one) == QuestionSet("one", ("Why?",))
    two = write(tmp_path, "two.json", '{"sets": {"a": {"questions": ["A?"]}, "b": {"questions": ["B?"]}}}')
    assert load_questions(f"{two}:b").questions == ("B?",)
    with pytest.raises(InputError, match=r"two\.json:a"):
        load_questions(str(two))
    with pytest.raises(InputError, match="Did you mean eval"):
        load_questions("evall")


def test_collisions_are_found_by_rendered_tokens(tiny_tokenizer):
    people = load_personas("villain,qwen_default,no_persona")
    twin = Persona("tiny", "You are Tiny, a small model.", None)  # what the template injects by itself
    assert collisions(tiny_tokenizer, [*people, twin]) == [["qwen_default", "no_persona", "tiny"]]
    assert collisions(tiny_tokenizer, load_personas("originals")) == []


def test_a_set_may_be_another_with_words_behind_each(tmp_path):
    short, bare = load_questions("eval-short"), load_questions("eval")
    assert short.questions == tuple(f"{q} Answer in one short sentence." for q in bare.questions)
    assert not set(short.questions) & set(load_questions("train-short").questions)
    file = tmp_path / "own.toml"
    file.write_text('[sets.a]\nquestions = ["What?"]\n[sets.b]\nof = "c"\nsuffix = " Now."\n')
    with pytest.raises(InputError, match=r"line 4.*another set of this file"):
        load_questions(f"{file}:b")
    file.write_text('[sets.a]\nquestions = ["What?"]\n[sets.b]\nof = "a"\n')
    with pytest.raises(InputError, match="without a suffix"):
        load_questions(f"{file}:b")
    assert load_questions("requests-short").questions[0].startswith(load_questions("requests").questions[0])
    assert len(load_questions("requests-short").questions) == 20
    file.write_text('[sets.a]\nquestions = ["What?"]\n[sets.b]\nof = "a"\nsuffix = " Now."\nfirst = 2\n')
    with pytest.raises(InputError, match=r"line 6.*from 1 to 1"):
        load_questions(f"{file}:b")
