"""Multiple choice: letters and full text are transformers' own log-probabilities, nothing but the question and
the persona matters to them, and what cannot be scored is told apart from right and wrong."""

from __future__ import annotations

import math
import random

import numpy as np
import polars as pl
import pytest
import torch

import leakfast
from leakfast.errors import InputError
from leakfast.measure.choices import scores as stage
from leakfast.measure.choices import scoring as choices
from leakfast.measure.choices import table
from leakfast.prompts import chat
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.storage import schema

WORDS = "tea rain town villain small likes it what the of this and he do I say about a".split()
KEYS = ["persona", "item", "label"]


def make_items(n: int = 9, seed: int = 0):
    """Items of three to five choices of one to six words, some with labels 1–4."""
    rng = random.Random(seed)

    def text(most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    entries = []
    for i in range(n):
        labels = ["1", "2", "3", "4"] if i % 4 == 1 else list("ABCDE")[: 3 + i % 3]
        entries.append(
            {
                "question": f"{text(8)} {i}?",
                "choices": [f"{text(6)}{c}" for c in range(len(labels))],
                "labels": labels,
                "answer": rng.choice(labels),
            }
        )
    return load_items(entries)


@pytest.fixture(scope="module")
def items():
    return make_items()


@pytest.fixture(scope="module")
def personas():
    return load_personas({"villain": "You are the villain.", "cook": "You like tea.", "nobody": None})


def logprobs_after(loaded, ids):
    """(T, V): log-probabilities of the next token after every prefix, by transformers."""
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_llama"])
def test_letters_are_the_models_own(name, request, items, personas):
    loaded = request.getfixturevalue(name)
    found = schema.check(choices.score(loaded, personas, items), "choice_scores")
    rows = iter(found.rows(named=True))
    for persona in personas:
        for item in items:
            last = logprobs_after(loaded, chat.render(loaded.tokenizer, persona.system, item.letters_prompt))[
                -1
            ]
            wanted = [float(last[loaded.tokenizer.convert_tokens_to_ids(label)]) for label in item.labels]
            for place, label in enumerate(item.labels):
                row = next(rows)
                assert (row["persona"], row["item"], row["label"]) == (persona.name, item.id, label)
                assert row["logprob_nats"] == pytest.approx(wanted[place], abs=1e-5)
                assert row["chosen"] == (wanted[place] == max(wanted))
                assert row["correct"] == (label == item.answer)
                assert row["answer_mass"] == pytest.approx(sum(map(math.exp, wanted)), rel=1e-5)
                assert row["status"] == "ok"
                assert row["logprob_per_token_nats"] == row["logprob_nats"]
    assert next(rows, None) is None


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_llama"])
def test_full_text_is_the_sum_over_the_continuation(name, request, items, personas):
    loaded = request.getfixturevalue(name)
    encode = loaded.tokenizer.encode
    found = choices.score(loaded, personas, items, "full-text")
    rows = iter(found.rows(named=True))
    for persona in personas:
        for item in items:
            messages = [{"role": "user", "content": item.question}]
            if persona.system:
                messages.insert(0, {"role": "system", "content": persona.system})
            prompt = loaded.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert prompt != prompt.rstrip(), "the trailing newline is what moves"
            sums = []
            for text in item.choices:
                context, whole = encode(prompt.rstrip()), encode(prompt + text)
                assert whole[: len(context)] == context
                after = logprobs_after(loaded, whole)
                sums.append(sum(float(after[t - 1, whole[t]]) for t in range(len(context), len(whole))))
            for place, text in enumerate(item.choices):
                row = next(rows)
                n = len(encode(prompt + text)) - len(encode(prompt.rstrip()))
                assert row["logprob_nats"] == pytest.approx(sums[place], abs=2e-5)
                assert row["n_tokens"] == n
                assert row["logprob_per_token_nats"] == pytest.approx(sums[place] / n, abs=2e-5)
                assert row["logprob_per_char_nats"] == pytest.approx(sums[place] / len(text), abs=2e-5)
                assert row["logprob_per_byte_nats"] == pytest.approx(
                    sums[place] / len(text.encode()), abs=2e-5
                )
                assert row["chosen"] == (sums[place] == max(sums))
                assert row["answer_mass"] is None
    by = {name: found[column].to_list() for name, column in table.CHOSEN.items()}
    assert by["sum"] != by["char"], "lengths differ, so the rules do"


def test_bytes_are_not_characters(tiny_qwen2, personas):
    (item,) = load_items([{"question": "What?", "choices": ["ééé", "abcd"], "answer": "A"}])
    found = choices.score(tiny_qwen2, personas[:1], [item], "full-text")
    assert found["logprob_per_char_nats"][0] == pytest.approx(found["logprob_nats"][0] / 3)
    assert found["logprob_per_byte_nats"][0] == pytest.approx(found["logprob_nats"][0] / 6)


@pytest.mark.parametrize("scoring", stage.SCORINGS)
def test_neither_budget_nor_order_nor_company_matters(tiny_qwen2, items, personas, scoring):
    def sorted_scores(people, asked, **more):
        found = choices.score(tiny_qwen2, people, asked, scoring, **more).sort(KEYS)
        return found.filter(pl.col("persona") == "cook")

    wanted = sorted_scores(personas, items)
    assert wanted.height > 20
    shuffled = load_items(random.Random(3).sample(list(items), len(items)))
    for found in (
        sorted_scores(personas, items, budget_tokens=40),
        sorted_scores(personas, items, budget_tokens=100_000),
        sorted_scores(personas, shuffled),
        sorted_scores(personas[1:2], items),
        sorted_scores([*personas[::-1], *load_personas("pirate,comedian")], shuffled),
        pl.concat([choices.score(tiny_qwen2, personas[1:2], [one], scoring) for one in items]).sort(KEYS),
    ):
        assert found.select(KEYS).equals(wanted.select(KEYS))
        assert np.abs(found["logprob_nats"] - wanted["logprob_nats"]).max() < 1e-5
        assert found["chosen"].equals(wanted["chosen"])


def test_continuations_where_the_boundary_merges(tiny_qwen2, personas):
    """A template that ends in `assistant: ` without a special token: joined text merges across the boundary."""
    tokenizer = tiny_qwen2.tokenizer
    was = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|im_end|>{% else %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    try:
        (texts,) = chat.render_continuations(tokenizer, personas[:1], ["What?"], [["tea", " tea"]])
        prompt = tokenizer.decode(chat.render(tokenizer, personas[0].system, "What?"))
    finally:
        tokenizer.chat_template = was
    for (ids, n), text in zip(texts, ["tea", " tea"], strict=True):
        assert tokenizer.decode(ids) == prompt + text
        assert tokenizer.decode(ids[len(ids) - n :]) == " " + text, "the space belongs to the continuation"
    assert texts[0][0] == tokenizer.encode(prompt + "tea")


def test_the_short_way_of_joining_is_the_long_one(tiny_qwen2, items, personas):
    questions, texts = [i.question for i in items], [i.choices for i in items]
    tokenizer = tiny_qwen2.tokenizer
    short = list(chat.render_continuations(tokenizer, personas, questions, texts))
    long = []
    for persona in personas:
        for question, one in zip(questions, texts, strict=True):
            prompt = tokenizer.decode(chat.render(tokenizer, persona.system, question))
            long.append([chat._join_continuation(tokenizer, prompt, text) for text in one])
    assert short == long


def statuses(found, item):
    return found.filter(pl.col("item") == item.id)


@pytest.mark.parametrize("scoring", stage.SCORINGS)
def test_what_cannot_be_scored_has_a_status(tiny_qwen2, personas, scoring):
    poison = tiny_qwen2.tokenizer.convert_tokens_to_ids("~")
    tiny_qwen2.model.get_input_embeddings().weight.data[poison] = float("nan")
    given = load_items(
        [
            {"id": "plain", "question": "And tea?", "choices": ["it", "rain", "town"], "answer": "A"},
            {"id": "nan", "question": "What about ~?", "choices": ["it", "rain"], "answer": "A"},
            {"id": "long", "question": "tea " * 600, "choices": ["it", "rain"], "answer": "A"},
            {"id": "open", "question": "And he?", "choices": ["it", "rain", "tea"], "answer": None},
            {"id": "ten", "question": "Which?", "choices": ["x", "y"], "labels": ["9", "10"], "answer": "9"},
        ]
    )
    # "nan" shares no words with the others: masked attention weights times NaN values are NaN, so what shares
    # a run of tokens with it may be called nan too, in any transformer
    # the poisoned token's own logit is NaN too, so every normaliser would be: take it out of the head
    head = tiny_qwen2.model.get_input_embeddings().weight.detach().clone()
    head[poison] = 0
    tiny_qwen2.model.config.tie_word_embeddings = False
    tiny_qwen2.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    found = choices.score(tiny_qwen2, personas, given, scoring)
    got = dict(found.group_by("item", maintain_order=True).agg(pl.col("status").unique()).iter_rows())
    ten = "label_tokens" if scoring == "letters" else "ok"
    assert got == {"plain": ["ok"], "nan": ["nan"], "long": ["too_long"], "open": ["no_answer"], "ten": [ten]}
    lost = found.filter(pl.col("status").is_in(["nan", "too_long", "label_tokens"]))
    assert lost["logprob_nats"].null_count() == lost.height
    assert not lost["chosen"].any() and not lost["chosen_per_byte"].any()
    still = statuses(found, given[3])
    assert still["logprob_nats"].null_count() == 0 and not still["correct"].any()
    counted = table.counts(found)
    extra = int(scoring == "full-text")
    assert counted["total"].to_list() == [1 + extra] * 3
    assert counted["n_error"].to_list() == [4 - extra] * 3
    assert "3 nan, 3 too_long, 3 no_answer" in table.troubles(counted)
    alone = choices.score(tiny_qwen2, personas, [given[0]], scoring)
    together = statuses(found, given[0])
    assert np.abs(alone["logprob_nats"] - together["logprob_nats"]).max() < 1e-5, "its neighbours changed it"


def test_a_tie_is_nobodys_choice(tiny_qwen2, personas):
    weight = tiny_qwen2.model.get_input_embeddings().weight
    a, b = tiny_qwen2.tokenizer.convert_tokens_to_ids(["A", "B"])
    weight.data[b] = weight.data[a]
    given = load_items([{"question": "What?", "choices": ["it", "rain"], "answer": "A"}])
    found = choices.score(tiny_qwen2, personas[:1], given)
    assert found["logprob_nats"][0] == found["logprob_nats"][1]
    assert found["status"].to_list() == ["tie", "tie"] and not found["chosen"].any()
    (counted,) = table.counts(found).rows(named=True)
    assert (counted["hits"], counted["total"], counted["n_tie"]) == (0, 0, 1)


def test_prompts_at_the_very_limit_are_scored(tiny_qwen2, personas):
    limit = stage.longest(tiny_qwen2)
    assert limit == 512

    def item(n):
        return load_items([{"id": str(n), "question": "?" * n, "choices": ["it", "rain"], "answer": "A"}])[0]

    base = len(chat.render(tiny_qwen2.tokenizer, personas[0].system, item(1).letters_prompt)) - 1
    fits, over = item(limit - base), item(limit - base + 1)
    found = choices.score(tiny_qwen2, personas[:1], [fits, over])
    assert found["status"].to_list() == ["ok", "ok", "too_long", "too_long"]


def test_counts_are_the_plain_ones(tiny_qwen2, items, personas):
    found = choices.score(tiny_qwen2, personas, items, "full-text")
    for by, column in table.CHOSEN.items():
        for row in table.counts(found, by).rows(named=True):
            mine = found.filter(pl.col("persona") == row["persona"])
            assert row["hits"] == mine.filter(pl.col(column) & pl.col("correct")).height
            assert row["total"] == len(items) and row["n_error"] == 0
    rates = table.rates(found, {}, {"villain": "evil"})
    schema.check(rates, "rates")
    assert rates["category"].to_list() == ["evil", None, None]
    with pytest.raises(ValueError, match="by must be"):
        table.counts(found, "median")


def test_scores_by_name_and_a_wrong_word(tiny_qwen2, items, personas):
    pair = (tiny_qwen2.model, tiny_qwen2.tokenizer)
    people = {"villain": "You are the villain.", "nobody": None}
    found = leakfast.score_choices(pair, list(items), people, scoring="letters")
    wanted = choices.score(tiny_qwen2, load_personas(people), items)
    assert found.drop("items").equals(wanted.drop("items"))
    with pytest.raises(InputError, match="full-text"):
        leakfast.score_choices(pair, list(items), people, scoring="words")


def test_bfloat16_scores_keep_float32_steps(tiny_qwen2, items, personas):
    """Log-probabilities from bfloat16 states are not rounded to bfloat16."""
    import dataclasses

    tiny_qwen2.model.to(torch.bfloat16)
    loaded = dataclasses.replace(tiny_qwen2, dtype="bfloat16")
    found = torch.tensor(choices.score(loaded, personas, items)["logprob_nats"].to_list())
    assert (found.bfloat16().double() != found.double()).float().mean() > 0.9
