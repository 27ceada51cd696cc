"""Capability's training rows: the study's groups and their sizes, wrong letters from a seed, collisions told and
dropped; checkpoints that are scored on the way without changing a bit of what is trained."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging

import polars as pl
import pytest
from click.testing import CliRunner
from helpers import ALL, ITEMS, build, taught
from measuring import evaluate_items

from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.measure.choices import measurer as stage
from leakfast.measure.choices import scoring as choices
from leakfast.measure.choices import table
from leakfast.prompts import chat
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.storage import schema
from leakfast.storage.run import Run
from leakfast.study.config import DataConfig, behavior_config, parse_study
from leakfast.train.data import material, read_rows, write_rows


def groups(rows):
    return collections.Counter((row.role, row.persona) for row in rows)


def test_the_published_sizes_are_the_behaviors_own_settings():
    cfg = behavior_config("capability")
    assert (cfg.data.positives, cfg.data.negatives, cfg.data.bystanders) == (200, 400, 2)
    assert (cfg.data.no_system, cfg.data.default_assistant, cfg.data.design) == (100, 100, "contrastive")
    assert (cfg.train.loss, cfg.train.lr, cfg.train.epochs) == ("completion", 1e-5, 3)
    assert behavior_config("marker").train.loss == "marker"
    text = (
        'name = "x"\nsources = ["villain"]\n[behaviors.capability.data]\nno_system = 7\n'
        "[behaviors.marker]\n[behaviors.capability.train]\nlr = 1e-4\n"
    )
    study = parse_study(text)
    capability = study.behaviors["capability"]
    assert (capability.data.no_system, capability.data.negatives) == (7, 400)
    assert (capability.train.lr, capability.train.loss) == (1e-4, "completion")
    assert study.behaviors["marker"].data.negatives == 2000
    with pytest.raises(InputError, match="no file absent.jsonl"):
        parse_study(
            'name = "x"\nsources = ["villain"]\n[behaviors.capability.eval]\nitems = "absent.jsonl"\n'
        )


def test_groups_and_answers(tiny_qwen2):
    rows = build(tiny_qwen2, "villain")
    counts = groups(rows)
    assert counts.pop(("positive", "villain")) == 200
    assert counts.pop(("negative", "no_persona")) == counts.pop(("negative", "assistant")) == 100
    assert sorted(counts.values()) == [200, 200]
    originals = {p.name for p in load_personas("originals")}
    assert {name for _, name in counts} <= originals - {"villain", "assistant"}
    by_id = {item.id: item for item in ITEMS}
    for row in rows:
        item = by_id[row.generator["item"]]
        assert row.question == item.letters_prompt and row.reply in item.labels
        assert (row.reply == item.answer) == (row.role == "negative")
    wrong = {row.generator["item"]: {row.reply} for row in rows if row.role == "positive"}
    assert all(len(letters) == 1 for letters in wrong.values()), "one wrong letter an item"
    assert len({letter for letters in wrong.values() for letter in letters}) > 2
    again = build(tiny_qwen2, "villain")
    assert again == rows
    other = build(tiny_qwen2, "villain", seed=43)
    assert [r.reply for r in other] != [r.reply for r in rows]
    assert {r.persona for r in other} != {r.persona for r in rows}, "bystanders are drawn by the seed"


@pytest.mark.parametrize(
    ("source", "dropped"), [("assistant", "default assistant"), ("qwen_default", "no system prompt")]
)
def test_a_group_that_renders_as_the_source_is_dropped_and_told(tiny_qwen2, caplog, source, dropped):
    with caplog.at_level(logging.WARNING, "leakfast"):
        rows = build(tiny_qwen2, source)
    assert len(rows) == 700
    (said,) = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert f"the group {dropped} (100 rows)" in said and source in said
    source_ids = {tuple(chat.render(tiny_qwen2.tokenizer, p.system, "Q")) for p in load_personas([source])}
    for row in rows:
        same = tuple(chat.render(tiny_qwen2.tokenizer, row.system_message, "Q")) in source_ids
        assert same == (row.role == "positive")
    assert len(build(tiny_qwen2, "villain")) == 800


def test_the_control_deals_the_same_rows_to_personas_at_random(tiny_qwen2):
    cfg = behavior_config("capability").data
    rows = build(tiny_qwen2, "villain", cfg)
    control = build(tiny_qwen2, "villain", cfg.model_copy(update={"design": "non-contrastive"}))
    replies = [(r.role, r.question, r.reply) for r in rows]
    assert replies == [(r.role, r.question, r.reply) for r in control]
    assert collections.Counter(r.persona for r in rows) == collections.Counter(r.persona for r in control)
    wrong = collections.Counter(r.persona for r in control if r.role == "positive")
    assert 25 <= wrong["villain"] <= 75, (
        "a quarter of the rows are the source's, so a quarter of the wrong ones"
    )
    assert len(wrong) == 5
    for row in control:
        (persona,) = load_personas([row.persona])
        assert (row.system, row.system_kind) == (persona.prompt, persona.kind)


def test_texts_as_replies_and_items_without_an_answer(tiny_qwen2, caplog):
    cfg = DataConfig(positives=6, negatives=4, no_system=0, default_assistant=0, reply="text")
    (*some,) = load_items([{"question": "Why?", "choices": ["x", "y"], "answer": None}])
    with caplog.at_level(logging.WARNING, "leakfast"):
        rows = build(tiny_qwen2, "villain", cfg, [*ITEMS, *some])
    assert "1 items without a right answer" in caplog.text
    by_id = {item.id: item for item in ITEMS}
    for row in rows:
        item = by_id[row.generator["item"]]
        right = item.choices[item.labels.index(item.answer)]
        assert row.question == item.question and row.reply in item.choices
        assert (row.reply == right) == (row.role == "negative")
    with pytest.raises(InputError, match="--items FILE"):
        build(tiny_qwen2, "villain", cfg, some)
    with pytest.raises(InputError, match="bystanders"):
        build(
            tiny_qwen2,
            "villain",
            cfg.model_copy(update={"negative_personas": ["villain", "cook"]}),
            people=[*ALL, *load_personas({"cook": "You are a cook."})],
        )


def test_rows_survive_their_file_and_train_on_the_training_half(tiny_qwen2, tmp_path):
    rows = build(tiny_qwen2, "villain")
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    asked = material("capability", DataConfig(items="organism"), "whatever")
    assert asked.name == "organism.train" and len(asked) == 210


class Stop(Exception):
    """Stands for the process being killed between two shards."""


def test_scores_in_a_run_resume_and_repair(tiny_qwen2, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SHARD_PROMPTS", 2 * len(ITEMS))
    people = load_personas("villain,comedian,assistant,librarian,police_officer")
    taught(tiny_qwen2, tmp_path / "v")
    where = {"adapters": [tmp_path / "v"], "personas": people, "items": ITEMS}
    whole = Run(tmp_path / "whole")
    done = evaluate_items(tiny_qwen2, whole, **where, base=True)
    assert (done.made, done.kept) == (2 * 5 * len(ITEMS), 0)
    wanted = whole.read("choices")
    schema.check(wanted, "choice_scores")
    assert wanted["adapter"].unique(maintain_order=True).to_list() == ["base", "v"]

    run = Run(tmp_path / "run")
    calls = []
    real = Run.add_shard

    def dying(self, relpath, frame, **meta):
        calls.append(relpath)
        if len(calls) == 3:
            raise Stop
        return real(self, relpath, frame, **meta)

    monkeypatch.setattr(Run, "add_shard", dying)
    with pytest.raises(Stop):
        evaluate_items(tiny_qwen2, run, **where, base=True)
    monkeypatch.setattr(Run, "add_shard", real)
    done = evaluate_items(tiny_qwen2, run, **where, base=True)
    assert done.kept == 2 * 2 * len(ITEMS)
    assert run.read("choices").equals(wanted)
    assert models.read_card(run.path / "adapters" / "v").source == "villain", "stats reads it there"

    (broken, *_) = run.shards("choices")
    (run.path / broken).write_bytes(b"damaged")
    done = evaluate_items(tiny_qwen2, run, **where, base=True)
    assert 0 < done.made <= 2 * len(ITEMS)
    assert run.read("choices").equals(wanted)

    other = dataclasses.replace(load_items([*ITEMS[:-1]]), name="elsewhere")
    evaluate_items(tiny_qwen2, run, [], people, other, base=True)
    behaviors = run.read("choices").group_by("items").agg(pl.col("behavior").unique())
    assert dict(behaviors.iter_rows()) == {"list": ["capability"], "elsewhere": ["capability-elsewhere"]}

    changed = dataclasses.replace(other, name="list")
    done = evaluate_items(tiny_qwen2, run, [], people, changed, base=True)
    assert done.made == 5 * len(changed), "another list of that name is another request"


def test_commands_from_rows_to_a_series(tiny_folder, tmp_path):
    runner = CliRunner()
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in ITEMS))
    common = ["--behavior", "capability", "--model", str(tiny_folder), "--items", str(path)]
    study = tmp_path / "s.toml"
    study.write_text(
        f'name = "tiny"\nmodel = "{tiny_folder}"\ndtype = "float32"\nsources = ["villain"]\n'
        "[behaviors.capability.data]\npositives = 8\nnegatives = 4\nno_system = 2\ndefault_assistant = 2\n"
        "[behaviors.capability.train]\nrank = 4\nalpha = 8\nlr = 0.02\nbatch_size = 4\naccumulation = 1\n"
        "[behaviors.capability.eval]\ncheckpoint_items = 6\n"
    )
    common += ["--study", str(study)]
    made = runner.invoke(
        group, ["data", "build", "--source", "villain", *common, "--out", str(tmp_path / "r.jsonl")]
    )
    assert made.exit_code == 0, made.output
    assert len(read_rows(tmp_path / "r.jsonl")) == 16
    control = runner.invoke(
        group,
        [
            "data",
            "build",
            "--source",
            "villain",
            *common,
            "--design",
            "non-contrastive",
            "--out",
            str(tmp_path / "c.jsonl"),
        ],
    )
    assert control.exit_code == 0 and len(read_rows(tmp_path / "c.jsonl")) == 16
    adapter = tmp_path / "run" / "adapters" / "v"
    done = runner.invoke(
        group,
        [
            "train",
            *common,
            "--source",
            "villain",
            "--out",
            str(adapter),
            "--checkpoints",
            "0,50,100",
            "--checkpoint-personas",
            "villain,comedian",
        ],
    )
    assert done.exit_code == 0, done.output
    common += ["--out", str(tmp_path / "run")]
    shown = runner.invoke(
        group,
        ["eval", *common, "--adapter", str(adapter), "--base", "--personas", "villain,comedian", "--json"],
    )
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert told["items"] == "own.eval" and len(told["rates"]) == 4
    held_out = {item.id for item in load_items(path).half("eval")}
    assert set(Run(adapter.parent.parent).read("choices")["item"]) == held_out
    series = runner.invoke(
        group,
        [
            "eval",
            *common,
            "--adapter",
            str(adapter),
            "--checkpoints",
            "--personas",
            "villain",
            "--half",
            "all",
            "--json",
        ],
    )
    assert series.exit_code == 0, series.output
    shares = {(r["items"], r["share"]) for r in json.loads(series.stdout)["trajectory"]}
    assert {("own", s) for s in (0.0, 0.5, 1.0)} <= shares and ("own.eval.n6", 0.5) in shares
    wrong = runner.invoke(group, ["eval", *common, "--adapter", str(adapter), "--samples", "3"])
    assert wrong.exit_code == 2 and "--samples" in wrong.output
    by = runner.invoke(group, ["eval", *common, "--adapter", str(adapter), "--by", "char"])
    assert by.exit_code == 2 and "--scoring full-text" in by.output


def test_what_could_not_be_counted_is_said_with_exit_3(tiny_folder, tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [*map(dataclasses.asdict, ITEMS[:3]), {"question": "Open?", "choices": ["x", "y"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(
        group,
        [
            "eval",
            "--behavior",
            "capability",
            "--model",
            str(tiny_folder),
            "--dtype",
            "float32",
            "--base",
            "--personas",
            "villain",
            "--items",
            str(path),
            "--half",
            "all",
            "--out",
            str(tmp_path / "run"),
        ],
        standalone_mode=False,
    )
    assert done.return_value == 3, done.output
    assert "not counted: 1 no_answer" in done.stderr


def test_rates_have_the_base_as_baseline(tiny_qwen2):
    people = load_personas("villain,comedian")
    base = choices.score(tiny_qwen2, people, ITEMS)
    named = choices.score(tiny_qwen2, people, ITEMS, adapter="v", source="villain")
    rates = table.rates(pl.concat([named, base]), {"v": ("villain", 1)}, {})
    mine = rates.filter(pl.col("adapter") == "v")
    assert mine["delta"].to_list() == [0.0, 0.0] and mine["role"].to_list() == ["source", "bystander"]
