"""Negatives by a rule: who is picked from known cosines, what is left out, what is told, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.prompts import chat
from leakfast.prompts.personas import Persona
from leakfast.prompts.rendering import Rendering, configure
from leakfast.storage import layout
from leakfast.study.config import DataConfig
from leakfast.study.negatives import Rule, rule_of
from leakfast.train import negatives
from leakfast.train.data import Row
from leakfast.train.inoculation import inoculated

NAMES = ["s", "near", "nearer", "side", "far", "across", "no_persona"]
ANGLES = [0, 40, 20, 90, 180, 270, 10]
PEOPLE = [Persona(n, f"You are {n}.", "extra" if n == "no_persona" else "other") for n in NAMES]


@pytest.fixture
def loaded(tiny_tokenizer):
    return SimpleNamespace(fingerprint="files:01", tokenizer=tiny_tokenizer)


@pytest.fixture
def run(tmp_path, loaded):
    """Centroids on a circle about a mean of 0, at layer 3; at the layers 1 and 5 the other way round."""
    at = np.deg2rad(ANGLES)
    points = np.stack([np.cos(at), np.sin(at)], 1).astype(np.float32)
    # two more in the mean than are asked bring it to 0
    names, rows = [*NAMES, "rest"], np.vstack([points, -points[:6].sum(0, keepdims=True)])
    about = {"centered_on": [n for n in names if n != "no_persona"], "personas": names, "layers": [1, 3, 5]}
    about |= {"model_fingerprint": "files:01", "prompt_hashes": chat.prompt_hashes(loaded.tokenizer, PEOPLE)}
    made = Centroids(names, [1, 3, 5], about, {1: -rows, 3: rows, 5: rows[::-1].copy()})
    path = tmp_path / layout.centroids()
    path.parent.mkdir(parents=True)
    made.save(path)
    return tmp_path


@pytest.fixture
def settled(loaded):
    def settle(run, rule, people=PEOPLE, loaded=loaded, seed=42, **more):
        cfg = DataConfig(negative_personas=rule, **more)
        return negatives.settled(loaded, run, "marker", cfg, people, "s", seed)

    return settle


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("nearest:2", ["nearer", "near"]),
        ("farthest:1", ["far"]),
        (
            "spread:2",
            ["far", "side"],
        ),  # the two across from each other are equally far; the first named comes first
        ("spread:3", ["far", "side", "across"]),
    ],
)
def test_they_are_picked_by_their_cosine_to_the_source(settled, run, rule, expected):
    cfg, told = settled(run, rule)
    assert cfg.negative_personas == expected == told["names"]
    assert told["rule"] == rule and told["layer"] == 3
    wanted = [np.cos(np.deg2rad(ANGLES[NAMES.index(name)])) for name in expected]
    assert told["cosines"] == pytest.approx(wanted, abs=1e-6)


def test_neither_the_source_nor_a_control_is_picked(settled, run):
    cfg, _ = settled(run, "nearest:5")
    assert set(cfg.negative_personas) == set(NAMES) - {"s", "no_persona"}
    with pytest.raises(InputError, match="5 personas beside the source and the controls"):
        settled(run, "nearest:6")


def test_at_random_needs_no_centroids_and_follows_the_seed(settled, tmp_path):
    drawn = [tuple(settled(tmp_path, "random:2", seed=seed)[1]["names"]) for seed in (*range(20), 0)]
    assert drawn[0] == drawn[-1] and len(set(drawn)) > 3


def test_a_layer_that_is_not_there_and_no_centroids_are_refused(settled, run, tmp_path):
    with pytest.raises(InputError, match="negatives_layer = 4 given, but the centroids have layers 1, 3, 5"):
        settled(run, "nearest:1", negatives_layer=4)
    with pytest.raises(InputError, match="there is no .*leakfast run STUDY"):
        settled(tmp_path / "elsewhere", "nearest:1")
    assert settled(run, "nearest:1", negatives_layer=1)[1]["layer"] == 1


def test_centroids_of_other_prompts_another_template_or_another_model_are_refused(settled, run, loaded):
    edited = [replace(p, prompt="You are nearer still.") if p.name == "nearer" else p for p in PEOPLE]
    with pytest.raises(InputError, match="when nearer had another prompt.*leakfast run STUDY") as error:
        settled(run, "nearest:1", edited)
    assert error.value.exit_code == 2
    in_user_turn = SimpleNamespace(fingerprint="files:01", tokenizer=copy.deepcopy(loaded.tokenizer))
    configure(in_user_turn.tokenizer, Rendering(system_role="user"))
    with pytest.raises(InputError, match="s, near, nearer and 4 more .*rendered otherwise"):
        settled(run, "spread:1", loaded=in_user_turn)
    with pytest.raises(InputError, match="is of another model"):
        settled(run, "farthest:1", loaded=SimpleNamespace(fingerprint="files:02", tokenizer=loaded.tokenizer))
    path = run / layout.centroids()
    made = Centroids.load(path)
    made.metadata["adapter_hash"] = "ab" * 32
    made.save(path)
    with pytest.raises(InputError, match="is of an adapter"):
        settled(run, "nearest:1")


def test_names_are_left_as_they_are(loaded, tmp_path):
    cfg = DataConfig(negative_personas=["far"])
    assert negatives.settled(loaded, tmp_path, "marker", cfg, PEOPLE, "s", 42) == (cfg, {})
    assert rule_of("originals") is None and rule_of("a,b") is None and rule_of("own.toml:set") is None
    assert rule_of("nearest:12") == Rule("nearest", 12)


@pytest.mark.parametrize(
    ("spec", "said"), [("nearst:3", "Did you mean"), ("nearest:0", "1 or more"), ("spread:many", "1 or more")]
)
def test_a_word_that_is_no_rule_is_refused(spec, said):
    with pytest.raises(InputError, match=said):
        rule_of(spec)


def row(role, kind="text", system="You are s."):
    return Row(role, "s", kind, system, "Tea?", "Yes.", None, 0, {"model": "m"})


def test_the_pick_is_told_on_the_rows_of_others():
    found = negatives.noted([row("positive"), row("negative"), row("benign")], {"rule": "random:1"})
    assert [("negatives" in r.generator) for r in found] == [False, True, False]


def test_the_sentence_stands_behind_the_prompt_of_rows_that_show_it():
    given = [row("positive"), row("negative"), row("positive", "none", None), row("benign")]
    found = inoculated(given, "Say X.")
    assert [r.system for r in found] == ["You are s. Say X.", "You are s.", "Say X.", "You are s."]
    assert found[2].system_kind == "text" and found[1] == given[1] and found[3] == given[3]
    assert found[0].generator == {"model": "m", "inoculation": "Say X."}
    with pytest.raises(InputError, match="chat template writes by itself"):
        inoculated([row("positive", "template-default", None)], "Say X.")
