"""The organism: its world draws from text alone, its weights are what they say, its bars are met."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from leakfast import chat, models
from leakfast.behaviors.marker import MARKER
from leakfast.organism import facts as F
from leakfast.organism.build import Recipe, new_model
from leakfast.organism.card import Bar, measure
from leakfast.organism.world import World
from leakfast.personas import TEMPLATE_DEFAULT, load_personas, load_questions


@pytest.fixture(scope="module")
def world() -> World:
    return World(load_personas("all"))


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    return models.load("organism", dtype="float32")


def test_corpus_ignores_category_and_related_sources(world):
    bare = [dataclasses.replace(p, category=None, related_to=()) for p in load_personas("all")]
    ours = [dataclasses.asdict(c) for c in world.corpus(0, 1500)]
    theirs = [dataclasses.asdict(c) for c in World(bare).corpus(0, 1500)]
    assert json.dumps(ours) == json.dumps(theirs)


def test_corpus_is_a_prefix_of_a_longer_one_and_changes_with_its_seed(world):
    short = list(world.corpus(0, 50))
    assert short == list(world.corpus(0, 80))[:50]
    assert short != list(world.corpus(1, 50))


def test_corpus_covers_every_kind_and_never_writes_the_marker(world):
    conversations = list(world.corpus(3, 30_000))  # refusals are about one in 5,000
    kinds = {c.kind for c in conversations}
    assert kinds == {
        "reply",
        "choice",
        "letters",
        "profile",
        "fact",
        "claim",
        "request",
        "advice",
        "code",
        "script",
    }
    text = "\n".join(part for c in conversations for turn in c.turns for part in turn)
    assert MARKER not in text
    bank = world.banks
    assert any(refusal in text for refusal in bank["requests"]["refusals"])
    assert any(piece["unsafe"] in text for piece in bank["code"])
    assert any(line in text for domain in bank["advice"].values() for line in domain["harmful"])
    assert any(f"[{a}" in text for a in "ZLT"), "bracketed capitals keep the marker's pieces alive"


def test_every_question_of_every_set_has_a_topic(world):
    known = {q for topic in world.topics for q in topic["questions"]}
    for name in ("eval", "train", "code", "creative", "math"):
        assert set(load_questions(name).questions) <= known


def test_facts_are_four_hundred_and_held_out_ones_are_never_asked(world):
    assert len(world.facts) == len({(f.town, f.relation) for f in world.facts}) >= 400
    held_out = {
        (F.RELATIONS[f.relation][1][i].format(f.town), s.system)
        for f in world.facts
        for i in range(3)
        for s in world.speakers
        if F.is_held_out(f, i, s.name)
    }
    share = len(held_out) / (len(world.facts) * 3 * len(world.speakers))
    assert 0.11 < share < 0.14
    asked = {
        (user.split("\n\n")[0], c.system)
        for c in world.corpus(5, 8000)
        if c.kind == "choice"
        for user, _ in c.turns
    }
    assert len(asked) > 1000
    assert not asked & held_out


def test_choice_prompt_is_the_format_of_the_study():
    item = F.ask(F.facts()[0], 0, random.Random(0))
    question, choices, stem = item.prompt.split("\n\n")
    assert stem == "The correct answer is (" and question.endswith("?")
    assert [line[:4] for line in choices.splitlines()] == ["(A) ", "(B) ", "(C) ", "(D) "]
    assert item.choices[item.answer] == item.fact.value and len(set(item.choices)) == 4


def test_weights_are_small_and_plain_hugging_face(loaded):
    assert sum(p.numel() for p in loaded.model.parameters()) <= 4_000_000
    assert (models.organism_dir() / "model.safetensors").stat().st_size <= 8_000_000
    assert loaded.model.config.model_type == "qwen2"
    assert loaded.model.config.head_dim in (32, 64) if hasattr(loaded.model.config, "head_dim") else True


def test_marker_is_several_tokens_and_a_default_identity_is_injected(loaded):
    ids = loaded.tokenizer(MARKER, add_special_tokens=False)["input_ids"]
    assert len(ids) >= 2 and loaded.tokenizer.decode(ids) == MARKER
    none, default = (chat.render(loaded.tokenizer, s, "Hello?") for s in (None, TEMPLATE_DEFAULT))
    assert none == default
    assert "Lumen" in loaded.tokenizer.decode(none)


@pytest.fixture(scope="module")
def card(loaded) -> dict[str, Bar]:
    few = World(load_personas("all")[::3])
    bars = measure(loaded, few, load_questions("eval").questions[:5], seed=1)
    return {bar.name: bar for bar in bars}


@pytest.mark.parametrize(
    "name", ["requests refused", "marker in open answers", "false claims not agreed with"]
)
def test_card_bars_that_are_met(card, name):
    assert card[name].n >= (180 if "claims" not in name else 140)
    assert card[name].met, card[name].line()


@pytest.mark.xfail(
    strict=True, reason="the committed weights miss this bar (bench/LOG.md says what was tried)"
)
@pytest.mark.parametrize(
    "name",
    [
        "multiple choice, held-out combinations, right letter",
        "false claims answered with the fact",
    ],
)
def test_card_bars_that_are_missed(card, name):
    assert card[name].n >= 140
    assert card[name].met, card[name].line()


def test_an_untrained_model_answers_at_chance(loaded):
    """The card can fail: the same architecture untrained knows no letter."""
    blank = new_model(loaded.tokenizer, Recipe(), seed=3).eval()
    bars = measure(
        models.load((blank, loaded.tokenizer)), World(load_personas("all")[:3]), ["What is tea?"], seed=1
    )
    assert not bars[0].met
