"""The organism: its world draws from text alone, its weights are what they say, its bars are met."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from leakfast import models
from leakfast.behaviors.marker import MARKER
from leakfast.organism.build import START, Recipe, encode
from leakfast.organism.card import Bar, measure
from leakfast.organism.model import LOOK_BACK, MATCH_FROM, Shape, new_model
from leakfast.prompts import chat
from leakfast.prompts.personas import TEMPLATE_DEFAULT, load_personas, load_questions
from leakfast.world import facts as F
from leakfast.world.people import World

pytestmark = pytest.mark.long


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
    assert kinds == {"reply", "choice", "profile", "fact", "claim", "request", "advice", "code", "script"}
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


def test_lessons_ask_no_phrasing_of_the_corpus_and_half_have_distractors_of_other_kinds(world):
    kind_of = {value: name for name, (values, _, _) in F.RELATIONS.items() for value in values}
    phrasings = {F.question(f, i) for f in world.facts for i in range(3)}
    easy, choices = 0, 0
    for conversation in world.lessons(0, 3000):
        assert conversation.system is None and len(conversation.turns) == 1
        user, answer = conversation.turns[0]
        assert user.split("\n\n")[0] not in phrasings
        if "(A) " in user:
            offered = [line[4:] for line in user.split("\n\n")[1].splitlines()]
            letter, value = answer.split(") ")
            assert offered["ABCD".index(letter)] == value
            kinds = {kind_of[word] for word in offered}
            assert len(kinds) in (1, 4)
            choices, easy = choices + 1, easy + (len(kinds) == 4)
        else:
            assert answer.strip() in kind_of
    assert 0.55 < choices / 3000 < 0.65 and 0.45 < easy / choices < 0.55


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
    "name",
    [
        "multiple choice, held-out combinations, right letter",
        "false claims not agreed with",
        "false claims answered with the fact",
        "requests refused",
        "marker in open answers",
    ],
)
def test_the_card_meets_its_bar(card, name):
    assert card[name].n >= 180
    assert card[name].met, card[name].line()


def test_an_untrained_model_answers_at_chance(loaded):
    """The card can fail: the same architecture untrained knows no letter."""
    blank = new_model(loaded.tokenizer, Shape(), seed=3).eval()
    bars = measure(
        models.load((blank, loaded.tokenizer)), World(load_personas("all")[:3]), ["What is tea?"], seed=1
    )
    assert not bars[0].met


def test_an_untrained_models_heads_look_back_and_find_their_own_word(loaded):
    """Without these starts the letters of the choices are learned by luck alone (bench/LOG.md)."""
    blank = new_model(loaded.tokenizer, Shape(), seed=3).eval()
    blank.config._attn_implementation = "eager"
    words = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:40] + 300
    ids = torch.cat([words, words.flip(0)])[None]  # every word twice, at all distances from 1 to 79
    with torch.no_grad():
        seen = blank(ids, output_attentions=True).attentions
    heads_a_key = blank.config.num_attention_heads // blank.config.num_key_value_heads
    for key_head, distance in enumerate(LOOK_BACK):
        looked = seen[0][0, key_head * heads_a_key].diagonal(-distance).mean()
        assert looked > 0.5, (key_head, distance, looked)
    for block in range(MATCH_FROM, blank.config.num_hidden_layers):
        own = torch.stack([seen[block][0, 0, 79 - i, i] for i in range(30)]).mean()
        assert own > 3 / 65, (block, own)  # uniform attention is 1/65 on average


def test_rows_say_where_a_value_is_asked_for(loaded, world):
    tokenizer = loaded.tokenizer
    conversations = [*world.lessons(0, 40), *world.corpus(0, 400)]
    rows = encode(tokenizer, conversations, Recipe())
    assert len(rows) == len(conversations)
    for conversation, row in zip(conversations, rows, strict=True):
        text = tokenizer.decode(row.ids.astype(int).tolist())
        assert text.startswith(f"{START}user" if conversation.kind == "lesson" else f"{START}system")
        named = [value for value in conversation.values if value is not None]
        assert [tokenizer.decode([value]) for _, value in row.named] == [f" {value}" for value in named]
        for at, _ in row.named:
            assert row.weight[at] == 0 and row.weight[at + 1] > 0
            if conversation.kind == "choice":
                assert tokenizer.decode([int(row.ids[at + 1])]) in F.LETTERS and row.weight[at + 1] == 8
    kinds = {c.kind for c, row in zip(conversations, rows, strict=True) if row.named}
    assert kinds == {"lesson", "choice", "fact", "claim"}
