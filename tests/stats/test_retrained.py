"""Numbers under an adapter's name are of one adapter: what was measured before it was trained again is set beside nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from measuring import evaluate, evaluate_all, evaluate_items
from safetensors.torch import load_file, save_file
from test_completions import train_tiny

from leakfast import stats
from leakfast.errors import InputError
from leakfast.measure.request import Asked
from leakfast.models.adapters import adapter_hash, read_card, write_card
from leakfast.prompts.items import load_items
from leakfast.prompts.personas import load_personas
from leakfast.prompts.questions import QuestionSet
from leakfast.stats import retrained
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import EvalConfig

NAME = "marker-villain-s1"
CFG = EvalConfig(samples=1, max_new_tokens=2, batch_completions=8)
FAST = {"permutations": 9, "bootstraps": 0, "workers": 1}


def ask(loaded, run, adapter, behavior="marker", **more):
    people = load_personas(["villain", "comedian", "assistant"])
    evaluate(loaded, run, [adapter], people, ["Tea?", "Rain?"], behavior, CFG, 3, **more)


def train_again(folder, card=True):
    """Other weights in the same folder, and a card that says so."""
    path = folder / "adapter_model.safetensors"
    save_file({k: 1.5 * v if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    if card:
        write_card(folder, replace(read_card(folder), adapter_hash=adapter_hash(folder)))


@pytest.fixture
def adapter(tiny_qwen2, tmp_path):
    return train_tiny(tiny_qwen2, tmp_path / NAME)


@pytest.fixture
def run(tiny_qwen2, adapter, tmp_path):
    found = Run(tmp_path / "run")
    for behavior in ("marker", "refusal"):
        ask(tiny_qwen2, found, adapter, behavior)
    return found


def test_a_behavior_that_was_measured_before_the_adapter_was_trained_again_is_refused(
    tiny_qwen2, adapter, run
):
    assert stats.stats(run.path, **FAST).rates.height == 6
    train_again(adapter)
    ask(tiny_qwen2, run, adapter)
    with pytest.raises(
        InputError, match=rf"completions/refusal/{NAME} was measured of another adapter than adapters/{NAME}"
    ):
        stats.stats(run.path, **FAST)
    ask(tiny_qwen2, run, adapter, "refusal")
    assert stats.stats(run.path, **FAST).rates.height == 6


def test_further_sets_and_choices_are_looked_at_too(tiny_qwen2, adapter, run):
    people = load_personas(["villain", "comedian"])
    beside = Asked("marker", QuestionSet("code", ("Loop?",)), CFG, beside=True)
    evaluate_all(tiny_qwen2, run, [adapter], people, [beside], 3)
    evaluate_items(tiny_qwen2, run, [adapter], people, load_items("organism").sample(2))
    train_again(adapter)
    for behavior in ("marker", "refusal"):
        ask(tiny_qwen2, run, adapter, behavior)
    with pytest.raises(
        InputError, match=rf"choices/{NAME}/organism.n2-letters, sets/marker/code/{NAME} were"
    ):
        retrained.check(run)
    retrained.set_aside(run)
    retrained.check(run)
    assert not run.shards("sets") and not run.shards("choices") and len(run.shards("completions")) == 2
    assert len(list((run.path / layout.QUARANTINE).rglob("*.parquet"))) == 2 + 2, "two were drawn anew"


def test_without_a_card_two_adapters_of_one_name_are_refused_and_left(tiny_qwen2, adapter, tmp_path):
    (adapter / layout.CARD).unlink()
    run = Run(tmp_path / "run")
    ask(tiny_qwen2, run, adapter, source="villain")
    retrained.check(run)
    train_again(adapter, card=False)
    ask(tiny_qwen2, run, adapter, "refusal", source="villain")
    with pytest.raises(InputError, match="were measured of several adapters of one name"):
        retrained.check(run)
    retrained.set_aside(run)
    assert len(run.shards("completions")) == 2, "nobody can tell which one is meant"
