"""The plan of a study: counts are those of the run that follows, and nothing unmeasured is a number."""

from __future__ import annotations

import json
from contextlib import contextmanager

import polars as pl
import pytest
from click.testing import CliRunner
from measuring import evaluate

from leakfast import models
from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.generation import backends
from leakfast.generation.contract import Completion
from leakfast.generation.vllm.widths import Width, device_name, rate_for, remember
from leakfast.pipeline.estimate import plan
from leakfast.pipeline.estimate_shown import planned
from leakfast.pipeline.steps import SHOWN
from leakfast.prompts.personas import load_personas, load_questions
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import behavior_config, parse_study

pytestmark = pytest.mark.long


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
    centroids, marker, capability, shown = plan(study)
    assert (shown.targets, shown.seconds) == (4, None) and "small did not time them" in shown.note
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


def test_tables_and_report_take_what_they_took_at_the_same_size(study):
    """What they take of another size is not made up: of few adapters they are mostly what costs the same for many."""
    run, asked = Run(study.run_dir).create(), dict.fromkeys(("villain", "comedian", "assistant"), "hash")
    for seconds in (12.5, 0.3):  # the second time little was made again
        run.log("took", step=SHOWN, seconds=seconds)

    def measured(*adapters):
        frame = pl.DataFrame({"persona": list(asked) * 20 * 2, "n_tokens": 8})
        for name in adapters:
            scored = layout.choices(name, "organism", "letters")
            folder = scored if name.startswith("capability") else layout.completions("marker", name)
            run.add_shard(layout.shard(folder), frame, personas=asked)
        return planned(study, run)

    stage = measured("base", "marker-villain-s42")
    assert stage.seconds is None
    assert stage.note.endswith(
        "they took 12.5 s in runs/small, of 1 adapter, 3 personas and 240 completions; this study has 4 adapters, 3 personas "
        "and 360 completions"
    )
    stage = measured("marker-comedian-s42", "capability-villain-s42", "capability-comedian-s42")
    assert (stage.seconds, stage.note) == (12.5, "seconds as they took in runs/small")
    done = CliRunner().invoke(group, ["-q", "plan", "small.toml"])
    assert "tables, figures, report: seconds as they took in runs/small" in done.stdout


def test_stated_and_calibrated_numbers_say_so(study):
    stated = plan(study, tokens_each=5, tokens_per_s=100)[1]
    assert (stated.output_tokens, stated.output_from, stated.seconds) == (1800, "stated", 18.0)
    drawn = plan(study, calibrate=6, backend="transformers")[1]
    assert drawn.output_from.startswith("6 completions drawn now")
    assert 0 < drawn.output_tokens <= 8 * drawn.completions
    assert drawn.seconds > 0 and drawn.disk_bytes > 0
    assert not study.run_dir.exists(), "a plan writes nothing"


class Clock:
    """Seconds that pass only where a stand-in says so."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def slow_engine(monkeypatch):
    """An engine that takes 100 s to start, 50 s for its first completions and 2 s for any others; what it was asked."""
    clock, asked = Clock(), []
    monkeypatch.setattr("leakfast.pipeline.estimate.time", clock)

    class Engine:
        def stream(self, works, sampling, progress=None):
            for work in works:
                clock.now += 2.0 if asked else 50.0
                asked.append(len(work.requests))
                yield work, [Completion(i, 0, [5] * 8, "length") for i in range(len(work.requests))]

    @contextmanager
    def opened(loaded, adapters, backend, **settings):
        clock.now += 100.0
        asked.clear()
        yield Engine()

    monkeypatch.setattr(backends, "opened", opened)
    return asked


def test_a_calibration_times_a_warm_engine_and_tells_its_start_apart(study, slow_engine):
    _, marker, *_ = plan(study, calibrate=20, backend="transformers")
    assert slow_engine == [2, 20], "a tenth of them warms the engine"
    assert marker.seconds == pytest.approx(marker.output_tokens / (20 * 8 / 2.0))
    assert marker.start_s == 100.0 and "80 output tokens/s, timed now with transformers" in marker.rate_from
    done = CliRunner().invoke(group, ["plan", "small.toml", "--calibrate", "20", "--backend", "transformers"])
    assert (
        "80 output tokens/s, timed now" in done.stdout and "starting the engine took 100.0 s" in done.stdout
    )
    stated = plan(study, calibrate=20, tokens_per_s=10, backend="transformers")[1]
    assert stated.seconds == stated.output_tokens / 10 and stated.rate_from == "stated"


def test_what_tune_measured_goes_before_a_samples_own_rate(study, slow_engine, monkeypatch, tmp_path):
    """One engine for all behaviors; a sample too small to fill its seats would say too little."""
    monkeypatch.setenv("LEAKFAST_CACHE", str(tmp_path / "cache"))
    two = study.model_copy(
        update={
            "behaviors": {
                **study.behaviors,
                "refusal": behavior_config("refusal", {"eval": {"questions": "eval", "max_new_tokens": 24}}),
            }
        }
    )
    fingerprint = models.load(study.model, dtype="float32").fingerprint
    remember(device_name(), fingerprint, "float32", Width(512), tokens_per_s=25_000.0, model="tiny")
    stages = {stage.name: stage for stage in plan(two, calibrate=10, backend="vllm")}
    assert slow_engine == [1, 10, 1, 10], "opened once"
    for name in ("evaluate marker", "evaluate refusal"):
        assert stages[name].seconds == pytest.approx(stages[name].output_tokens / 25_000)
        assert "25,000 output tokens/s, measured on this" in stages[name].rate_from
    by_hand = rate_for(device_name(), fingerprint, "float32", 64)
    assert by_hand is None and rate_for(device_name(), fingerprint, "bfloat16") is None
    assert rate_for(device_name(), fingerprint, "float32", 512) == 25_000


def test_the_command_prints_the_plan(study):
    done = CliRunner().invoke(group, ["-q", "plan", "small.toml", "--json"])
    assert done.exit_code == 0, done.output
    stages = json.loads(done.stdout)["stages"]
    assert [s["name"] for s in stages] == ["centroids", "evaluate marker", "evaluate capability", SHOWN]
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


@pytest.mark.parametrize("calibrate", [0, 4])
def test_a_vllm_table_that_the_run_refuses_is_refused_by_the_plan(tmp_path, calibrate):
    text = """
name = "both"
model = "organism"
personas = ["villain", "assistant"]
sources = ["villain"]
[vllm]
lora = "merged"
data_parallel = 2
[behaviors.marker.eval]
samples = 1
"""
    with pytest.raises(InputError, match=r"--lora merged.*\[vllm\]"):
        plan(parse_study(text, tmp_path / "s.toml"), calibrate=calibrate)


def test_probabilities_are_reckoned_with_what_has_to_be_drawn_for_them(study, tmp_path):
    """Of the marker a reply a prompt, of the base or of all; of refusal nothing is drawn at all."""
    text = (
        (tmp_path / "small.toml")
        .read_text()
        .replace("max_new_tokens = 8", "max_new_tokens = 8\nmeasure = 'probability'")
    )
    text += "[behaviors.refusal.eval]\nmeasure = 'probability'\n"
    _, drawn, read, _, refusal, _ = plan(parse_study(text, tmp_path / "small.toml"))
    assert (drawn.targets, drawn.completions) == (1, 3 * 20)
    assert (read.name, read.targets, read.prompts, read.completions) == (
        "probability of marker",
        3,
        3 * 3 * 20,
        0,
    )
    assert read.prompt_tokens == 3 * drawn.prompt_tokens and read.seconds is None
    assert (refusal.name, refusal.prompts, refusal.completions) == ("probability of refusal", 3 * 3 * 50, 0)
    own = text.replace("'probability'\n", "'probability'\nprobability_replies = 'own'\n", 1)
    _, drawn, read, *_ = plan(parse_study(own, tmp_path / "small.toml"))
    assert (drawn.targets, drawn.completions, read.prompts) == (2, 2 * 3 * 20, 2 * 3 * 20)
    both = text.replace("'probability'", "'both'")
    _, drawn, read, *_ = plan(parse_study(both, tmp_path / "small.toml"))
    assert (drawn.targets, drawn.completions, read.prompts) == (3, 3 * 3 * 20 * 2, 3 * 3 * 20)
    sampled = drawn.output_tokens
    said = read.prompt_tokens + sampled // 2
    assert (
        f"at most {said:,} tokens are read" in read.note and f"at most {sampled:,} tokens, drawn" in read.note
    )
    assert f": {sampled / said:.1f} times as many" in read.note and not refusal.note
