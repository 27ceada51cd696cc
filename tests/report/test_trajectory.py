"""Scores on the way through training: that taking them changes no bit of the adapter, that checkpoints land on
steps, and the table of a series."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from flat_runs import drawn
from helpers import ITEMS, TRAIN, build, taught
from measuring import evaluate_items_series, train

from leakfast import models, stats
from leakfast.errors import InputError
from leakfast.measure.choices import scoring as choices
from leakfast.measure.choices.in_training import checkpoints_of, scorer
from leakfast.prompts.personas import load_personas
from leakfast.report import trajectory
from leakfast.storage import layout, schema
from leakfast.storage.run import Run
from leakfast.study.config import DataConfig, EvalConfig, behavior_config
from leakfast.train import checkpoints as points
from leakfast.train import lora, saving
from leakfast.train.recipe import Recipe

RECIPE = Recipe("capability", "villain", 7, behavior_config("capability").train)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_scoring_on_the_way_changes_no_bit(tiny_qwen2, tmp_path, gradient_checkpointing):
    settings = TRAIN.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
    cfg = DataConfig(positives=12, negatives=8, no_system=4, default_assistant=4)
    rows = build(tiny_qwen2, "villain", cfg)
    seen = []

    def score(current, share):
        flags = [m.training for m in current.model.modules()]
        assert not any(flags)
        torch.rand(3)  # a measurement may draw
        found = choices.score(current, load_personas("villain,comedian"), ITEMS[:5])
        seen.append((share, found["logprob_nats"].to_list()))

    def fit(name, kept):
        return train(
            tiny_qwen2,
            rows,
            settings,
            tmp_path / name,
            7,
            source="villain",
            behavior="capability",
            checkpoints=kept,
        )

    plain = fit("plain", None)
    watched = fit("watched", points.Checkpoints(score=score))
    assert watched.adapter_hash == plain.adapter_hash
    logs = [(tmp_path / n / saving.LOG).read_text() for n in ("plain", "watched")]
    assert logs[0] == logs[1]
    assert [share for share, _ in seen] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len({tuple(values) for _, values in seen}) == 5, "the adapter was live and moving"
    assert not any(m.training for m in tiny_qwen2.model.modules())


def test_the_model_in_training_comes_back_exactly(tiny_qwen2):
    with lora.attached(tiny_qwen2, TRAIN) as net:
        flags = [m.training for m in net.modules()]
        weights = {k: v.clone() for k, v in net.state_dict().items()}
        wanted_grad = [p.requires_grad for p in net.parameters()]
        generator = torch.get_rng_state()
        implementation = net.config._attn_implementation
        with points.measured(tiny_qwen2, net) as current:
            choices.score(current, load_personas("villain"), ITEMS[:3])
            torch.rand(5)
        assert [m.training for m in net.modules()] == flags and any(flags)
        assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
        assert [p.requires_grad for p in net.parameters()] == wanted_grad
        assert torch.equal(torch.get_rng_state(), generator)
        assert net.config._attn_implementation == implementation


def test_points_fall_on_steps():
    assert points.Checkpoints().at(150) == {0: (0.0,), 38: (0.25,), 75: (0.5,), 113: (0.75,), 150: (1.0,)}
    assert points.Checkpoints().at(1) == {0: (0.0,), 1: (0.5, 0.75, 1.0)}
    assert points.Checkpoints((0.01, 0.5)).at(10) == {5: (0.5,)}, "nothing is trained at step 0"
    with pytest.raises(ValueError, match="between 0 and 1"):
        points.Checkpoints((0.5, 25))


def test_a_series_is_scored_again_from_its_files_and_tabled(tiny_qwen2, tmp_path):
    run = Run(tmp_path / "run").create()
    people = load_personas("villain,comedian,assistant")
    name = "capability-villain-s7"
    out = run.path / "adapters" / name
    taught(tiny_qwen2, out, points.Checkpoints(score=scorer(run, RECIPE, people, ITEMS, "letters")))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["p000", "p025", "p050", "p075"]
    card = models.read_card(out / "checkpoints" / "p050")
    assert (card.recipe["checkpoint_share"], card.recipe["checkpoint_step"]) == (0.5, 7)
    live = run.read("trajectory").sort("share", "persona", "item", "label")
    assert live["share"].unique().sort().to_list() == [0.0, 0.25, 0.5, 0.75, 1.0]

    done = evaluate_items_series(tiny_qwen2, run, out, people, ITEMS)
    assert (done.made, done.kept) == (5 * 3 * len(ITEMS), 0)
    later = run.read("trajectory").sort("share", "persona", "item", "label")
    assert later.height == live.height
    assert np.abs(later["logprob_nats"] - live["logprob_nats"]).max() < 1e-4
    again = evaluate_items_series(tiny_qwen2, run, out, people, ITEMS)
    assert (again.made, again.kept) == (0, 5 * 3 * len(ITEMS))

    made = schema.check(trajectory.write(run), "trajectory")
    assert made.height == 5 * 3
    first = made.filter(pl.col("share") == 0)
    assert first["delta"].to_list() == [0.0] * 3
    row = made.filter((pl.col("share") == 0.5) & (pl.col("persona") == "villain")).row(0, named=True)
    mine = later.filter((pl.col("share") == 0.5) & (pl.col("persona") == "villain"))
    assert row["hits"] == mine.filter(pl.col("chosen") & pl.col("correct")).height
    assert row["rate"] == row["hits"] / row["total"] and row["ci_low"] < row["rate"] < row["ci_high"]
    assert row["seed"] == 7 and row["role"] == "source"
    assert run.has("tables/trajectory.parquet")


def test_a_point_at_which_nothing_was_learned_is_none(tiny_qwen2, tmp_path, caplog):
    seen = []
    taught(tiny_qwen2, tmp_path / "v", points.Checkpoints(score=lambda now, share: seen.append(share)))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]
    n_steps = models.read_card(tmp_path / "v").recipe["steps"]
    kept = points.Checkpoints((0.0, 1 / n_steps, 0.5), score=lambda now, share: seen.append(share))
    seen.clear()
    taught(tiny_qwen2, tmp_path / "w", kept)
    assert seen == [0.0, 0.5] and "the rate is 0" in caplog.text
    assert sorted(p.name for p in (tmp_path / "w" / "checkpoints").iterdir()) == ["p000", "p050"]


def test_a_series_needs_checkpoints(tiny_qwen2, tmp_path):
    taught(tiny_qwen2, tmp_path / "v")
    with pytest.raises(InputError, match="leakfast train --checkpoints"):
        evaluate_items_series(tiny_qwen2, tmp_path / "run", tmp_path / "v", load_personas("villain"), ITEMS)


def test_checkpoints_of_a_study(tmp_path):
    run = Run(tmp_path)
    people = load_personas("villain,comedian,assistant")
    assert checkpoints_of(run, RECIPE, people, EvalConfig(), "organism") is None
    cfg = EvalConfig(checkpoints=[0.0, 1.0], checkpoint_personas=["comedian"])
    kept = checkpoints_of(run, RECIPE, people, cfg, "organism")
    assert kept.shares == (0.0, 1.0) and kept.score is not None
    assert checkpoints_of(run, replace(RECIPE, behavior="marker"), people, cfg, "organism").score is None


def points_of(run):
    """share → (how many personas have a change, what is said of those that have none)."""
    made = trajectory.write(run).sort("share")
    return {
        share: (part["delta"].drop_nulls().len(), set(part["delta_reason"].drop_nulls()))
        for (share,), part in made.group_by("share", maintain_order=True)
    }


def test_points_that_were_asked_other_questions_have_no_change(tmp_path):
    """Both sides hold questions 0 and 1 of a set of one name: a rate was taken from that of other questions without a word."""
    run, name = Run(tmp_path / "run").create(), "marker-villain-s1"
    people = ["villain", "comedian", "poet"]
    asked = {"base": "a", f"{name}@p025": "a", f"{name}@p050": "b", name: "a"}
    for point, digest in asked.items():
        frame = drawn(point, None if point == "base" else "villain", {"villain"}, people)
        if point == name:
            frame = frame.filter((pl.col("persona") != "poet") | (pl.col("question") == 0))
        told = {"questions": "own", "questions_sha256": digest * 64, "drawn": "c" * 16}
        run.add_shard(layout.shard(layout.completions("marker", point, series=True)), frame, **told)
    less = "was not asked all that was asked before training, or more"
    assert points_of(run) == {
        0.0: (3, set()),
        0.25: (3, set()),
        0.5: (0, {"was asked other questions than before training"}),
        1.0: (2, {less}),
    }
    for adapter, source in (("base", None), (name, "villain")):
        run.add_shard(
            layout.shard(layout.completions("marker", adapter)), drawn(adapter, source, {"villain"}, people)
        )
    lines = [line for line in stats.current(run).missing if "of training" in line]
    assert [line.partition(", so")[0] for line in lines] == [
        f"marker/{name}: at 50 % of training it was asked other questions than before training",
        f"marker/{name}: at 100 % of training it {less}",
    ]


def test_points_that_were_scored_on_other_items_have_no_change(tiny_qwen2, tmp_path):
    run, people = Run(tmp_path / "run").create(), load_personas("villain,comedian")
    other = replace(ITEMS, items=(*ITEMS[:-1], replace(ITEMS[-1], question="Or this?")))
    for share, items in ((0.0, ITEMS), (0.5, ITEMS), (1.0, other)):
        scorer(run, RECIPE, people, items, "letters")(tiny_qwen2, share)
    why = "was asked other items than before training, some of them by the same id"
    assert points_of(run) == {0.0: (2, set()), 0.5: (2, set()), 1.0: (0, {why})}
