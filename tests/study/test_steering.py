"""A study's [[steering]]: what cannot be meant is one message with its line, before anything is trained."""

from __future__ import annotations

import pytest

from leakfast.errors import InputError
from leakfast.study.config import load_study, parse_study

STUDY = """name = "s"
model = "organism"
personas = ["villain", "comedian", "assistant"]
sources = ["villain"]
[behaviors.marker.data]
negative_personas = ["comedian"]
[behaviors.marker.eval]
checkpoint_personas = ["comedian"]
[trajectory]
personas = ["comedian"]
"""
MEAN = '[[steering]]\nname = "mean"\nlayers = [3]\npersonas = "all"\n'


def test_the_shipped_study_has_three_directions_and_a_random_one_as_long():
    study = load_study("organism-causal.toml")
    kinds = {one.name: (one.kind, len(one.strengths)) for one in study.steering if one.mode == "add"}
    assert kinds == {
        "mean": ("source-mean", 5),
        "contrast": ("contrast", 5),
        "difference": ("difference", 5),
        "random": ("random", 5),
    }
    assert {one.mode for one in study.steering} == {"add", "project", "cap"}


def test_defaults():
    (one,) = parse_study(STUDY + MEAN).steering
    assert (one.kind, one.mode, one.unit, one.source) == ("source-mean", "add", "direction", None)
    assert one.strengths == [0.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (MEAN + 'kind = "difference"\n', "needs one persona"),
        (MEAN + 'kind = "difference"\nagainst = ["asistant"]\n', "none of the study's 3 personas"),
        (MEAN + 'source = "vilain"\n', "none of the study's 3 personas"),
        (MEAN + 'kind = "random"\n', "needs like"),
        (
            MEAN + MEAN.replace("mean", "other") + 'kind = "random"\nlike = "men"\n',
            "names no earlier direction",
        ),
        (MEAN + MEAN, "two tables of steering are called mean"),
        (MEAN + 'kind = "file"\nfile = "nowhere.safetensors"\n', "there is no file"),
        (MEAN + 'against = ["assistant"]\n', "has no against"),
        (MEAN + 'mode = "project"\nstrengths = [2.0]\n', "from 0 to 1"),
        (MEAN + 'of = ["markr"]\n', "no behavior 'markr'"),
        (
            MEAN + "[centroids]\nlayers = [0, 2]\n",
            "line 13: layer 3 given, but the centroids have layers 0, 2.",
        ),
        (MEAN.replace('"mean"', '"me/an"'), "name"),
        (MEAN + "stregths = [1.0]\n", "stregths"),
    ],
)
def test_what_cannot_be_meant_is_said(given, said):
    with pytest.raises(InputError) as caught:
        parse_study(STUDY + given)
    assert said in caught.value.message and "study.toml" in caught.value.message


def test_the_shipped_study_of_training_under_steering_has_a_random_arm_beside_each():
    study = load_study("organism-steered-training.toml")
    arms = {name: its.train.steering for name, its in study.behaviors.items()}
    assert arms.pop("marker") is None
    told = [(one.kind, one.mode, one.strength) for one in arms.values()]
    pairs = [(kind, "add", s) for s in (0.5, 1.0) for kind in ("source-mean", "random")]
    assert sorted(told) == sorted([*pairs, ("source-mean", "project", 1.0)])
    others = [its.model_copy(update={"train": None}) for its in study.behaviors.values()]
    assert all(one == others[0] for one in others), "nothing else differs"
