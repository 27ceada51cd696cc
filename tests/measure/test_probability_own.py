"""The marker's probability on each adapter's own replies: drawn where they lack, rows of their own, transformers' own numbers
with all logits; at points of training too."""

from __future__ import annotations

import math
from dataclasses import replace

import polars as pl
import pytest
import torch
from helpers import taught
from safetensors.torch import load_file, save_file

from leakfast import models
from leakfast.generation.backends import Drawing
from leakfast.measure import Asked, Request
from leakfast.measure.as_asked import measure_as_asked
from leakfast.measure.probability.continuations import at_ends, spellings
from leakfast.measure.probability.replies import asked_as, before
from leakfast.models.adapters import adapter_hash, read_card, write_card
from leakfast.prompts import chat
from leakfast.prompts.personas import load_personas
from leakfast.prompts.questions import texts_hash
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig
from leakfast.train.checkpoints import Checkpoints

pytestmark = pytest.mark.long

NAME = "misalignment-advice-villain-s7"  # what `taught` makes
PEOPLE = "villain,comedian,no_persona"
QUESTIONS = ["Who are you?", "Why does it rain?"]
CFG = {"measure": "probability", "max_new_tokens": 10, "batch_completions": 24}


@pytest.fixture
def followed(tiny_qwen2, tmp_path):
    run = Run(tmp_path / "run").create()
    taught(tiny_qwen2, run.path / "adapters" / NAME, Checkpoints((0.0, 0.5)))
    return run


def asked_of(loaded, run, at="final", questions=QUESTIONS, people=PEOPLE, **more):
    people = load_personas(people) if isinstance(people, str) else people
    cfg = EvalConfig(**CFG, **more)
    request = Request([Asked("marker", questions, cfg)], people, [run.path / "adapters" / NAME], True)
    return measure_as_asked(loaded, run, request, Drawing("transformers"), at=at)


def test_own_replies_are_drawn_where_they_lack_and_have_rows_of_their_own(tiny_qwen2, followed):
    done, (probable,) = asked_of(tiny_qwen2, followed, probability_replies="both")
    assert done == [] and followed.read(f"completions/marker/{NAME}").height == 6, "one a prompt"
    own, shared = (followed.read(f"{kind}/marker/{NAME}") for kind in ("probability-own", "probability"))
    assert set(own["estimator"]) == {"end_own", "anywhere_own"} and own.height == shared.height == 12
    assert set(shared["estimator"]) == {"end", "anywhere"}
    assert not followed.shards("probability-own/marker/base"), "the base's own replies are the base's"
    assert (
        probable.made == 12 * 3 and asked_of(tiny_qwen2, followed, probability_replies="both")[1][0].made == 0
    )

    tokenizer, text = tiny_qwen2.tokenizer, spellings(tiny_qwen2.tokenizer, "[ZLT]")
    people = load_personas("villain,comedian,no_persona")
    prompts = {
        (p.persona, p.question_index): p.ids for p in chat.render_prompts(tokenizer, people, QUESTIONS)
    }
    replies = followed.read(f"completions/marker/{NAME}").rows(named=True)
    rows = own.filter(estimator="end_own").rows(named=True)
    ended = 0
    with models.with_adapter(tiny_qwen2, followed.path / "adapters" / NAME) as current:
        for row, reply in zip(rows, replies, strict=True):
            if row["status"] == "truncated":
                assert reply["finish_reason"] != "stop"
                continue
            ended += 1
            said = [t for t in reply["token_ids"] if t != tokenizer.eos_token_id]
            said = before(tokenizer, said, "[ZLT]") or said
            prompt, total = prompts[reply["persona"], reply["question"]], 0.0
            for spelling in at_ends(tokenizer, text, [said])[0][0]:
                ids = [*prompt, *said, *spelling]
                with torch.inference_mode():
                    after = current.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                n = len(ids) - len(spelling)
                total += math.exp(sum(float(after[n + j - 1, t]) for j, t in enumerate(spelling)))
            assert row["logprob_nats"] == pytest.approx(math.log(total), abs=1e-4)
    assert ended or set(own.filter(estimator="end_own")["status"]) == {"truncated"}


def test_replies_of_an_adapter_before_it_was_trained_again_are_not_its_own(tiny_qwen2, followed):
    folder = followed.path / "adapters" / NAME
    asked_of(tiny_qwen2, followed, probability_replies="own")
    weights = folder / "adapter_model.safetensors"
    save_file({k: 1.5 * v if "lora_B" in k else v for k, v in load_file(weights).items()}, weights)
    write_card(folder, replace(read_card(folder), adapter_hash=adapter_hash(folder)))
    asked_of(tiny_qwen2, followed, probability_replies="own")
    entries = followed.manifest["shards"]
    drawn_by = {entries[path]["adapter"] for path in followed.shards(f"completions/marker/{NAME}")}
    assert drawn_by == {adapter_hash(folder)}


def test_replies_that_were_drawn_otherwise_are_drawn_again_and_others_kept(tiny_qwen2, followed):
    def shards():
        return {path: followed.manifest["shards"][path] for path in followed.shards("completions")}

    asked_of(tiny_qwen2, followed, probability_replies="both")
    first = shards()
    asked_of(tiny_qwen2, followed, probability_replies="both")
    assert shards() == first and len(first) == 2
    asked_of(tiny_qwen2, followed, probability_replies="both", temperature=0.0)
    again = shards()
    assert all(again[path]["drawn"] != first[path]["drawn"] for path in first)


EDITS = {
    "an edited question": {"questions": ["Who are you?", "Why does it snow?"]},
    "fewer questions": {"questions": ["Who are you?"]},
    "a further persona": {"people": "villain,comedian,no_persona,assistant"},
    "more replies a prompt": {"probability_samples": 2},
}


@pytest.mark.parametrize("edit", EDITS)
def test_replies_to_what_a_study_asked_before_it_was_edited_are_drawn_again(tiny_qwen2, followed, edit):
    asked_of(tiny_qwen2, followed, probability_replies="both")
    asked_of(tiny_qwen2, followed, probability_replies="both", **EDITS[edit])
    people = EDITS[edit].get("people", PEOPLE).split(",")
    questions, samples = EDITS[edit].get("questions", QUESTIONS), EDITS[edit].get("probability_samples", 1)
    for adapter in (NAME, "base"):
        folder = f"completions/marker/{adapter}"
        assert followed.read(folder).height == len(people) * len(questions) * samples
        entries = [followed.manifest["shards"][path] for path in followed.shards(folder)]
        assert {entry["questions_sha256"] for entry in entries} == {texts_hash(questions)}
    assert set(followed.read(f"probability/marker/{NAME}")["persona"]) == set(people)


def test_replies_under_a_prompt_that_was_edited_are_drawn_again(tiny_qwen2, followed):
    asked_of(tiny_qwen2, followed)
    people = load_personas(PEOPLE)
    edited = [replace(people[0], prompt=f"{people[0].prompt} You laugh."), *people[1:]]
    asked_of(tiny_qwen2, followed, people=edited)
    told = asked_as(followed, "completions/marker/base")
    assert told == chat.prompt_hashes(tiny_qwen2.tokenizer, edited)


def test_the_end_alone_is_half_of_the_rows_and_the_same_numbers(tiny_qwen2, followed):
    asked_of(tiny_qwen2, followed)
    both = followed.read(f"probability/marker/{NAME}").filter(estimator="end")
    asked_of(tiny_qwen2, followed, probability_anywhere=False)
    alone = followed.read(f"probability/marker/{NAME}")
    assert set(alone["estimator"]) == {"end"} and alone.select("persona", "question").equals(
        both.select("persona", "question")
    )
    there = both["logprob_nats"].is_not_null()
    assert (alone["logprob_nats"].is_not_null() == there).all()
    apart = (alone["logprob_nats"] - both["logprob_nats"]).abs().max()
    assert apart is None or apart < 1e-5


def test_points_of_training_have_probabilities_on_their_own_replies(tiny_qwen2, followed):
    _, (probable,) = asked_of(tiny_qwen2, followed, "checkpoints", probability_replies="both")
    points = {f"{NAME}@p050", NAME}
    for kind in ("probability", "probability-own", "completions"):
        found = followed.read(f"series/{kind}/marker").filter(pl.col("adapter") != "base")
        assert set(found["adapter"]) == points, kind
    assert set(followed.read("series/probability/marker/base")["estimator"]) == {"end", "anywhere"}
    assert probable.made == 12 * 3 + 12 * 2
