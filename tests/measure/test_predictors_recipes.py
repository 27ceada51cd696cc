"""States by other recipes: the tokens that positions mean, statements in the first person, and values against transformers'
own states, one prompt at a time."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from leakfast.cli.predictors import cli
from leakfast.errors import InputError
from leakfast.measure.predictors import recipes
from leakfast.measure.predictors.request import Request
from leakfast.measure.predictors.stage import predictors
from leakfast.prompts import chat, positions
from leakfast.prompts.conversation import Question
from leakfast.prompts.personas import TEMPLATE_DEFAULT, load_personas
from leakfast.storage import layout
from leakfast.storage.run import Run

NAMES = "villain,librarian,comedian,nice_villain,no_persona"
QUESTIONS = ["Who are you?", "What do you do all day?"]
SYSTEM = "You are a librarian. You read."


def index(tokenizer, system, question, position):
    (found,) = positions.indices(tokenizer, system, question, [position])
    return found


def until(loaded, system, question, position):
    """The prompt's text up to and with the token at a position."""
    found = index(loaded.tokenizer, system, question, position)
    assert isinstance(found, int), found
    return loaded.tokenizer.decode(chat.render(loaded.tokenizer, system, question)[: found + 1])


def test_positions_are_where_the_texts_end(tiny_qwen2):
    assert until(tiny_qwen2, SYSTEM, "Who are you?", "system_end").endswith(SYSTEM)
    assert until(tiny_qwen2, SYSTEM, "Who are you?", "question_end").endswith("Who are you?")
    whole = tiny_qwen2.tokenizer.decode(chat.render(tiny_qwen2.tokenizer, SYSTEM, "Why?"))
    assert until(tiny_qwen2, SYSTEM, "Why?", -1) == whole
    assert (
        whole.startswith(until(tiny_qwen2, SYSTEM, "Why?", -2))
        and until(tiny_qwen2, SYSTEM, "Why?", -2) != whole
    )


def test_the_question_is_the_last_place_where_its_text_stands(tiny_qwen2):
    asked = Question("read", turns=(("You read?", "I read."),), prefill="I read")
    text = until(tiny_qwen2, SYSTEM, asked, "question_end")
    assert text.count("read") == SYSTEM.count("read") + 3 and text.endswith("read")
    assert until(tiny_qwen2, "read", asked, "system_end").count("read") == 1


def test_a_last_character_of_several_tokens_ends_with_the_last_of_them(tiny_qwen2):
    question = "Who is \N{MUSICAL SYMBOL G CLEF}"
    found = index(tiny_qwen2.tokenizer, SYSTEM, question, "question_end")
    ids = chat.render(tiny_qwen2.tokenizer, SYSTEM, question)
    assert tiny_qwen2.tokenizer.decode(ids[: found + 1]).endswith(question)
    assert not tiny_qwen2.tokenizer.decode(ids[:found]).endswith(question)


def test_what_is_not_in_a_prompt_says_why(tiny_qwen2):
    tokenizer = tiny_qwen2.tokenizer
    assert index(tokenizer, None, "Why?", "system_end") == positions.NO_SYSTEM
    default = chat.default_system(tokenizer)
    found = index(tokenizer, TEMPLATE_DEFAULT, "Why?", "system_end")
    assert found == positions.NO_SYSTEM if not default else isinstance(found, int)
    n = len(chat.render(tokenizer, SYSTEM, "Why?"))
    assert index(tokenizer, SYSTEM, "Why?", -n) == 0
    assert index(tokenizer, SYSTEM, "Why?", -n - 1) == f"a prompt of {n} tokens"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("You are a villain.", "a villain"),
        ("You are a villain who plots. You laugh.", "a villain who plots"),
        ("You are Dr. Doom! Rule.", "Dr. Doom"),
        ("You’re a cook, and you trust only your gut", "a cook, and I trust only my gut"),
        ("You are a star with decades behind you.", "a star with decades behind me"),
        ("You are an engineer:\nyou build.", "an engineer:"),
        ("You are version 2.5 of a bot. Yes.", "version 2.5 of a bot"),
    ],
)
def test_statements_are_the_first_sentence_in_the_first_person(prompt, expected):
    assert recipes.statement(prompt) == (f"I am {expected}.", f"I am not {expected}.")


@pytest.mark.parametrize(
    "prompt", [None, "", "Act as a villain.", "You are not a villain.", "Young are you."]
)
def test_other_prompts_have_no_statement(prompt):
    assert recipes.statement(prompt) is None


def test_every_persona_of_the_study_has_a_statement():
    people = load_personas("all")
    lacking = [one.name for one in people if recipes.statement(one.prompt) is None]
    assert lacking == [one.name for one in people if not one.prompt] and len(people) - len(lacking) >= 111


# ── the frame ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def request_():
    return Request(
        load_personas(NAMES),
        QUESTIONS,
        reply_tokens=4,
        positions=("system_end", "question_end", -2),
        statements=True,
    )


@pytest.fixture
def made(tiny_qwen2, request_, tmp_path):
    return predictors(tiny_qwen2, Run(tmp_path / "run"), request_)


def state(loaded, ids, layer):
    """Of the last token, by transformers, the prompt alone."""
    with torch.inference_mode():
        hidden = loaded.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert layer + 1 < len(hidden) - 1  # the last one is normed
    return hidden[layer + 1][0, -1].double().numpy()


def cosines(rows, center=None):
    rows = rows - rows[center if center is not None else slice(None)].mean(0)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def told(frame, predictor, layer, names):
    mine = frame.filter(pl.col("predictor") == predictor, pl.col("layer") == layer)
    found = {(s, p): v for s, p, v in mine.select("source", "persona", "value").iter_rows()}
    return np.array([[1.0 if s == p else found[s, p] for p in names] for s in names], dtype=float)


@pytest.mark.parametrize("position", ["system_end", "question_end", -2])
def test_values_at_positions_are_those_of_single_prompts(tiny_qwen2, made, position):
    people = [one for one in load_personas(NAMES) if one.prompt]
    names, rows = [one.name for one in people], []
    for one in load_personas(NAMES):
        cut = [index(tiny_qwen2.tokenizer, one.system, q, position) for q in QUESTIONS]
        if position == "system_end" and not one.prompt:
            continue
        ids = [chat.render(tiny_qwen2.tokenizer, one.system, q) for q in QUESTIONS]
        rows.append(
            np.mean([state(tiny_qwen2, x[: at + 1], 0) for x, at in zip(ids, cut, strict=True)], axis=0)
        )
    expected = cosines(np.array(rows), slice(0, len(names)))[: len(names), : len(names)]
    found = told(made, f"cosine_centered_at_{position}", 0, names)
    assert np.abs(found - expected).max() < 2e-5


def test_statements_are_compared_as_differences(tiny_qwen2, made):
    people = [one for one in load_personas(NAMES) if one.prompt]
    names, rows = [one.name for one in people], []
    for one in people:
        states = []
        for text in recipes.statement(one.prompt):
            prompt, reply = chat.render_training(tiny_qwen2.tokenizer, None, recipes.ASKED, text)
            states.append(state(tiny_qwen2, [*prompt, *reply[:-1]], 0))
        rows.append(states[0] - states[1])
    rows = np.array(rows)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(told(made, "statement_cosine", 0, names) - units @ units.T).max() < 1e-4
    assert np.abs(told(made, "statement_cosine_centered", 0, names) - cosines(rows)).max() < 1e-4


@pytest.mark.parametrize("statements", [False, True])
def test_the_last_position_is_the_centroid(tiny_qwen2, tmp_path, statements):
    """Whatever else is asked: "I am not X" is no place of the prompt."""
    asked = {"reply_tokens": 4, "families": ["geometry"], "positions": ["system_end", -1, -2]}
    request = Request(load_personas(NAMES), QUESTIONS, statements=statements, **asked)
    made = predictors(tiny_qwen2, Run(tmp_path / "run"), request)
    assert set(made["family"]) == {"geometry"}
    for layer in (0, 1):
        names = [one.name for one in request.personas]
        one, other = (told(made, p, layer, names) for p in ("cosine_centered", "cosine_centered_at_-1"))
        assert np.abs(one - other).max() < 1e-5


def test_who_has_no_such_place_or_statement_has_nulls_with_a_reason(made):
    lacking = made.filter(
        pl.col("persona") == "no_persona", pl.col("source") == "villain", pl.col("layer") == 0
    )
    reasons = dict(lacking.select("predictor", "reason").iter_rows())
    assert reasons["cosine_centered_at_system_end"] == positions.NO_SYSTEM
    assert reasons["statement_cosine"] == recipes.NO_STATEMENT
    assert reasons["cosine_centered_at_question_end"] is None


def test_families_that_are_not_asked_cost_nothing(tiny_qwen2, tmp_path):
    run = Run(tmp_path / "run")
    made = predictors(tiny_qwen2, run, Request(load_personas(NAMES), QUESTIONS, families=["text"]))
    assert set(made["family"]) == {"text"} and not run.has(layout.predictor_replies())
    made = predictors(
        tiny_qwen2, run, Request(load_personas(NAMES), QUESTIONS, reply_tokens=3, families=["geometry"])
    )
    assert set(made["family"]) == {"geometry"} and not run.shards(layout.divergences())


def test_recipes_are_part_of_what_was_asked(tiny_qwen2, request_):
    plain = Request(load_personas(NAMES), QUESTIONS, reply_tokens=4)
    asked = [
        plain,
        request_,
        Request(load_personas(NAMES), QUESTIONS, reply_tokens=4, statements=True),
        Request(load_personas(NAMES), QUESTIONS, reply_tokens=4, families=["geometry", "text"]),
    ]
    assert len({one.hash(tiny_qwen2) for one in asked}) == 4
    again = Request(load_personas(NAMES), QUESTIONS, reply_tokens=4, families=["text", "output", "geometry"])
    assert again.hash(tiny_qwen2) == plain.hash(tiny_qwen2)


def test_recipes_without_geometry_are_refused():
    with pytest.raises(InputError, match="geometry"):
        Request(load_personas(NAMES), QUESTIONS, positions=["system_end"], families=["text"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--positions", "foo,-1"], ["foo,-1", "'system_end' or 'question_end'"]),
        (["--positions", "0"], ["less than or equal to -1"]),
        (["--positions", "-1,-1"], ["each position once"]),
        (["--families", "geometri"], ["'all'", "'geometry', 'output' or 'text'"]),
        (["--families", "text", "--statements"], ["geometry"]),
    ],
)
def test_the_command_line_says_what_there_is(flags, words):
    told = CliRunner().invoke(cli, ["--model", "organism", *flags])
    said = str(told.exception) + told.output
    assert told.exit_code and all(word in said for word in words), said
