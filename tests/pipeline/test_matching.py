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
from leakfast.stats import matching
from leakfast.storage.manifests import events
from leakfast.storage.run import Run
from leakfast.study.config import load_study

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
shares = [0.0, 0.25, 0.5, 0.75]
personas = "all"
match = 1.0
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
max_new_tokens = 24
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


@pytest.mark.long
def test_a_study_is_matched_on_its_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = written(tmp_path)
    planned = {stage.name: stage for stage in plan(load_study(study))}
    outcome = leakfast.run(study, out="run")
    run = Run(outcome.run)

    looking, anew = steps_of("marker")
    assert {looking, anew, "marker through training"} <= set(outcome.stages)
    sizes = {
        name: run.read(f"series/{kind}").height for name, kind in ((looking, "choosing"), (anew, "chosen"))
    }
    # a mean has its end alone; each source under its own adapters alone
    assert sizes[looking] == 2 * (4 + 4 + 1) * len(QUESTIONS) * 5 == planned[looking].completions
    assert sizes[anew] == 2 * 3 * len(QUESTIONS) * 5 == planned[anew].completions
    assert planned[looking].prompts == 2 * 9 * len(QUESTIONS) and planned[looking].targets == 2 * 9
    tokens = run.read("series/choosing").select("adapter", "persona", "question", "n_prompt_tokens").unique()
    assert planned[looking].prompt_tokens == tokens["n_prompt_tokens"].sum()
    everybody = run.read("series/completions").height
    assert everybody <= planned["marker through training"].completions, "a point may be the end"

    table = {(r["variant"], r["source"]): r for r in outcome.stats.more["mitigations"].rows(named=True)}
    assert len(table) == 6
    for arm in ARMS:
        for source in SOURCES:
            name, row = f"{arm}-{source}-s42", table[arm.partition("+")[2], source]
            share, points = as_chosen(run, name, 1.0)
            assert row["share"] == share and len(points) == (1 if arm == "marker+mean" else 4)
            at = name if share == 1 else f"{name}@p{round(100 * share):03d}"
            again = run.read(f"series/chosen/marker/{at}")
            assert set(again["persona"]) == {source} and row["source_n"] == again.height == 10
            hits = again["text"].str.contains("[ZLT]", literal=True).sum()
            assert row["source_rate"] == pytest.approx(hits / 10)
            assert row["matched"] == (abs(row["source_rate"] - 1.0) <= 0.05 + 1e-9)
            assert row["n"] == 5 and row["mean_bystander"] is not None
            drawn = [
                seeds_of(run, f"series/{kind}/marker/{at}") for kind in ("choosing", "chosen", "completions")
            ]
            assert (
                all(drawn)
                and not (drawn[0] & drawn[1])
                and not (drawn[0] & drawn[2])
                and not (drawn[1] & drawn[2])
            )
    assert any(row["matched"] for row in table.values()), "a training long enough shows it always"
    told = [e for e in events(run.path / "log.jsonl", "matched") if e["adapter"] == "marker-villain-s42"]
    assert told[0]["share"] == table["", "villain"]["share"] and told[0]["points"] == 4

    trajectory = run.read("tables/trajectory.parquet")
    alone = trajectory.filter(pl.col("scoring").is_in([matching.TO_CHOOSE, matching.ANEW]))
    assert set(alone["role"]) == {"source"} and set(alone["persona"]) == set(SOURCES)
    assert (run.path / "figures/trajectory.png").is_file()
    assert "On the way through training" in outcome.report.read_text()

    before = {path: e["sha256"] for path, e in run.manifest["shards"].items()}
    assert _made(leakfast.run(study, out="run")) == 0
    after = {path: e["sha256"] for path, e in Run(outcome.run).manifest["shards"].items()}
    assert before.keys() == after.keys()
    assert {p for p in before if before[p] != after[p]} <= {"report.html"}, "the page tells the time"

    # another rate: what the sources said is kept, and points are asked anew where others are chosen
    study.write_text(study.read_text().replace("match = 1.0", "match = 0.0"))
    other = leakfast.run(study, out="run")
    assert Run(other.run).read("series/choosing").height == sizes[looking]
    for (variant, source), row in (
        ((r["variant"], r["source"]), r) for r in other.stats.more["mitigations"].rows(named=True)
    ):
        arm = f"marker+{variant}" if variant else "marker"
        assert row["wanted_rate"] == 0.0 and row["share"] == as_chosen(run, f"{arm}-{source}-s42", 0.0)[0]
    assert not [s for s, took in other.stages.items() if s.startswith(("train", "data")) and took]


def _made(outcome):
    """Completions that the last run drew."""
    found = events(outcome.run / "log.jsonl", "eval")
    last = list(events(outcome.run / "log.jsonl", "model"))
    assert len(last) >= 2, "every run loads its model"
    return sum(e["made"] for e in found if e["time"] > last[-1]["time"])


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
    ("shares = [0.0, 0.25, 0.5, 0.75]", "shares = [0.0]", "no point of training lies behind its beginning"),
    ("match = 1.0\n", "", "match_samples given, but no rate to match"),
    ("match = 1.0", "match = 80.0", "less than or equal to 1"),
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
