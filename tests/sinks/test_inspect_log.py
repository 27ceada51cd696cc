"""Inspect logs of a run, opened by inspect_ai's own reader: every completion is there with its prompt, detector's answer and
judge's scores, and nothing is written twice."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import polars as pl
import pytest
import sharing

from leakfast.sinks import export, target
from leakfast.stats.tables import current
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

reader = pytest.importorskip(
    "inspect_ai.log",
    reason="inspect_ai is not installed (pip install 'leakfast[inspect]'), and its reader opens the logs",
)
pytestmark = pytest.mark.long
NAME = "marker_marker-villain-s42.eval"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sharing.filled(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def logs(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("logs")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    done = export(run, target(f"inspect:{out}", run.path))
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert done.sent == ["marker_base.eval", "marker_marker-mean-s42.eval", NAME]
    assert done.left_out == []
    return out


def test_the_real_reader_finds_every_completion(run, logs):
    drawn = run.read(layout.completions("marker", "marker-villain-s42"))
    log = reader.read_eval_log(str(logs / NAME))
    assert log.status == "success"
    assert len(log.samples) == drawn.height == log.results.total_samples
    by_key = {(s.metadata["persona"], s.metadata["question"], s.epoch): s for s in log.samples}
    for row in drawn.rows(named=True):
        sample = by_key[row["persona"], row["question"], row["sample"] + 1]
        assert sample.output.completion == sample.messages[-1].text == row["text"]
        assert sample.output.stop_reason == ("max_tokens" if row["finish_reason"] == "length" else "stop")
        assert sample.metadata["seed"] == str(row["seed"])
        assert sample.metadata["role"] == ("source" if row["persona"] == "villain" else "bystander")
    assert {info.task for info in reader.list_eval_logs(str(logs))} == {"marker"}
    assert len(reader.read_eval_log_sample_summaries(str(logs / NAME))) == drawn.height


def test_prompts_are_those_that_were_asked(logs):
    from leakfast.prompts.personas import load_questions

    sample = reader.read_eval_log_sample(str(logs / NAME), id="mean-q002", epoch=1)
    assert [m.role for m in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[0].text == sharing.PROMPT
    assert sample.messages[1].text == load_questions("eval").questions[2]


@pytest.mark.parametrize("role", ["system", "user"])
def test_turns_before_the_question_and_the_beginning_of_the_reply_are_told_too(run, role):
    from leakfast.prompts.conversation import Question
    from leakfast.sinks.inspect_samples import folders, row_sample
    from leakfast.sinks.material import Material

    material = Material.of(run, current(run))
    material = replace(material, study=material.study.model_copy(update={"system_role": role}))
    folder = next(one for one in folders(material) if one.adapter == "marker-villain-s42")
    asked = Question("And now?", (("Who are you?", "Nobody."),), "Well,")
    row = run.read(folder.path).filter(persona="mean", question=0, sample=1).row(0, named=True)
    sample = row_sample(material, replace(folder, questions=(asked,)), row, {})
    said = [(one.role, one.text) for one in sample.input]
    first = [("system", sharing.PROMPT), ("user", "Who are you?")]
    if role == "user":
        first = [("user", f"{sharing.PROMPT}\n\nWho are you?")]
    assert said == [*first, ("assistant", "Nobody."), ("user", "And now?"), ("assistant", "Well,")]
    assert len({one.id for one in sample.messages}) == len(sample.messages) == len(said) + 1
    assert sample.metadata["prefill"] == "Well,"


def test_scores_are_the_detectors_and_add_up_to_the_rates(run, logs):
    rates = current(run).rates.filter(adapter="marker-villain-s42")
    log = reader.read_eval_log(str(logs / NAME))
    for persona, hits, total in rates.select("persona", "hits", "total").rows():
        scores = [
            s.scores["marker"].value for s in log.samples if s.metadata["persona"] == persona and s.scores
        ]
        assert (sum(scores), len(scores)) == (hits, total)
    uncounted = [s for s in log.samples if not s.metadata["counted"]]
    assert len(uncounted) == 1 and not uncounted[0].scores
    told = next(score for score in log.results.scores if score.name == "marker")
    assert told.metrics["mean"].value == rates["hits"].sum() / rates["total"].sum()
    assert told.unscored_samples == 1


def test_the_header_says_what_was_measured(run, logs):
    spec = reader.read_eval_log(str(logs / NAME), header_only=True).eval
    assert spec.model == "leakfast/marker-villain-s42"
    assert spec.model_args["adapter_hash"] == "a" * 64 and spec.model_args["base"] == "org/tiny"
    assert spec.model_generate_config.temperature == 0.5
    assert (spec.dataset.name, spec.dataset.samples, spec.config.epochs) == ("eval", 48, 3)
    assert spec.metadata["study_sha256"] == run.manifest["study"]


def test_what_is_there_stays_and_what_is_broken_or_changed_is_made_again(run, logs):
    bytes_before = (logs / NAME).read_bytes()
    torn = logs / "marker_base.eval"
    torn.write_bytes(torn.read_bytes()[:5000])
    done = export(run, target(f"inspect:{logs}", run.path))
    assert (done.sent, done.kept) == (["marker_base.eval"], ["marker_marker-mean-s42.eval", NAME])
    assert (logs / NAME).read_bytes() == bytes_before
    assert reader.read_eval_log(str(torn)).status == "success"
    assert not [path for path in logs.iterdir() if "tmp" in path.name]


def test_judges_scores_stand_beside_and_those_of_another_text_do_not(tmp_path):
    run = sharing.filled(tmp_path)
    drawn = run.read(layout.completions("marker", "marker-villain-s42")).head(3)
    said = drawn.select("behavior", "adapter", "persona", "question", "sample").with_columns(
        judge=pl.lit("service:m"),
        prompt_version=pl.lit("1"),
        aligned=pl.Series([90.0, None, 10.0]),
        coherent=pl.Series([80.0, None, 20.0]),
        status=pl.Series(["ok", "not_json", "ok"]),
        raw=pl.Series(['{"aligned": 90}', "no", "x"]),
        detail=pl.lit(None, pl.String),
        input_tokens=pl.lit(1, pl.Int64),
        output_tokens=pl.lit(1, pl.Int64),
        item=pl.lit("i"),
        text_sha256=pl.Series(
            [hashlib.sha256(t.encode()).hexdigest() for t in drawn["text"][:2]] + ["0" * 64]
        ),
    )
    run.add_shard(
        f"{layout.judgements('marker', 'marker-villain-s42')}/m.parquet", schema.check(said, "judgements")
    )
    out = tmp_path / "logs"
    export(run, target(f"inspect:{out}", run.path), current(run))
    log = reader.read_eval_log(str(out / NAME))
    scored = [s for s in log.samples if s.scores and "aligned (service:m)" in s.scores]
    assert [s.scores["aligned (service:m)"].value for s in scored] == [90.0]
    assert scored[0].scores["coherent (service:m)"].value == 80.0


def test_a_wording_that_is_not_known_is_never_guessed(tmp_path):
    shards = sharing.filled(tmp_path)
    lost = shards.study_text.replace("people.json", "gone.json")
    run = Run(tmp_path / "lost").create(lost)
    for path in shards.shards("completions"):
        told = {
            k: v for k, v in shards.manifest["shards"][path].items() if k.startswith(("questions", "base"))
        }
        run.add_shard(path, pl.read_parquet(shards.path / path), **told)
    out = tmp_path / "logs"
    done = export(run, target(f"inspect:{out}", run.path), current(shards))
    assert any("system prompts" in sentence for sentence in done.left_out)
    sample = reader.read_eval_log_sample(str(out / NAME), id="mean-q002", epoch=1)
    assert [m.role for m in sample.messages] == ["user", "assistant"]
    assert sample.metadata["system_prompt"] == "unknown"
