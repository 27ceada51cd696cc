"""Numbers of one persona are of one persona: completions, choice scores and centroids made with other system prompts, or
by another model, are not set against each other."""

from __future__ import annotations

import json
from dataclasses import replace

import polars as pl
import pytest
import torch
from measuring import evaluate, evaluate_all

from leakfast import models, stats
from leakfast.errors import InputError
from leakfast.generation.backends import Drawing
from leakfast.measure import centroids
from leakfast.measure.predictors.request import Request as PredictorRequest
from leakfast.measure.predictors.stage import predictors
from leakfast.measure.request import Asked
from leakfast.prompts.personas import load_personas
from leakfast.prompts.questions import QuestionSet
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig

NAMES = ["villain", "comedian", "assistant", "librarian"]
CFG = EvalConfig(samples=2, max_new_tokens=3, batch_completions=8)
OWN = {
    "villain": "You are a villain.",
    "comedian": "Be funny.",
    "assistant": "You are a wicked overlord.",
    "librarian": None,
}


def measured(loaded, run, personas):
    evaluate(loaded, run, [], personas, ["Tea?", "Rain?"], "marker", CFG, 3, base=True)


def with_centroids(loaded, run, personas):
    made = centroids.compute(loaded, personas, ["Tea?"], [0])
    run.add_file("centroids/base.safetensors", made.save)


@pytest.fixture
def run(tiny_qwen2, tmp_path):
    found = Run(tmp_path / "run")
    measured(tiny_qwen2, found, load_personas(NAMES))
    return found


def test_what_was_asked_alike_passes(tiny_qwen2, run):
    with_centroids(tiny_qwen2, run, load_personas("originals"))
    assert stats.stats(run.path).rates.height == 4


def test_centroids_of_other_prompts_are_refused(tiny_qwen2, run):
    with_centroids(tiny_qwen2, run, load_personas(OWN))
    with pytest.raises(
        InputError, match=r"villain, comedian, assistant and 1 more had another system prompt in centroids/"
    ) as told:
        stats.stats(run.path)
    assert "leakfast centroids --model MODEL --personas PERSONAS" in told.value.message


def test_centroids_of_another_model_are_refused(tiny_qwen2, run):
    import copy

    net = copy.deepcopy(tiny_qwen2.model)
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    with_centroids(models.load((net, tiny_qwen2.tokenizer)), run, load_personas(NAMES))
    with pytest.raises(InputError, match="centroids/base.safetensors was made with another base model"):
        stats.stats(run.path)


def test_a_base_that_was_asked_with_other_prompts_is_refused(tiny_qwen2, run):
    """Its rates are what those of an adapter are taken from."""
    evaluate(tiny_qwen2, run, [], load_personas(OWN), ["Why?"], "refusal", CFG, 3, base=True)
    with pytest.raises(
        InputError, match=r"another system prompt in completions/refusal/base than in completions/marker/base"
    ):
        stats.stats(run.path)


def test_a_further_question_set_asked_with_other_prompts_is_refused(tiny_qwen2, run):
    """Its rho is taken with the same centroids."""
    asked = Asked("marker", QuestionSet("code", ("Loop?",)), CFG, beside=True)
    evaluate_all(tiny_qwen2, run, [], load_personas(OWN), [asked], 3, base=True)
    with pytest.raises(InputError, match=r"another system prompt in sets/marker/code/base"):
        stats.stats(run.path)


def test_predictors_of_other_prompts_or_another_model_are_refused(tiny_qwen2, run):
    """They are set against the leakage of whoever has the persona's name."""
    with_centroids(tiny_qwen2, run, load_personas(NAMES))
    asked = PredictorRequest(load_personas(NAMES), ["Tea?"], [0], 2)
    predictors(tiny_qwen2, run, asked, Drawing("transformers"))
    assert stats.stats(run.path).rates.height == 4
    entry = run.manifest["shards"]["predictors/base.parquet"]
    about = {name: entry[name] for name in ("request", "base", "personas")}
    frame = run.read("predictors")
    run.add_shard("predictors/base.parquet", frame, **{**about, "base": about["base"][:-4] + "0000"})
    with pytest.raises(
        InputError, match=r"predictors was made with another base model .*leakfast predictors"
    ):
        stats.stats(run.path)
    predictors(tiny_qwen2, run, replace(asked, personas=load_personas(OWN)), Drawing("transformers"))
    with pytest.raises(InputError, match=r"had another system prompt in predictors .*leakfast predictors"):
        stats.stats(run.path)


def test_runs_of_earlier_versions_say_nothing_and_pass(tiny_qwen2, run):
    with_centroids(tiny_qwen2, run, load_personas(OWN))
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("check", None)
        line.pop("personas", None)
    order = ["time", "event"]
    lines = [
        {**{k: line[k] for k in order}, **{k: v for k, v in line.items() if k not in order}} for line in lines
    ]
    (run.path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.path / "manifest.json").unlink()
    assert stats.stats(run.path).rates.height == 4
    assert isinstance(stats.stats(run.path).rates, pl.DataFrame)
