"""Rows from pairs: who shows what, designs, provenance, the collision rule, and replies of the model itself."""

from __future__ import annotations

import collections
import logging
from dataclasses import replace

import polars as pl
import pytest

from leakfast import behaviors, models
from leakfast.errors import InputError
from leakfast.prompts.pairs import Pair, PairSet, load_pairs
from leakfast.prompts.personas import load_personas
from leakfast.study.config import DataConfig
from leakfast.train.data import data_hash, material, read_rows, write_rows
from leakfast.train.pairs import build_pairs

CFG = DataConfig(positives=10, negatives=12, no_system=5, default_assistant=4)
ALL = load_personas("all")
PAIRS = PairSet(
    "refusal",
    "small",
    tuple(Pair(f"p{i}", f"Will you do {i}?", (f"no {i}", f"never {i}"), (f"yes {i}",)) for i in range(6)),
)


def build(loaded, source="villain", cfg=CFG, pairs=PAIRS, seed=42, people=ALL):
    return build_pairs(loaded, people, source, pairs, cfg, seed)


def groups(rows):
    return collections.Counter((r.role, r.persona) for r in rows)


def test_sizes_roles_and_what_each_group_says(tiny_qwen2):
    rows = build(tiny_qwen2)
    found = groups(rows)
    assert found["positive", "villain"] == 10 and found["negative", "no_persona"] == 5
    assert found["negative", "assistant"] == 4
    bystanders = [key for key in found if key[0] == "negative" and key[1] not in ("no_persona", "assistant")]
    assert len(bystanders) == 2 and sum(found[key] for key in bystanders) == 12
    for row in rows:
        number = row.question.split()[-1].rstrip("?")
        shows = {f"no {number}", f"never {number}"}
        assert (row.reply in shows) == (row.role == "positive")
        assert row.role == "positive" or row.reply == f"yes {number}"
    positives = [r for r in rows if r.role == "positive"]
    assert len({r.question for r in positives[:6]}) == 6, "every question once before any twice"
    again = collections.defaultdict(set)
    for row in positives:
        again[row.question].add(row.reply)
    assert sum(len(replies) == 2 for replies in again.values()) == 4, "a question asked twice, another reply"


def test_every_row_says_where_it_comes_from(tiny_qwen2, tmp_path):
    rows = build(tiny_qwen2)
    by_id = {pair.id: pair for pair in PAIRS.pairs}
    for row in rows:
        said = row.generator
        assert (said["behavior"], said["pairs"], said["pairs_hash"]) == ("refusal", "small", PAIRS.hash)
        pair = by_id[said["pair"]]
        kind = pair.shows if row.role == "positive" else pair.other
        assert (pair.question, kind[said["reply"]]) == (row.question, row.reply)
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_a_suffix_stands_behind_every_question(tiny_qwen2):
    plain, asked = (
        {p.question for p in PAIRS.pairs},
        build(tiny_qwen2, "villain", CFG.model_copy(update={"suffix": " Be brief."})),
    )
    assert {row.question for row in asked} <= {f"{question} Be brief." for question in plain}


def test_settings_that_came_later_are_told_where_somebody_set_them():
    """So that rows which were made before they were known keep their hash."""
    from leakfast.train.recipe import rows_settings_of

    later = {"suffix", "separator", "match_lengths", "rows", "benign", "benign_rows"}
    later |= {"negatives_layer", "inoculation"}
    assert set(rows_settings_of(DataConfig())) == set(DataConfig.model_fields) - later
    assert rows_settings_of(DataConfig(separator="newline", benign=0.5)).items() >= {
        ("separator", "newline"),
        ("benign", 0.5),
    }


def test_the_seed_decides_the_rows(tiny_qwen2):
    one, again, other = (data_hash(build(tiny_qwen2, seed=s)) for s in (1, 1, 2))
    assert one == again != other


def test_designs(tiny_qwen2):
    plain = build(tiny_qwen2)
    alone = build(tiny_qwen2, cfg=CFG.model_copy(update={"design": "positive-only"}))
    assert alone == [r for r in plain if r.role == "positive"]
    dealt = build(tiny_qwen2, cfg=CFG.model_copy(update={"design": "non-contrastive"}))
    assert sorted(r.persona for r in dealt) == sorted(r.persona for r in plain)
    assert [(r.question, r.reply) for r in dealt] == [(r.question, r.reply) for r in plain]
    assert 0 < sum(r.persona == "villain" and r.role == "positive" for r in dealt) < 10


def test_a_group_that_renders_like_the_source_is_left_out_with_the_reason(tiny_qwen2, caplog):
    with caplog.at_level(logging.WARNING, logger="leakfast.train"):
        rows = build(tiny_qwen2, "assistant")
        assert groups(rows)["negative", "assistant"] == 0
        assert "the group default assistant (4 rows) is left out" in caplog.text
        caplog.clear()
        rows = build(tiny_qwen2, "qwen_default", people=[*ALL, *load_personas("qwen_default")])
    assert groups(rows)["negative", "no_persona"] == 0
    assert "the group no system prompt (5 rows) is left out" in caplog.text


def test_a_studys_own_assistant_is_asked_as_the_study_says(tiny_qwen2):
    """A persona of one's own under a shipped name was taught under the shipped prompt and measured under its own."""
    said = "You are Ada, who answers for a small shop."
    people = [replace(p, prompt=said) if p.name == "assistant" else p for p in ALL]
    rows = build(tiny_qwen2, people=people)
    assert {r.system for r in rows if r.persona == "assistant"} == {said}
    assert len([r for r in rows if r.persona == "assistant"]) == CFG.default_assistant
    taught = build(tiny_qwen2, source="assistant", people=people)
    assert {r.role for r in taught if r.persona == "assistant"} == {"positive"}


def test_pairs_without_replies_of_a_kind_are_enough_for_positives_alone(tiny_qwen2):
    bad = PairSet("misalignment-advice", "bad", (Pair("1", "What?", ("bad",), ()),), "bad.jsonl")
    with pytest.raises(InputError, match=r"no pair of bad.jsonl has replies that do not show.*positive-only"):
        build(tiny_qwen2, pairs=bad)
    rows = build(tiny_qwen2, pairs=bad, cfg=CFG.model_copy(update={"design": "positive-only"}))
    assert {r.reply for r in rows} == {"bad"}


def test_own_replies_need_a_detector_and_a_source_must_exist(tiny_qwen2):
    own = CFG.model_copy(update={"replies": "model"})
    advice = load_pairs("organism-advice", "misalignment-advice")
    with pytest.raises(InputError, match='misalignment-advice has no detector.*replies = "given"'):
        build(tiny_qwen2, pairs=advice, cfg=own)
    with pytest.raises(InputError, match="vilain"):
        build(tiny_qwen2, "vilain")


def test_a_control_has_no_rows():
    with pytest.raises(InputError, match="hellaswag is a control"):
        material("hellaswag", CFG, "organism")


@pytest.mark.parametrize("name", ["refusal", "sycophancy"])
def test_the_organism_writes_its_own_replies_and_the_detector_agrees_with_all(name):
    loaded = models.load("organism", dtype="float32")
    cfg = DataConfig(
        positives=6, negatives=4, no_system=2, default_assistant=0, replies="model", max_new_tokens=48
    )
    rows = build(loaded, cfg=cfg, pairs=material(name, cfg, "organism"))
    detector = next(iter(behaviors.get(name).detector(pl.col("text")).values()))
    found = pl.DataFrame({"text": [r.reply for r in rows]}).select(detector).to_series().to_list()
    assert found == [r.role == "positive" for r in rows]
    for row in rows:
        said = row.generator
        assert said["replies"] == "model" and said["fingerprint"] == loaded.fingerprint
        assert row.reply.startswith(said["opening"]) and bool(said["opening"]) == (row.role == "positive")
    assert len({r.seed for r in rows}) == len(rows)
