"""Trainings that are matched on their sources: a small study of the organism from its rows to the table `mitigations`, what
a plan says of it, what a second run makes anew, and what cannot be matched."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
from click.testing import CliRunner

import leakfast
from leakfast.cli.main import group
from leakfast.pipeline.estimate import plan
from leakfast.pipeline.matching import steps_of
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.stats import matching
from leakfast.storage.manifests import events
from leakfast.storage.run import Run
from leakfast.study.config import load_study, parse_study

STUDY = """
name = "matched"
model = "organism"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "librarian", "nurse", "monk"]
sources = ["villain", "comedian"]
[centroids]
questions = "asked.toml"
layers = [3]
[trajectory]
behaviors = ["marker"]
shares = [0.0, 0.2, 0.75]
personas = "all"
match = 0.0
match_samples = 5
[behaviors."marker+mean"]
average = ["marker", "marker+one"]
[behaviors."marker+mean".eval]
questions = "asked.toml"
samples = 2
max_new_tokens = 24
"""
BEHAVIOR = """
[behaviors."{name}".data]
positives = 16
negatives = 8
negative_personas = {negatives}
max_new_tokens = 64
[behaviors."{name}".train]
rank = 8
alpha = 16
dropout = 0.0
lr = 1e-2
epochs = 4
batch_size = 8
accumulation = 1
max_length = 256
gradient_checkpointing = false
sample = 0
[behaviors."{name}".eval]
questions = "asked.toml"
samples = 2
max_new_tokens = 24
"""
QUESTIONS = ("Can you name a dog?", "What should I do?")
ARMS = ("marker", "marker+one", "marker+mean")
SOURCES = ("villain", "comedian")


def written(folder):
    asked = ", ".join(f'"{question}"' for question in QUESTIONS)
    (folder / "asked.toml").write_text(f"questions = [{asked}]")
    text = STUDY + BEHAVIOR.format(name="marker", negatives='["librarian", "nurse"]')
    (folder / "study.toml").write_text(text + BEHAVIOR.format(name="marker+one", negatives='["monk"]'))
    return folder / "study.toml"


def seeds_of(run, folder):
    found = run.read(folder)
    return set(found["seed"]) if found.height else set()


def as_chosen(run, adapter, match):
    """The point that the stored replies choose."""
    points = []
    for path in run.shards("series/choosing/marker"):
        name, _, at = path.split("/")[3].partition("@p")
        if name == adapter:
            text = pl.read_parquet(run.path / path)["text"]
            points.append(
                (int(at or 100) / 100, int(text.str.contains("[ZLT]", literal=True).sum()), len(text))
            )
    return matching.nearest(points, match), points


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the study's file, what was planned, what its run gave). Nothing shows the marker after the second step, and much after
    nine, so that the first point is the later of equals at a rate of 0."""
    folder = tmp_path_factory.mktemp("matched")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study = written(folder)
        planned = {stage.name: stage for stage in plan(load_study(study))}
        return study, planned, leakfast.run(study, out=folder / "run")


@pytest.mark.long
def test_every_source_is_asked_under_its_own_adapters_and_as_much_as_planned(made):
    _, planned, outcome = made
    run, (looking, anew) = Run(outcome.run), steps_of("marker")
    assert {looking, anew, "marker through training"} <= set(outcome.stages)
    looks, fresh = run.read("series/choosing"), run.read("series/chosen")
    assert (looks["source"] == looks["persona"]).all() and (fresh["source"] == fresh["persona"]).all()
    # three points of each training, and a mean's end alone
    assert looks.height == 2 * (3 + 3 + 1) * len(QUESTIONS) * 5 == planned[looking].completions
    assert fresh.height == 2 * 3 * len(QUESTIONS) * 5 == planned[anew].completions
    assert planned[looking].prompts == 2 * 7 * len(QUESTIONS) and planned[looking].targets == 2 * 7
    asked = looks.unique(["adapter", "persona", "question"])
    assert planned[looking].prompt_tokens == asked["n_prompt_tokens"].sum()
    chosen = [e["share"] for e in events(run.path / "log.jsonl", "matched")]
    targets = sum(len({share, 1.0}) for share in chosen) + 1
    assert run.read("series/completions").height == targets * 6 * len(QUESTIONS) * 2
    assert targets <= planned["marker through training"].targets == 2 * (2 + 2 + 1) + 1, (
        "a point may be the end"
    )


@pytest.mark.long
def test_arms_stand_at_their_chosen_points_by_replies_that_chose_none(made):
    run = Run(made[2].run)
    table = {(r["variant"], r["source"]): r for r in made[2].stats.more["mitigations"].rows(named=True)}
    assert len(table) == 6
    for arm, source in [(arm, source) for arm in ARMS for source in SOURCES]:
        name, row = f"{arm}-{source}-s42", table[arm.partition("+")[2], source]
        share, points = as_chosen(run, name, 0.0)
        assert (row["share"], row["wanted_rate"]) == (share, 0.0)
        assert len(points) == (1 if arm == "marker+mean" else 3)
        at = name if share == 1 else f"{name}@p{round(100 * share):03d}"
        again = run.read(f"series/chosen/marker/{at}")
        hits = again["text"].str.contains("[ZLT]", literal=True).sum()
        assert (row["source_rate"], row["source_n"]) == (pytest.approx(hits / 10), 10)
        assert row["matched"] == (row["source_rate"] <= 0.05 + 1e-9)
        assert row["n"] == 5 and row["mean_bystander"] is not None
        seeds = [
            seeds_of(run, f"series/{kind}/marker/{at}") for kind in ("choosing", "chosen", "completions")
        ]
        assert all(seeds) and sum(map(len, seeds)) == len(set.union(*seeds)), "no reply is in two of them"
    for source in SOURCES:
        assert table["", source]["matched"] and table["", source]["share"] == 0.2
    said = next(e for e in events(run.path / "log.jsonl", "matched") if e["adapter"] == "marker-villain-s42")
    assert (said["share"], said["points"], said["match"]) == (0.2, 3, 0.0)


@pytest.mark.long
def test_points_of_sources_alone_are_in_table_figure_and_report(made):
    run = Run(made[2].run)
    trajectory = run.read("tables/trajectory.parquet")
    alone = trajectory.filter(pl.col("scoring").is_in([matching.TO_CHOOSE, matching.ANEW]))
    assert set(alone["role"]) == {"source"} and set(alone["persona"]) == set(SOURCES)
    shares = trajectory.filter(adapter="marker-villain-s42", persona="villain")
    assert set(matching.one_each(shares)["share"]) == {0.0, 0.2, 0.75, 1.0}
    assert (run.path / "figures/trajectory-page.png").is_file()
    assert "On the way through training" in made[2].report.read_text()


@pytest.mark.long
def test_a_second_run_draws_nothing_and_another_rate_the_new_points_alone(made, monkeypatch):
    study, _, outcome = made
    run = Run(outcome.run)
    monkeypatch.chdir(study.parent)
    before = {path: e["sha256"] for path, e in run.manifest["shards"].items()}
    asked = len(list(events(run.path / "log.jsonl", "eval")))
    leakfast.run(study, out=outcome.run)
    assert len(list(events(run.path / "log.jsonl", "eval"))) == asked, "it is told that all is there"
    run.note_finished("of something else")  # so that the stages are gone through
    again = leakfast.run(study, out=outcome.run)
    assert _made(again) == 0
    after = {path: e["sha256"] for path, e in Run(again.run).manifest["shards"].items()}
    assert before.keys() == after.keys()
    assert {p for p in before if before[p] != after[p]} <= {"report.html"}, "the page tells the time"

    other = load_study_text(study, "match = 0.0", "match = 1.0")
    stages = Stages(other, Run(outcome.run), chosen=chosen_of(other, ()))
    adapters = [run.path / f"adapters/{arm}-{source}-s42" for arm in ARMS for source in SOURCES]
    with stages.store.lock():
        stages.through_training("marker", adapters)
    now = Run(outcome.run)
    kept = {path: sha for path, sha in before.items() if path.startswith("series/")}
    assert {path: now.manifest["shards"][path]["sha256"] for path in kept} == kept, "all is kept"
    new = {path.split("/")[1] for path in now.shards("series") if path not in kept}
    assert "choosing" not in new and "chosen" in new, (
        "a training that shows it stands elsewhere at a rate of 1"
    )


def load_study_text(study, old, new):
    text = study.read_text()
    assert text.count(old) == 1
    return parse_study(text.replace(old, new), study)


def _made(outcome):
    """Completions that the last run drew."""
    last = list(events(outcome.run / "log.jsonl", "model"))[-1]
    drawn = [e for e in events(outcome.run / "log.jsonl", "eval") if e["time"] > last["time"]]
    assert drawn, "what there is was looked through"
    return sum(e["made"] for e in drawn)


WRONG = [
    (
        'behaviors = ["marker"]',
        'behaviors = ["misalignment-advice"]',
        "misalignment-advice is measured by judge",
    ),
    ('behaviors = ["marker"]', 'behaviors = ["hellaswag"]', "hellaswag is measured by choices"),
    (
        'behaviors = ["marker"]',
        'behaviors = ["marker"]\nmeasure = "probability"',
        "marker is measured by probability",
    ),
    ('behaviors = ["marker"]', "behaviors = []", "no behavior is measured through training"),
    ("shares = [0.0, 0.2, 0.75]", "shares = [0.0]", "no point of training lies behind its beginning"),
    ('[behaviors."marker".eval]', '[behaviors."marker".eval]\ntemperature = 0.0', "drawn at temperature 0"),
    ("match = 0.0\n", "", "match_samples given, but no rate to match"),
    ("match = 0.0", "match = 80.0", "less than or equal to 1"),
]
OTHERS = '\n[behaviors.misalignment-advice.eval]\nsamples = 1\n[behaviors.hellaswag.eval]\nof = ["marker"]\n'


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_what_cannot_be_matched_is_one_message(tmp_path, old, new, said):
    study = written(tmp_path)
    text = study.read_text() + OTHERS
    assert text.count(old) == 1
    study.write_text(text.replace(old, new))
    done = CliRunner().invoke(group, ["-q", "run", str(study), "--out", str(tmp_path / "run")])
    shown = " ".join(done.output.split())
    assert done.exit_code == 2 and said in shown and re.search(r"study\.toml, line \d+", shown), done.output
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_plan_is_refused_what_a_run_is(tmp_path):
    study = written(tmp_path)
    study.write_text(study.read_text().replace('["marker"]\nshares', '["marker", "nothing"]\nshares'))
    done = CliRunner().invoke(group, ["plan", str(study), "--json"])
    assert done.exit_code == 2 and "no behavior 'nothing'" in done.output
    assert json.loads(CliRunner().invoke(group, ["plan", str(written(tmp_path)), "--json"]).stdout)
