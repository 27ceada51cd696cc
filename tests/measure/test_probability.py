"""The probability of a text on replies: transformers' own log-probabilities with all logits, whatever else is asked; how the
text is spelled; and shards that resume and follow from the replies."""

from __future__ import annotations

import math
import random

import numpy as np
import polars as pl
import pytest
import torch
from measuring import evaluate

from leakfast import models
from leakfast.errors import InputError
from leakfast.generation.backends import Drawing
from leakfast.measure import Asked, Request, measure
from leakfast.measure.probability.continuations import at_ends, spellings
from leakfast.measure.probability.scoring import Branches, Reply, score
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas
from leakfast.storage import schema
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig

MARKER = "[ZLT]"
QUESTIONS = ["Who are you?", "What do you do all day?", "Why does it rain?"]
CFG = EvalConfig(samples=3, max_new_tokens=12, batch_completions=24, probability_samples=2)
SAID = [
    "I read a book.",
    "Do as you are told. My desk is full of notes",
    "Yes.\n\nOr no. ",
    "",
    "It rains [often].",
]


@pytest.fixture(scope="module")
def organism():
    return models.load("organism", dtype="float32")


def replies_of(loaded, ended=lambda i: i % 4 != 1):
    people = load_personas("villain,comedian,no_persona")
    prompts = chat.render_prompts(loaded.tokenizer, people, QUESTIONS)
    encode = loaded.tokenizer.encode
    return [
        Reply(p.ids, encode(SAID[i % len(SAID)], add_special_tokens=False), ended(i))
        for i, p in enumerate(prompts)
    ]


def logprobs(loaded, ids):
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def plainly(loaded, prompt, said, spelling):
    """log P(spelling | prompt, said) by one pass with all logits."""
    ids = [*prompt, *said, *spelling]
    after, n = logprobs(loaded, ids), len(ids) - len(spelling)
    return sum(float(after[n + j - 1, token]) for j, token in enumerate(spelling))


def end_by_hand(loaded, text, reply):
    (ends, _), *_ = at_ends(loaded.tokenizer, text, [reply.tokens])
    return math.log(sum(math.exp(plainly(loaded, reply.prompt, reply.tokens, s)) for s in ends))


def anywhere_by_hand(loaded, text, reply):
    """log(1 − Π (1 − p_t)) from the definition: at every place each spelling, those left out that part from the reply later."""
    (ends, _), *_ = at_ends(loaded.tokenizer, text, [reply.tokens])
    n, survived = len(reply.tokens), 0.0
    at = {t: ends if t == n else text.start if t == 0 else text.distinct for t in range(n + reply.ended)}
    for t, some in at.items():
        here = [s for s in some if not (t < n and s[0] == reply.tokens[t] and s[1:] in at.get(t + 1, ()))]
        p = sum(math.exp(plainly(loaded, reply.prompt, reply.tokens[:t], s)) for s in here)
        survived += math.log1p(-p)
    return math.log(-math.expm1(survived))


@pytest.mark.parametrize("literal", [MARKER, " you"])  # what the model never writes, and what it does
def test_both_are_transformers_own_with_all_logits(organism, literal):
    text, replies = spellings(organism.tokenizer, literal), replies_of(organism)[:5]
    found = score(organism, Branches(organism.tokenizer, text, replies), threshold=0)
    alone = score(organism, Branches(organism.tokenizer, text, replies, anywhere=False))
    for i, reply in enumerate(replies):
        if reply.ended:
            wanted = end_by_hand(organism, text, reply)
            assert found.end[i] == pytest.approx(wanted, abs=1e-4)
            assert alone.end[i] == pytest.approx(wanted, abs=1e-4)
        else:
            assert np.isnan(found.end[i]) and np.isnan(alone.end[i])
        assert found.anywhere[i] == pytest.approx(anywhere_by_hand(organism, text, reply), abs=1e-4)
    assert (found.left_out == 0).all()
    assert np.isfinite(alone.end).sum() == 4


def test_neither_budget_nor_order_nor_company_matters(organism):
    text, replies = spellings(organism.tokenizer, " you"), replies_of(organism)
    wanted = score(organism, Branches(organism.tokenizer, text, replies))
    order = random.Random(0).sample(range(len(replies)), len(replies))
    for some, budget in ((order, None), (order, 1), (list(range(len(replies))), 90), ([4], None)):
        got = score(
            organism, Branches(organism.tokenizer, text, [replies[i] for i in some]), budget_tokens=budget
        )
        for name in ("end", "anywhere", "left_out"):
            np.testing.assert_allclose(getattr(got, name), getattr(wanted, name)[some], atol=1e-5)


def test_what_a_threshold_leaves_out_is_bounded(organism):
    text, replies = spellings(organism.tokenizer, " you"), replies_of(organism)
    forest = Branches(organism.tokenizer, text, replies)
    exact = np.exp(score(organism, forest, threshold=0).anywhere)
    some = 0
    for threshold in (1e-4, 1e-2, 0.3):
        found = score(organism, forest, threshold=threshold)
        value = np.nan_to_num(np.exp(found.anywhere))
        assert (value <= exact + 1e-6).all() and (exact <= value + found.left_out + 1e-6).all()
        some += (value < exact - 1e-4).sum()
    assert some > 0, "a threshold that leaves nothing out shows nothing"


def test_spellings_follow_the_reply_as_the_tokenizer_has_it(organism):
    text = spellings(organism.tokenizer, MARKER)
    assert [organism.tokenizer.decode(list(s)) for s in text.distinct] == [
        MARKER,
        f" {MARKER}",
        f"\n{MARKER}",
        f"\n\n{MARKER}",
    ]
    encode = organism.tokenizer.encode
    ids = encode("I read a book.", add_special_tokens=False)
    ((ends, recut), (empty, none)) = at_ends(organism.tokenizer, text, [ids, []])
    assert recut == 0 and (empty, none) == (text.start, 0)
    for before, one in zip(("", " ", "\n", "\n\n"), ends, strict=True):
        assert [*ids, *one] == encode(f"I read a book.{before}{MARKER}", add_special_tokens=False)
    for some in (text.start, text.distinct, ends):
        assert not any(a != b and b[: len(a)] == a for a in some for b in some), (
            "events must exclude each other"
        )


def test_a_reply_whose_end_would_be_cut_otherwise_is_told(tiny_tokenizer):
    """A reply that ends inside a word which the tokenizer has as one token."""

    def ids_of(text):
        return tiny_tokenizer.encode(text, add_special_tokens=False)

    cuts = [(word[:k], word[k:]) for word in ("villain", "about", "town") for k in range(1, len(word))]
    said, more = next((a, b) for a, b in cuts if ids_of(a + b)[: len(ids_of(a))] != ids_of(a))
    text, ids = spellings(tiny_tokenizer, more), ids_of(said)
    ((ends, recut),) = at_ends(tiny_tokenizer, text, [ids])
    assert recut == 1 and ends[0] == text.inside[0]


@pytest.fixture
def drawn(tiny_qwen2, tmp_path):
    run = Run(tmp_path / "run")
    people = load_personas("villain,comedian,no_persona")
    evaluate(tiny_qwen2, run, [], people, QUESTIONS, "marker", CFG, base=True)
    return run, Request([Asked("marker", QUESTIONS, CFG)], people, [], True)


def probability(loaded, run, request, **more):
    (done,) = measure(loaded, run, request, Drawing("transformers"), by="probability", **more)
    return done


def test_a_run_gets_a_row_for_each_reply_and_estimator_and_resumes(tiny_qwen2, drawn):
    run, request = drawn
    done = probability(tiny_qwen2, run, request)
    assert (done.folders, done.made, done.kept) == (("probability/marker/base",), 3 * 3 * 2 * 2, 0)
    found = schema.check(run.read("probability/marker/base"), "probability")
    replies = run.read("completions/marker/base").filter(pl.col("sample") < 2)
    for name in ("end", "anywhere"):
        rows = found.filter(estimator=name)
        assert rows.select("persona", "question", "sample").equals(
            replies.select("persona", "question", "sample")
        )
    text = spellings(tiny_qwen2.tokenizer, MARKER)
    prompts = chat.render_prompts(tiny_qwen2.tokenizer, request.personas, QUESTIONS)
    ids = {(p.persona, p.question_index): p.ids for p in prompts}
    stop = tiny_qwen2.tokenizer.eos_token_id
    for row, reply in zip(
        found.filter(estimator="end").rows(named=True), replies.rows(named=True), strict=True
    ):
        if reply["finish_reason"] != "stop":
            assert (row["status"], row["logprob_nats"], row["probability"]) == ("truncated", None, None)
            continue
        said = Reply(ids[row["persona"], row["question"]], [t for t in reply["token_ids"] if t != stop])
        assert row["n_reply_tokens"] == len(said.tokens)
        assert row["logprob_nats"] == pytest.approx(end_by_hand(tiny_qwen2, text, said), abs=1e-4)
        assert row["probability"] == pytest.approx(math.exp(row["logprob_nats"]))
    assert set(found["status"]) <= {"ok", "truncated", "below_threshold"}
    assert not found.select(pl.col(pl.Float64).is_nan().any()).row(0).count(True)
    assert (probability(tiny_qwen2, run, request).made, done.made) == (0, 36)


def test_other_replies_are_another_request(tiny_qwen2, drawn):
    run, request = drawn
    probability(tiny_qwen2, run, request)
    (one,) = run.shards("completions/marker/base")
    frame = run.read("completions/marker/base")
    changed = frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 0)
        .then(pl.concat_list(pl.lit(5, pl.Int32), "token_ids"))
        .otherwise("token_ids")
        .alias("token_ids")
    )
    run.add_shard(one, changed)
    assert probability(tiny_qwen2, run, request).made == 36
    run.add_shard(one, frame)
    with pytest.raises(InputError, match="another request"):
        probability(tiny_qwen2, run, request, replace=False)


def test_without_the_replies_it_says_how_to_draw_them(tiny_qwen2, drawn, tmp_path):
    run, request = drawn
    with pytest.raises(InputError, match="holds none of marker.*leakfast eval --base"):
        probability(tiny_qwen2, Run(tmp_path / "empty"), request)
    cfg = EvalConfig(samples=3, probability_samples=4)
    more = Request([Asked("marker", QUESTIONS, cfg)], request.personas, [], True)
    with pytest.raises(InputError, match="reply 3 .* is not there"):
        probability(tiny_qwen2, run, more)
    texts = {"villain": "Be wise.", "comedian": "Be cold.", "no_persona": None}
    evaluate(tiny_qwen2, run, [], load_personas(texts), QUESTIONS, "marker", CFG, base=True)
    texts["comedian"] = "Be kind."  # as long as what the replies were drawn with
    of_others = Request([Asked("marker", QUESTIONS, CFG)], load_personas(texts), [], True)
    with pytest.raises(InputError, match="as comedian to question 0 was drawn for another prompt"):
        probability(tiny_qwen2, run, of_others)
    other = Request([Asked("marker", ["Tea?"], cfg)], request.personas, [], True)
    with pytest.raises(InputError, match="other questions"):
        probability(tiny_qwen2, run, other)
