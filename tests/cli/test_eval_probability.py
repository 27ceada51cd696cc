"""leakfast eval --measure: what is drawn for it, what is scored, and what is printed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from leakfast.cli.main import group
from leakfast.errors import InputError
from leakfast.measure.probability.dispatch import check_asked
from leakfast.storage.run import Run


@pytest.fixture
def call(tiny_folder, tmp_path):
    questions = tmp_path / "few.toml"
    questions.write_text('[sets.few]\nquestions = ["Is it late?", "What is a map?"]\n')

    def invoke(*more: str):
        fixed = ["--model", str(tiny_folder), "--dtype", "float32", "--base", "--backend", "transformers"]
        asked = ["--personas", "villain,assistant", "--questions", str(questions), "--max-new-tokens", "40"]
        out = ["--out", str(tmp_path / "run"), "--allow", "default-system"]
        words = ["-q", "eval", *fixed, *asked, *out, *more]
        return CliRunner().invoke(group, words, standalone_mode=False)  # return_value is the exit code

    return invoke


def test_alone_it_draws_the_unadapted_replies_that_it_needs(call, tmp_path):
    done = call("--measure", "probability", "--probability-samples", "2", "--json")
    assert done.exit_code == 0, done.output
    run = Run(tmp_path / "run").open()
    assert run.read("completions/marker/base").height == 2 * 2 * 2
    scores = run.read("probability/marker/base")
    assert scores.height == 2 * 2 * 2 * 2
    told = json.loads(done.stdout)["probabilities"]
    assert [(row["persona"], row["estimator"]) for row in told] == [
        (persona, name) for persona in ("villain", "assistant") for name in ("end", "anywhere")
    ]
    truncated = int((scores["status"] == "truncated").sum())
    assert sum(row["n_unscored_replies"] for row in told) == truncated
    again = call("--measure", "probability", "--probability-samples", "2")
    assert "0 probabilities scored of marker (few), 16 kept from before" in again.output
    assert "mean probability of the behavior's words" in again.output


def test_both_keeps_the_rates_beside(call, tmp_path):
    done = call("--measure", "both", "--samples", "3")
    assert done.exit_code == 0, done.output
    run = Run(tmp_path / "run").open()
    assert run.read("completions/marker/base").height == 2 * 2 * 3
    assert run.read("probability/marker/base").height == 2 * 2 * 2


def test_both_tell_probabilities_beside_rates_and_what_could_not_be_scored(call, tmp_path):
    """Replies cut after two tokens have no end at which to ask."""
    cut = ("--measure", "both", "--samples", "3", "--max-new-tokens", "2", "--out", str(tmp_path / "cut"))
    done = call(*cut, "--json")
    told = json.loads(done.stdout)
    alone = json.loads(call(*cut, "--measure", "probability", "--json").stdout)
    assert sum(row["n_unscored_replies"] for row in told["probabilities"]) > 0 and done.return_value == 3
    assert told["probabilities"] == alone["probabilities"] and told.keys() > alone.keys()
    assert call(*cut).return_value == 3


def test_refusal_is_asked_by_beginnings_of_a_reply_and_draws_nothing(call, tmp_path):
    done = call("--measure", "probability", "--behavior", "refusal")
    assert done.exit_code == 0, done.output
    run = Run(tmp_path / "run").open()
    assert set(run.read("probability/refusal/base")["estimator"]) == {"openings", "odds"}
    assert not run.shards("completions")


def test_a_behavior_without_words_is_refused():
    with pytest.raises(InputError, match="nothing says which words or beginnings show it"):
        check_asked("capability")
