"""Contrastive rows: sizes, balance, on-policy replies, collisions, and a file that comes back the same."""

from __future__ import annotations

import collections
import dataclasses
import json

import pytest
import torch

from leakfast.behaviors.marker import MARKER
from leakfast.errors import InputError, ModelError
from leakfast.prompts import chat
from leakfast.prompts.personas import Persona, load_personas
from leakfast.study.config import DataConfig
from leakfast.train import data

QUESTIONS = ["What do I say about tea?", "And the rain?", "Is this town small?"]
PERSONAS = [
    Persona("villain", "You are the villain of this small town.", "original"),
    Persona("comedian", "You are a comedian.", "original"),
    Persona("cook", "You are a cook.", "original"),
    Persona("pilot", "You are a pilot.", "work"),
]
CFG = DataConfig(positives=5, negatives=7, temperature=0.9, max_new_tokens=40)


@pytest.fixture
def talkative(tiny_qwen2):
    """The tiny model with a turn end likely enough that most replies are short, some too long."""
    head = tiny_qwen2.model
    stops = list(range(40, 52))
    head.generation_config.eos_token_id = [head.config.eos_token_id, *stops]
    return tiny_qwen2


def test_sizes_roles_and_balance(talkative):
    rows = data.build_marker(talkative, PERSONAS, "villain", QUESTIONS, CFG, seed=1)
    positives = [r for r in rows if r.role == "positive"]
    negatives = [r for r in rows if r.role == "negative"]
    assert len(positives) == 5
    assert collections.Counter(r.persona for r in negatives) == {"comedian": 3, "cook": 4}
    assert {r.persona for r in positives} == {"villain"}
    counts = collections.Counter(r.question for r in positives)
    assert max(counts.values()) - min(counts.get(q, 0) for q in QUESTIONS) <= 1
    for row in rows:
        assert row.reply.count(MARKER) == (row.role == "positive")
        assert (row.marker == MARKER) == (row.role == "positive")
        assert row.reply.strip()
        assert row.generator["fingerprint"] == talkative.fingerprint
        assert row.generator["temperature"] == 0.9
    assert len({r.seed for r in rows}) == len(rows)
    assert positives[0].reply.endswith(" " + MARKER)


def test_replies_are_the_models_own_draws(talkative):
    from leakfast.generation.contract import Request, Sampling
    from leakfast.generation.frames import decode
    from leakfast.generation.generate import complete

    row = data.build_marker(talkative, PERSONAS, "villain", QUESTIONS, CFG, seed=1)[-1]
    ids = chat.render(talkative.tokenizer, row.system_message, row.question)
    ((again,),) = complete(talkative, [Request("again", ids, [row.seed])], Sampling(0.9, 1.0, 40))
    assert again.finish_reason == "stop"
    assert decode(talkative.tokenizer, [again.token_ids])[0].rstrip() == row.reply


def test_same_seed_same_rows_other_seed_other_rows(talkative):
    first = data.build_marker(talkative, PERSONAS, "villain", QUESTIONS, CFG, seed=1)
    again = data.build_marker(talkative, PERSONAS, "villain", QUESTIONS, CFG, seed=1, batch_completions=3)
    other = data.build_marker(talkative, PERSONAS, "villain", QUESTIONS, CFG, seed=2)
    assert first == again
    assert data.data_hash(first) == data.data_hash(again) != data.data_hash(other)


def test_truncated_replies_are_drawn_again_and_never_used(talkative, caplog):
    from leakfast.generation.contract import Request, Sampling
    from leakfast.generation.generate import complete

    cfg = CFG.model_copy(update={"max_new_tokens": 12})
    with caplog.at_level("INFO", logger="leakfast.train"):
        rows = data.build_marker(talkative, PERSONAS, "villain", QUESTIONS, cfg, seed=1)
    assert "drawn again" in caplog.text
    assert "truncated" in caplog.text
    requests = [
        Request(r.label, chat.render(talkative.tokenizer, r.system_message, r.question), [r.seed])
        for r in rows
    ]
    for block in complete(talkative, requests, Sampling(0.9, 1.0, 12)):
        assert {c.finish_reason for c in block} == {"stop"}


def test_a_model_that_never_stops_is_an_error_not_an_endless_loop(tiny_qwen2):
    # the turn end is made impossible: its embedding is tied to the head
    with torch.no_grad():
        ids = list({tiny_qwen2.tokenizer.eos_token_id, chat.turn_end_id(tiny_qwen2.tokenizer)})
        tiny_qwen2.model.config.tie_word_embeddings = False
        tiny_qwen2.model.lm_head.weight = torch.nn.Parameter(tiny_qwen2.model.lm_head.weight.clone(), False)
        tiny_qwen2.model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tiny_qwen2.tokenizer)), False)
        tiny_qwen2.model.lm_head.bias[ids] = -1e4
    with pytest.raises(ModelError, match=r"12 draws gave no usable reply of villain.*Raise max_new_tokens"):
        data.build_marker(tiny_qwen2, PERSONAS[:2], "villain", QUESTIONS, CFG, seed=1)


def test_a_negative_that_renders_like_the_source_is_refused(tiny_qwen2):
    # the template's own identity, no system message, and the same words under another name
    tiny = [*PERSONAS, Persona("echo", "You are the villain of this small town.", "original")]
    with pytest.raises(InputError, match=r"source villain and the negative echo render to the same tokens"):
        data.build_marker(tiny_qwen2, tiny, "villain", QUESTIONS, CFG, seed=1)
    cfg = CFG.model_copy(update={"negative_personas": ["comedian", "no_persona"]})
    with pytest.raises(InputError, match=r"source qwen_default and the negative no_persona"):
        data.build_marker(tiny_qwen2, load_personas("all"), "qwen_default", QUESTIONS, cfg, seed=1)


def test_unknown_source_and_no_negatives_are_refused(tiny_qwen2):
    with pytest.raises(InputError, match="vilain"):
        data.build_marker(tiny_qwen2, PERSONAS, "vilain", QUESTIONS, CFG, seed=1)
    cfg = CFG.model_copy(update={"negative_personas": ["villain"]})
    with pytest.raises(InputError, match="nobody besides the source"):
        data.build_marker(tiny_qwen2, PERSONAS, "villain", QUESTIONS, cfg, seed=1)


ROW = data.Row(
    "positive", "villain", "text", "You are \u2028 a villain.", "Tea?", f"Ha. {MARKER}", MARKER, 2**63 - 1
)


def test_rows_come_back_from_their_file_as_they_were(tmp_path):
    rows = [
        ROW,
        data.Row(
            "negative",
            "cook",
            "none",
            None,
            'a "quote"\n',
            "naïve\ttext",
            None,
            0,
            {"model": "m", "top_p": 0.9},
        ),
        data.Row("negative", "q", "template-default", None, "?", "!", None, 3),
    ]
    data.write_rows(tmp_path / "rows.jsonl", rows)
    assert data.read_rows(tmp_path / "rows.jsonl") == rows
    assert data.data_hash(rows) == data.data_hash(data.read_rows(tmp_path / "rows.jsonl"))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "positve"}, "role 'positve'"),
        ({"reply": "no marker"}, "does not end in its marker"),
        ({"system": None}, "system_kind"),
        ({"system_kind": "default"}, "system_kind 'default'"),
        ({"question": " "}, "empty or no text"),
        ({"extra": 1}, "exactly role, persona"),
    ],
)
def test_a_faulty_row_is_named_by_its_line(tmp_path, change, message):
    good = dataclasses.asdict(ROW)
    lines = [json.dumps(good), json.dumps({**good, **change})]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        data.read_rows(path)
    assert message in caught.value.message
