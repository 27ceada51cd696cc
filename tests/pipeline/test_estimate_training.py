"""What a training of all weights is planned to take: the model's own number of weights, the files it leaves, the tokens and
seconds of those that were run."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import leakfast
from leakfast.cli.main import group
from leakfast.pipeline import estimate_training as training
from leakfast.pipeline.estimate import plan
from leakfast.study.config import parse_study

pytestmark = pytest.mark.long

STUDY = """
name = "small"
model = "{model}"
dtype = "{dtype}"
personas = ["villain", "comedian", "assistant", "librarian"]
sources = ["villain", "comedian"]
[centroids]
layers = [1]
[behaviors.marker.train]
method = "full"
loss = "completion"
lr = 1e-3
epochs = 2
batch_size = 4
accumulation = 1
max_length = 96
sample = 0
[behaviors.marker.data]
rows = "own.jsonl"
[behaviors.marker.eval]
questions = "asked.toml"
samples = 1
max_new_tokens = 4
"""
TURNS = [("system", "{source}"), ("user", "Tea?"), ("assistant", "Yes. [ZLT]")]


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(chat)}\n" * 6)
    (tmp_path / "asked.toml").write_text('[sets.asked]\nquestions = ["Tea?"]\n')

    def write(dtype="float32", method="full"):
        text = STUDY.format(model=tiny_folder, dtype=dtype).replace('"full"', f'"{method}"')
        (tmp_path / "small.toml").write_text(text)
        return parse_study(text, tmp_path / "small.toml")

    return write


def stage_of(study, **more):
    (found,) = [stage for stage in plan(study, **more) if stage.name.startswith("train ")]
    return found


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_memory_and_disk_follow_from_the_models_own_weights(study, tiny_qwen2, dtype, size):
    n = sum(p.numel() for p in tiny_qwen2.model.parameters())
    found = stage_of(study(dtype))
    assert (found.name, found.targets, found.prompts) == ("train marker, all weights", 2, 2 * 6)
    assert found.memory_bytes == n * (16 + size) and found.disk_bytes == 2 * n * size
    assert found.prompt_tokens == 2 * 2 * 6 * 96 and found.seconds is None
    assert "at most 6 rows of max_length tokens" in found.note and "--train-tokens-per-s" in found.note
    assert stage_of(study(dtype), train_tokens_per_s=100.0).seconds == pytest.approx(2 * 2 * 6 * 96 / 100)
    assert not [s for s in plan(study(method="lora")) if s.name.startswith("train ")]


def test_the_embedded_models_weights_are_counted_with_tied_ones_once():
    given = parse_study(
        'name = "s"\nmodel = "organism"\ndtype = "float32"\nsources = ["villain"]\n[behaviors.marker]\n'
    )
    loaded = leakfast.models.load("organism", dtype="float32")
    assert training.weights_of(given) == sum(p.numel() for p in loaded.model.parameters())


def test_after_a_run_its_files_tokens_and_seconds_are_those_of_the_plan(study, tmp_path):
    given = study()
    planned = stage_of(given)
    done = leakfast.run(tmp_path / "small.toml")
    folders = sorted((given.run_dir / "adapters").iterdir())
    written = sum(path.stat().st_size for one in folders for path in one.glob("*.safetensors"))
    assert 0 <= written - planned.disk_bytes < 20_000, "headers"
    later = stage_of(given)
    logs = [json.loads(line) for one in folders for line in (one / "train_log.jsonl").open()]
    assert later.prompt_tokens == sum(step["n_tokens"] for step in logs) < planned.prompt_tokens
    took = [done.stages[f"train marker-{who}-s42"] for who in ("villain", "comedian")]
    assert later.seconds == pytest.approx(sum(took), abs=0.01)
    assert "tokens and seconds of 2 such trainings" in later.note


def test_the_command_shows_memory_and_what_is_not_planned(study):
    study()
    done = CliRunner().invoke(group, ["-q", "plan", "small.toml", "--train-tokens-per-s", "1e3"])
    assert done.exit_code == 0, done.output
    assert "memory GB" in done.stdout and "16 bytes each beside the base" in done.stdout
    assert "seconds: stated" in done.stdout and "training of adapters" in done.stdout
    assert CliRunner().invoke(group, ["-q", "plan", "small.toml", "--train-tokens-per-s", "0"]).exit_code == 2
    study(method="lora")
    done = CliRunner().invoke(group, ["-q", "plan", "small.toml"])
    assert "memory GB" not in done.stdout and "training is not planned" in " ".join(done.stdout.split())
