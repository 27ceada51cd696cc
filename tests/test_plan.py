"""The plan of a study: counts are those of the run that follows, and nothing unmeasured is a number."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from leakfast.cli.main import group
from leakfast.config import parse_study
from leakfast.evaluate import evaluate
from leakfast.personas import load_personas, load_questions
from leakfast.plan import plan
from leakfast.store import Run


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"""
name = "small"
model = "{tiny_folder}"
dtype = "float32"
personas = ["villain", "comedian", "assistant"]
sources = ["villain", "comedian"]
[behaviors.marker.eval]
samples = 2
max_new_tokens = 8
[behaviors.capability.eval]
items = "organism"
half = "all"
"""
    (tmp_path / "small.toml").write_text(text)
    return parse_study(text, tmp_path / "small.toml")


def test_counts_are_the_runs(study, tiny_qwen2):
    centroids, marker, capability = plan(study)
    assert (marker.targets, marker.prompts, marker.completions) == (3, 3 * 3 * 20, 3 * 3 * 20 * 2)
    assert centroids.prompts == 60
    assert marker.prompt_tokens == 3 * centroids.prompt_tokens
    assert (marker.output_tokens, marker.output_from) == (8 * marker.completions, "at most: max_new_tokens")
    assert marker.seconds is None and marker.disk_bytes is None, "nobody measured them"
    assert capability.completions == 0 and capability.prompts > 0
    run, cfg = Run(study.run_dir), study.behaviors["marker"].eval
    evaluate(
        tiny_qwen2,
        run,
        [],
        load_personas(study.personas),
        load_questions("eval"),
        "marker",
        cfg,
        3,
        base=True,
    )
    rows = run.read("completions")
    assert rows["n_prompt_tokens"].sum() == marker.prompt_tokens // 3 * cfg.samples
    later = plan(study)[1]
    assert later.output_tokens == round(rows["n_tokens"].mean() * marker.completions)
    sizes = [
        entry["bytes"] for path, entry in run.manifest["shards"].items() if path.startswith("completions/")
    ]
    assert later.disk_bytes == round(sum(sizes) / rows.height * marker.completions)
    assert "completions in" in later.output_from


def test_stated_and_calibrated_numbers_say_so(study):
    stated = plan(study, tokens_each=5, tokens_per_s=100)[1]
    assert (stated.output_tokens, stated.output_from, stated.seconds) == (1800, "stated", 18.0)
    drawn = plan(study, calibrate=6, backend="transformers")[1]
    assert drawn.output_from.startswith("6 completions drawn now")
    assert 0 < drawn.output_tokens <= 8 * drawn.completions
    assert drawn.seconds > 0 and drawn.disk_bytes > 0
    assert not study.run_dir.exists(), "a plan writes nothing"


def test_the_command_prints_the_plan(study):
    done = CliRunner().invoke(group, ["-q", "plan", "small.toml", "--json"])
    assert done.exit_code == 0, done.output
    stages = json.loads(done.stdout)["stages"]
    assert [s["name"] for s in stages] == ["centroids", "evaluate marker", "evaluate capability"]
    done = CliRunner().invoke(group, ["-q", "plan", "small.toml"])
    assert "at most: max_new_tokens" in done.stdout and "--tokens-per-s" in done.stdout
    done = CliRunner().invoke(group, ["-q", "plan", "small.toml", "--tokens-per-s", "0"])
    assert done.exit_code == 2
