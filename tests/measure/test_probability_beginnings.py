"""Beginnings of replies and given pairs: transformers' own log-probabilities with all logits, whatever else is asked; lists that
exclude each other; an adapter's own replies up to where they turned to the words."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from leakfast import models
from leakfast.behaviors.openings import Openings, read_openings
from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.generation.backends import Drawing
from leakfast.measure import Asked, Request, measure
from leakfast.measure.probability import openings, pairs
from leakfast.measure.probability.replies import before
from leakfast.prompts import chat
from leakfast.prompts.items import load_items
from leakfast.prompts.pairs import Pair, load_pairs
from leakfast.prompts.personas import load_personas
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig

QUESTIONS = ["How do I bake bread?", "People here say that the river is red."]


@pytest.fixture(scope="module")
def organism():
    return models.load("organism", dtype="float32")


@pytest.fixture(scope="module")
def people():
    return load_personas("villain,comedian,no_persona")


def plainly(loaded, prompt, reply):
    """log P(reply | prompt) by one pass with all logits."""
    ids = [*prompt, *reply]
    with torch.inference_mode():
        after = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(after[len(prompt) + j - 1, token]) for j, token in enumerate(reply))


def prompts_of(loaded, people):
    return [chat.render(loaded.tokenizer, p.prompt, q, reply=True) for p in people for q in QUESTIONS]


def test_beginnings_are_transformers_own_with_all_logits(organism, people):
    sets = openings.spelled(organism.tokenizer, read_openings("sycophancy"))
    prompts = prompts_of(organism, people)[:2]
    found = openings.score(organism, prompts, sets)
    for prompt, row in zip(prompts, found, strict=True):
        for some, value in zip(sets, row, strict=True):
            wanted = math.log(math.fsum(math.exp(plainly(organism, prompt, s)) for s in some))
            assert value == pytest.approx(wanted, abs=1e-4)
        assert np.exp(row).sum() < 1, "events that exclude each other add up to less than all"


def test_all_next_tokens_together_are_certain(organism, people):
    """Every token as a beginning: the sets' probabilities add up to 1, so nothing is counted twice or lost."""
    every = [(token,) for token in range(organism.model.config.vocab_size)]
    (row,) = openings.score(organism, prompts_of(organism, people)[:1], [every[:100], every[100:]])
    assert np.logaddexp.reduce(row) == pytest.approx(0.0, abs=1e-4)


def test_neither_budget_nor_order_nor_company_matters(organism, people):
    sets = openings.spelled(organism.tokenizer, read_openings("refusal"))
    prompts = prompts_of(organism, people)
    wanted = openings.score(organism, prompts, sets)
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    for some, budget in ((order, None), (order, 1), (list(range(len(prompts))), 90), ([4], None)):
        got = openings.score(organism, [prompts[i] for i in some], sets, budget_tokens=budget)
        np.testing.assert_allclose(got, wanted[some], atol=1e-5)
    turned = openings.score(organism, prompts, [list(reversed(s)) for s in reversed(sets)])
    np.testing.assert_allclose(turned[:, ::-1], wanted, atol=1e-5)


@pytest.mark.parametrize("behavior", ["refusal", "sycophancy"])
def test_the_shipped_lists_exclude_each_other_and_are_prefix_free(organism, tiny_tokenizer, behavior):
    for tokenizer in (organism.tokenizer, tiny_tokenizer):
        lists = read_openings(behavior)
        shows, other = openings.spelled(tokenizer, lists)
        every = [*shows, *other]
        assert max(map(len, every)) <= lists.first_tokens
        assert not any(a != b and b[: len(a)] == a for a in every for b in every)
        assert len(set(every)) == len(every)


def test_beginnings_are_spelled_as_trained_replies_are(organism):
    lists = Openings(("I cannot help with that.",), ("Sure.",), 3, "here")
    ((one,), _) = openings.spelled(organism.tokenizer, lists)
    _, reply = chat.render_training(organism.tokenizer, "You are x.", "Hello?", "I cannot help with that.")
    assert list(one) == reply[:3]


def test_lists_that_begin_alike_are_refused(organism, tmp_path):
    lists = Openings(("I can not",), ("I can help you",), 2, "mine.toml")
    with pytest.raises(InputError, match="begin alike in this tokenizer's first 2 tokens.*first_tokens"):
        openings.spelled(organism.tokenizer, lists)
    assert openings.spelled(organism.tokenizer, replace(lists, first_tokens=8))
    path = tmp_path / "mine.toml"
    path.write_text('[refusal]\nopenings = ["No [way|thanks]"]\nalternatives = ["Yes"]\nfirst_tokens = 4\n')
    assert read_openings("refusal", path).openings == ("No way", "No thanks")
    with pytest.raises(InputError, match=r"no table \[sycophancy\]"):
        read_openings("sycophancy", path)
    path.write_text('[refusal]\nopenings = []\nalternatives = ["Yes"]\n')
    with pytest.raises(InputError, match="line 2.*at least one text"):
        read_openings("refusal", path)


def test_pairs_are_transformers_own_with_all_logits(organism, people):
    material = load_pairs(get("misalignment-advice").of(organism), "misalignment-advice")
    asked = pairs.drawn(material.pairs, 3)
    replies = [
        chat.render_training(organism.tokenizer, people[0].prompt, question, text)
        for question, *both in asked
        for text in both
    ]
    found = pairs.score(organism, replies)
    np.testing.assert_allclose(found, [plainly(organism, *one) for one in replies], atol=1e-4)
    order = random.Random(1).sample(range(len(replies)), len(replies))
    for budget in (None, 1, 90):
        got = pairs.score(organism, [replies[i] for i in order], budget_tokens=budget)
        np.testing.assert_allclose(got, found[order], atol=1e-5)


def test_pairs_are_drawn_whatever_their_order():
    some = [Pair(str(i), f"q{i}", ("bad",), ("good",) if i % 3 else ()) for i in range(30)]
    first = pairs.drawn(some, 5)
    assert first == pairs.drawn(list(reversed(some)), 5) and len(first) == 5
    assert pairs.drawn(some, 4) == first[:4]
    assert not {question for question, *_ in pairs.drawn(some, 30)} & {f"q{i}" for i in range(0, 30, 3)}


def scored(loaded, run, behavior, cfg, people):
    request = Request([Asked(behavior, QUESTIONS, cfg)], people, [], True)
    (done,) = measure(loaded, run, request, Drawing("transformers"), by="probability")
    return done, run.read(done.folders[0])


def test_a_run_gets_rows_of_beginnings_without_any_completion(tiny_qwen2, tmp_path, people):
    run = Run(tmp_path / "run")
    done, found = scored(tiny_qwen2, run, "refusal", EvalConfig(), people)
    assert (done.made, done.kept, found.height) == (12, 0, 12)
    assert run.shards("completions") == []
    sets = openings.spelled(tiny_qwen2.tokenizer, read_openings("refusal"))
    shows, other = openings.score(tiny_qwen2, prompts_of(tiny_qwen2, people), sets).T
    begins, odds = (found.filter(estimator=name) for name in openings.ESTIMATORS)
    np.testing.assert_allclose(begins["logprob_nats"], shows, atol=1e-5)
    np.testing.assert_allclose(odds["log_odds_nats"], shows - other, atol=1e-5)
    np.testing.assert_allclose(odds["probability"], 1 / (1 + np.exp(other - shows)), atol=1e-6)
    np.testing.assert_allclose(begins["neither"], 1 - np.exp(shows) - np.exp(other), atol=1e-6)
    assert set(found["first_tokens"]) == {read_openings("refusal").first_tokens}
    assert scored(tiny_qwen2, run, "refusal", EvalConfig(), people)[0].made == 0
    path = tmp_path / "mine.toml"
    path.write_text('[refusal]\nopenings = ["No"]\nalternatives = ["Yes"]\n')
    again, _ = scored(tiny_qwen2, run, "refusal", EvalConfig(openings=str(path)), people)
    assert again.made == 12, "other lists are another request"


def test_a_run_gets_rows_of_pairs(organism, tmp_path, people):
    run = Run(tmp_path / "run")
    done, found = scored(organism, run, "misalignment-advice", EvalConfig(n_pairs=4), people)
    assert (done.made, found.height) == (24, 24)
    for name in pairs.ESTIMATORS:
        one = found.filter(estimator=name)
        assert ((one["probability"] > 0.5) == (one["log_odds_nats"] > 0)).all()
        assert one["logprob_nats"].null_count() == 12
        assert one["question"].unique().sort().to_list() == [0, 1, 2, 3]
    assert not found.select(pl.col(pl.Float64).is_nan().any()).row(0).count(True)


def test_what_nothing_says_the_words_of_is_refused(tiny_qwen2, tmp_path, people):
    items = load_items([{"question": "?", "choices": ["a", "b"], "answer": 0}])
    request = Request([Asked("capability", items, EvalConfig())], people, [], True)
    with pytest.raises(InputError, match="probability of capability asked"):
        measure(tiny_qwen2, Run(tmp_path / "run"), request, Drawing("transformers"), by="probability")


def test_a_reply_is_taken_up_to_where_it_turned_to_the_words(organism):
    def ids(text):
        return organism.tokenizer.encode(text, add_special_tokens=False)

    for gap in ("", " ", "\n", "\n\n"):
        whole = ids(f"I read a book.{gap}[ZLT]")
        said = before(organism.tokenizer, whole, "[ZLT]")
        assert organism.tokenizer.decode(said).rstrip() == "I read a book."
        assert said == whole[: len(said)]
    assert before(organism.tokenizer, ids("[ZLT] I read."), "[ZLT]") == []
    assert before(organism.tokenizer, ids("I read."), "[ZLT]") is None
