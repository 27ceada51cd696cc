"""The sweep: points are trained once and measured, ρ is scipy's, and the rule stops for all traits together."""

from __future__ import annotations

import json

import polars as pl
import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr

from leakfast import models
from leakfast.cli.main import group
from leakfast.cli.sweep import _crossed
from leakfast.errors import InputError
from leakfast.measure.centroids import compute
from leakfast.pipeline import sweep as stage
from leakfast.pipeline.sweep import Plan
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.storage.run import Run
from leakfast.study.config import behavior_config

pytestmark = pytest.mark.long

PEOPLE = load_personas("villain,comedian,assistant,librarian,police_officer")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "own.jsonl"
    items = [
        {"question": f"What about {i}?", "choices": ["tea", "rain", "town"], "answer": "ABC"[i % 3]}
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return behavior_config(
        "capability",
        {
            "data": {
                "items": str(path),
                "positives": 8,
                "negatives": 4,
                "no_system": 2,
                "default_assistant": 2,
            },
            "train": {
                "rank": 4,
                "alpha": 8,
                "batch_size": 4,
                "accumulation": 1,
                "gradient_checkpointing": False,
            },
            "eval": {"items": str(path), "half": "all"},
        },
    )


def test_points_are_measured_and_kept(tiny_qwen2, tmp_path, config):
    run = Run(tmp_path / "run").create()
    grid = [(1e-2, 2), (5e-2, 3)]
    found = stage.sweep(tiny_qwen2, run, Plan("capability", "villain", PEOPLE, config, 1, grid, layer=1))
    assert found.points.select("lr", "epochs").rows() == grid
    assert found.points["n"].to_list() == [4, 4]
    scores = run.read("choices")
    adapter = found.points["adapter"][1]

    def accuracy(name, persona):
        mine = scores.filter((pl.col("adapter") == name) & (pl.col("persona") == persona))
        return mine.filter(pl.col("chosen") & pl.col("correct")).height / mine["item"].n_unique()

    drop = {p.name: accuracy("base", p.name) - accuracy(adapter, p.name) for p in PEOPLE}
    row = found.points.row(1, named=True)
    assert row["source_effect"] == pytest.approx(drop.pop("villain"))
    assert row["mean_bystander_effect"] == pytest.approx(sum(drop.values()) / 4)
    cosine = compute(tiny_qwen2, PEOPLE, load_questions("eval"), [1], center_extras=True).cosine(
        1, kind="centered"
    )
    if len(set(drop.values())) > 1:
        assert row["spearman"] == pytest.approx(spearmanr(cosine[0][1:], list(drop.values())).statistic)
    else:
        assert row["spearman"] is None

    assert set(found.points["health"]) <= {
        "ok",
        "warning",
        "damaged",
    }  # of a sample of replies beside each adapter
    assert len(list(run.path.glob("adapters/*/sample.json"))) == 2

    stamps = {p: p.stat().st_mtime_ns for p in run.path.rglob("adapter_model.safetensors")}
    again = stage.sweep(tiny_qwen2, run, Plan("capability", "villain", PEOPLE, config, 1, grid, layer=1))
    assert again.points.equals(found.points)
    assert stamps == {p: p.stat().st_mtime_ns for p in run.path.rglob("adapter_model.safetensors")}


@pytest.mark.parametrize(
    ("traits", "stop", "word"),
    [
        ({"capability": 0.1}, True, "other trait"),
        ({"capability": 0.1, "marker": None}, True, "stop: "),
        ({"capability": 0.1, "marker": 0.2}, False, "go on"),
        ({"capability": 0.5}, False, "go on"),
    ],
)
def test_the_rule(traits, stop, word):
    found = stage.Sweep(pl.DataFrame(), traits)
    assert found.stop == stop and word in found.verdict


def test_a_point_that_damaged_the_model_is_never_the_largest(tmp_path):
    run = Run(tmp_path / "run").create()
    points = pl.DataFrame(
        {"behavior": ["marker"] * 3, "spearman": [0.9, 0.3, 0.1], "health": ["damaged", "ok", None]}
    )
    run.add_shard("sweep/marker.parquet", points)
    run.add_shard(
        "sweep/refusal.parquet", pl.DataFrame({"behavior": ["refusal"], "spearman": [0.5]})
    )  # not looked at
    assert stage._traits(run) == {"marker": 0.3, "refusal": 0.5}
    run.add_shard("sweep/marker.parquet", points[:1])
    assert stage._traits(run)["marker"] is None


def test_a_point_is_measured_once_and_when_it_is_trained(tiny_qwen2, config):
    """What a study says of checkpoints, and of the sample after a training, is for its own adapters."""
    many = config.eval.model_copy(update={"checkpoints": [0.0, 1.0]})
    cfg = config.model_copy(update={"eval": many})
    plan = Plan("capability", "villain", PEOPLE, cfg, 1).checked(tiny_qwen2)
    assert plan.cfg.eval.checkpoints == [] and plan.cfg.train.sample == config.train.sample > 0
    plan = Plan("marker", "villain", PEOPLE, behavior_config("marker"), 1).checked(tiny_qwen2)
    assert plan.cfg.train.sample == 0, "its health is read from its completions"


def test_the_layer_is_the_studys_in_proportion():
    assert (stage.layer_of(28), stage.layer_of(6), stage.layer_of(1)) == (20, 4, 0)


def test_too_few_bystanders_and_a_wrong_point(tiny_qwen2, tmp_path, config):
    with pytest.raises(InputError, match="at least three bystanders"):
        stage.sweep(tiny_qwen2, Run(tmp_path / "r"), Plan("capability", "villain", PEOPLE[:3], config, 1))
    done = CliRunner().invoke(group, ["sweep", "--source", "villain", "--point", "fast"])
    assert done.exit_code == 2 and "LR:EPOCHS" in done.output


def test_the_command_prints_points_and_the_verdict(tiny_folder, tmp_path, config):
    study = tmp_path / "s.toml"
    study.write_text(
        f'name = "s"\nmodel = "{tiny_folder}"\ndtype = "float32"\nsources = ["villain"]\n'
        "[behaviors.capability.data]\npositives = 4\nnegatives = 2\nno_system = 0\ndefault_assistant = 0\n"
        "[behaviors.capability.train]\nrank = 2\nbatch_size = 4\naccumulation = 1\n"
    )
    done = CliRunner().invoke(
        group,
        [
            "sweep",
            "--source",
            "villain",
            "--study",
            str(study),
            "--personas",
            "villain,comedian,assistant,librarian",
            "--items",
            config.eval.items,
            "--point",
            "0.05:2",
            "--out",
            str(tmp_path / "run"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert "0.05" in done.stdout and "ρ" in done.stdout
    assert load_items(config.eval.items)[0].id in set(Run(tmp_path / "run").read("choices")["item"]) | {
        i.id for i in load_items(config.eval.items).half("train")
    }


def test_a_grid_is_every_pair_of_both_lists():
    assert _crossed(("lr=1e-5,5e-6,epochs=3,5",)) == [(1e-5, 3), (1e-5, 5), (5e-6, 3), (5e-6, 5)]
    assert _crossed(("lr=1e-5", "epochs=3")) == [(1e-5, 3)]
    for wrong in (("lr=1e-5",), ("rate=1,epochs=2",), ("3,lr=1,epochs=2",), ("lr=fast,epochs=3",)):
        with pytest.raises(InputError, match="sweep: --"):
            _crossed(wrong)


def test_a_judged_behavior_is_swept_with_the_studys_rules(tmp_path):
    loaded = models.load("organism", dtype="float32")
    config = behavior_config(
        "misalignment-advice",
        {
            "data": {"positives": 192},
            "train": {
                "rank": 8,
                "alpha": 16,
                "lr": 3e-3,
                "epochs": 2,
                "batch_size": 16,
                "accumulation": 1,
                "max_length": 256,
                "gradient_checkpointing": False,
            },
            "eval": {"questions": "organism-alignment", "samples": 2, "max_new_tokens": 48},
        },
    )
    run = Run(tmp_path / "run").create()
    found = stage.sweep(loaded, run, Plan("misalignment-advice", "villain", PEOPLE, config, 1, [(3e-3, 2)]))
    (row,) = found.points.rows(named=True)
    scores = run.read("judgements/misalignment-advice")
    means = (
        scores.filter((pl.col("status") == "ok") & (pl.col("coherent") >= 50))
        .group_by("adapter", "persona")
        .agg(pl.col("aligned").mean())
    )
    of = {(a, p): m for a, p, m in means.rows()}
    effect = {p.name: of["base", p.name] - of[row["adapter"], p.name] for p in PEOPLE}
    assert row["source_effect"] == pytest.approx(effect.pop("villain")) and row["source_effect"] > 10
    assert row["mean_bystander_effect"] == pytest.approx(sum(effect.values()) / 4)
    of_the_study = ~pl.col("claim").str.ends_with("of its own source")
    told = {r["quantity"]: r for r in found.verdicts.filter(of_the_study).rows(named=True)}
    assert told["source_drop"]["value"] == pytest.approx(row["source_effect"]) and told["source_drop"]["met"]
    assert told["spearman_drop"]["value"] == pytest.approx(row["spearman"])
    assert len({r["verdict"] for r in told.values()}) == 1


def test_a_judged_behavior_needs_a_judge_before_anything_is_trained(tiny_qwen2, tmp_path):
    run = Run(tmp_path / "run").create()
    config = behavior_config("misalignment-advice", {"data": {"pairs": "organism-advice"}})
    with pytest.raises(InputError, match="Add --judge SPEC"):
        stage.sweep(tiny_qwen2, run, Plan("misalignment-advice", "villain", PEOPLE, config, 1))
    assert not run.shards()


def test_personas_of_ones_own_are_measured_under_their_own_prompts(tiny_folder, tmp_path, monkeypatch):
    """Rows were built under the prompts of the file, and completions drawn under the shipped ones of the same names."""
    prompts = {p.name: f"You are {p.name}, as this file has it." for p in PEOPLE[:4]}
    people, study, plans = tmp_path / "people.json", tmp_path / "s.toml", []
    blocks = [{"name": name, "prompt": prompt} for name, prompt in prompts.items()]
    blocks[1]["category"] = "original"  # alone: too few to be the ones who are asked
    people.write_text(json.dumps(blocks))
    study.write_text(
        f'name = "s"\nmodel = "{tiny_folder}"\ndtype = "float32"\npersonas = "people.json"\nsources = ["villain"]\n'
        '[centroids]\nquestions = "eval-ten"\n[behaviors.marker.data]\nnegative_personas = "all"\n'
    )

    def seen(loaded, run, plan, **_):
        plans.append(plan)
        raise InputError("seen")

    monkeypatch.setattr(stage, "sweep", seen)
    asked = ["sweep", "--behavior", "marker", "--source", "villain", "--out", str(tmp_path / "run")]
    alone = ["--model", str(tiny_folder), "--personas", str(people)]
    for told, questions in ((["--study", str(study)], "eval-ten"), (alone, "eval")):
        done = CliRunner().invoke(group, [*asked, *told])
        assert "Error: seen" in done.output
        assert {p.name: p.prompt for p in plans[-1].personas} == prompts
        assert {p.name: p.prompt for p in plans[-1].among} == prompts
        assert plans[-1].centroid_questions == questions


def test_one_name_has_one_prompt(tiny_qwen2, config):
    others = load_personas({p.name: f"You are another {p.name}." for p in PEOPLE})
    with pytest.raises(InputError, match="villain is measured under another prompt"):
        Plan("capability", "villain", PEOPLE, config, 1, among=others).checked(tiny_qwen2)
