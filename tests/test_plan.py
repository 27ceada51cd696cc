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


def test_a_control_is_measured_on_the_adapters_of_all_it_names_and_a_judge_has_a_price(tmp_path):
    text = """
name = "judged"
model = "organism"
personas = ["villain", "comedian", "assistant"]
sources = ["villain", "comedian"]
[trajectory]
behaviors = ["misalignment-advice"]
personas = ["assistant"]
samples = 1
[behaviors.misalignment-advice.eval]
questions = "organism-alignment"
samples = 2
max_new_tokens = 10
[behaviors.misalignment-advice.judge]
JUDGE
[behaviors.refusal.eval]
questions = "requests"
[behaviors.hellaswag.eval]
items = "organism-stories"
half = "all"
"""
    stages = {}
    for judge in ('judge = "openai-batch:gpt-4o"', 'judge = "openai:gpt-4o"', ""):
        found = {s.name: s for s in plan(parse_study(text.replace("JUDGE", judge), tmp_path / "s.toml"))}
        stages[judge] = found
        assert found["evaluate hellaswag"].targets == 2 * 2 + 1
        way = found["misalignment-advice through training"]
        assert way.targets == 2 * 2 * 4 + 1 and way.prompts == way.targets * 3 * 8 == way.completions
    batch, chat, own = ({n: s.judge_usd for n, s in found.items()} for found in stages.values())
    name = "evaluate misalignment-advice"
    assert 0 < batch[name] == pytest.approx(chat[name] / 2) and own[name] == 0
    each = chat[name] / stages['judge = "openai:gpt-4o"'][name].completions
    assert 1e-4 < each < 1e-2, "a few hundred tokens"
    assert chat["evaluate refusal"] is None
