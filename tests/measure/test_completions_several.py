"""Several behaviors in one evaluation: one engine, the same completions as one by one, and what the command prints."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from measuring import evaluate, evaluate_all

from leakfast.cli.main import group
from leakfast.generation import backends
from leakfast.measure import rates
from leakfast.measure.request import Asked
from leakfast.prompts.personas import load_personas
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig

PEOPLE = load_personas("villain,comedian")
SHORT = EvalConfig(samples=2, max_new_tokens=4, batch_completions=8)
LONG = EvalConfig(samples=1, max_new_tokens=9, temperature=0.5, batch_completions=8)
ASKED = [Asked("marker", ["Tea?", "Rain?"], SHORT), Asked("refusal", ["Can you help?"], LONG)]


def test_one_engine_draws_what_two_calls_would(tiny_qwen2, tmp_path, monkeypatch):
    opened, real = [], backends.opened

    @contextmanager
    def counted(*given, **settings):
        opened.append(settings)
        with real(*given, **settings) as engine:
            yield engine

    monkeypatch.setattr(backends, "opened", counted)
    run, progress = Run(tmp_path / "both"), []
    both = evaluate_all(
        tiny_qwen2, run, [], PEOPLE, ASKED, 5, base=True, progress=lambda *a: progress.append(a[:2])
    )
    assert len(opened) == 1 and [d.behavior for d in both] == ["marker", "refusal"]
    assert [d.made for d in both] == [8, 2] and progress[-1] == (10, 10)
    for one in ASKED:
        alone = Run(tmp_path / one.behavior)
        evaluate(tiny_qwen2, alone, [], PEOPLE, one.questions, one.behavior, one.config, 5, base=True)
        folder = f"completions/{one.behavior}/base"
        assert run.read(folder).equals(alone.read(folder))
    again = evaluate_all(tiny_qwen2, run, [], PEOPLE, ASKED, 5, base=True)
    assert len(opened) == 3 and [(d.made, d.kept) for d in again] == [(0, 8), (0, 2)]


def test_what_a_judge_must_read_is_drawn_and_has_no_rate_yet(tiny_qwen2, tmp_path):
    run = Run(tmp_path / "run")
    done = evaluate(tiny_qwen2, run, [], PEOPLE, ["Why?"], "misalignment-advice", SHORT, 5, base=True)
    assert run.read("completions/misalignment-advice/base").height == 4
    with pytest.raises(ValueError, match="before a judge"):
        rates(run, done, PEOPLE)
    with pytest.raises(ValueError, match="measured by choices"):
        evaluate(tiny_qwen2, run, [], PEOPLE, ["Why?"], "capability", SHORT, 5, base=True)


def test_the_command_measures_completions_and_choices_in_one_call(tmp_path):
    common = [
        "--model",
        "organism",
        "--base",
        "--personas",
        "villain,assistant",
        "--out",
        str(tmp_path / "run"),
    ]
    short = ["--samples", "1", "--max-new-tokens", "6"]
    asked = ["--behavior", "refusal,hellaswag,misalignment-advice"]
    result = CliRunner().invoke(group, ["-q", "eval", *asked, *common, *short, "--json"])
    assert result.exit_code == 0, result.output
    assert "misalignment-advice has no rates before a judge" in result.stderr
    found = {one["behavior"]: one for one in json.loads(result.stdout)["behaviors"]}
    assert set(found) == {"refusal", "hellaswag"}
    assert found["hellaswag"]["items"] == "organism-stories" and found["hellaswag"]["scoring"] == "full-text"
    assert {r["persona"]: r["total"] for r in found["refusal"]["rates"]} == {"villain": 50, "assistant": 50}
    assert {r["total"] for r in found["hellaswag"]["rates"]} == {48}
    assert {r["behavior"] for r in found["hellaswag"]["rates"]} == {"hellaswag"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--behavior", "refusal,sycophancy", "--half", "eval"], "--half does not belong to"),
        (["--behavior", "hellaswag", "--samples", "2"], "--samples does not belong to"),
        (["--behavior", "refusal,refusl"], "Use one of: marker"),
    ],
)
def test_flags_of_no_behavior_named_are_refused(words, said, tmp_path):
    result = CliRunner().invoke(
        group, ["-q", "eval", "--model", "organism", "--base", "--out", str(tmp_path / "r"), *words]
    )
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    assert not (tmp_path / "r").exists()


def test_what_another_behavior_was_drawn_by_the_same_request_is_not_drawn_again(
    tiny_qwen2, tmp_path, monkeypatch, caplog
):
    """Two behaviors that ask the same, and variants of one: the unadapted model says the same under both."""
    import polars as pl

    run, real, drawn = Run(tmp_path / "run"), backends._Local.stream, []

    def counted(self, works, *given):
        for work, done in real(self, works, *given):
            drawn.append(len(done))
            yield work, done

    monkeypatch.setattr(backends._Local, "stream", counted)
    asked = [
        Asked(name, ["Tea?", "Rain?"], SHORT)
        for name in ("misalignment-code", "misalignment-advice", "marker+few")
    ]
    progress = []
    with caplog.at_level("INFO", logger="leakfast"):
        first, second, third = evaluate_all(
            tiny_qwen2, run, [], PEOPLE, asked, 5, base=True, progress=lambda *a: progress.append(a[:2])
        )
    assert (sum(drawn), first.made, second.made, second.kept) == (8, 8, 0, 8)
    assert third.kept == 8 and progress[-1] == (24, 24) and caplog.text.count("copied") == 2
    frames = [run.read(done.folders[0]) for done in (first, second, third)]
    assert [frame["behavior"].unique().to_list() for frame in frames] == [[one.behavior] for one in asked]
    assert all(frame.drop("behavior").equals(frames[0].drop("behavior")) for frame in frames)
    assert frames[0].schema == frames[1].schema
    entries = run.manifest["shards"]
    assert len({entries[f"{done.folders[0]}/part-00000.parquet"]["request"] for done in (first, second)}) == 1
    # with other settings, or once it is damaged, nothing is taken over
    warmer = Asked("marker", ["Tea?", "Rain?"], SHORT.model_copy(update={"temperature": 0.5}))
    assert evaluate_all(tiny_qwen2, run, [], PEOPLE, [warmer], 5, base=True)[0].made == 8
    assert evaluate_all(tiny_qwen2, run, [], PEOPLE, [warmer], 6, base=True)[0].made == 8
    for path in (run.path / "completions").rglob("*.parquet"):
        path.write_bytes(b"damaged")
    again = evaluate_all(tiny_qwen2, Run(run.path), [], PEOPLE, asked[:2], 5, base=True)
    assert [done.made for done in again] == [8, 0]
    whole = pl.concat([Run(run.path).read(done.folders[0]) for done in again])
    assert whole.drop("behavior").equals(pl.concat([frames[0], frames[0]]).drop("behavior"))


def test_a_shard_that_another_replaces_by_a_copy_is_kept_aside(tiny_qwen2, tmp_path):
    run, other = Run(tmp_path / "run"), SHORT.model_copy(update={"temperature": 0.5})
    evaluate_all(tiny_qwen2, run, [], PEOPLE, [Asked("marker", ["Tea?"], other)], 5, base=True)
    evaluate_all(tiny_qwen2, run, [], PEOPLE, [Asked("refusal", ["Tea?"], SHORT)], 5, base=True)
    (done,) = evaluate_all(tiny_qwen2, run, [], PEOPLE, [Asked("marker", ["Tea?"], SHORT)], 5, base=True)
    assert done.made == 0 and done.engine is None, "no engine was opened"
    aside = list((run.path / "quarantine").rglob("*.parquet"))
    assert len(aside) == 1 and "completions/marker/base" in str(aside[0])
    assert run.has("completions/marker/base/part-00000.parquet")


def test_a_command_with_other_settings_does_not_take_a_run_apart(tmp_path):
    """As a first look at two personas would, of an adapter whose run holds all."""
    run = Run(tmp_path / "run")
    whole = ["eval", "--model", "organism", "--base", "--out", str(run.path), "--samples", "1"]
    asked = {
        "refusal": ["--behavior", "refusal", "--max-new-tokens", "6", "--personas", "villain,assistant"],
        "hellaswag": ["--behavior", "hellaswag", "--personas", "villain,assistant"],
    }
    for name, words in asked.items():
        given = whole if name == "refusal" else whole[:-2]
        first = CliRunner().invoke(group, [*given, *words])
        assert first.exit_code == 0, first.stderr
        before = run.shards()
        fewer = [*given, *words[:-1], "villain"]
        refused = CliRunner().invoke(group, fewer)
        assert (
            refused.exit_code == 2
            and "by another request" in refused.stderr
            and "--replace" in refused.stderr
        )
        assert run.shards() == before and not (run.path / "quarantine").exists()
        assert CliRunner().invoke(group, [*given, *words]).exit_code == 0, "the same command goes on"
    assert CliRunner().invoke(group, [*fewer, "--replace"]).exit_code == 0
    assert list((run.path / "quarantine").rglob("*.parquet"))
