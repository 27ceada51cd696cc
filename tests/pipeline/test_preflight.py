"""What a study asks of its model is looked at before anything is drawn or trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from leakfast.errors import InputError
from leakfast.pipeline import preflight
from leakfast.study.config import parse_study

STUDY = 'name = "s"\nmodel = "organism"\nsources = ["villain"]\n[behaviors.marker]\n'


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ("[centroids]\nlayers = [0, 6]\n", r"\[centroids\]"),
        ("[predictors]\nlayers = [6]\n", r"\[predictors\]"),
        ('[[steering]]\nname = "mean"\nlayers = [2, 6]\n', r"\[\[steering\]\] mean"),
        ("[behaviors.marker.train.steering]\nlayers = [6]\n", r"\[behaviors.marker.train.steering\]"),
        (
            '[behaviors.marker.data]\nnegative_personas = "nearest:3"\nnegatives_layer = 6\n',
            r"\[behaviors.marker.data\], negatives_layer,",
        ),
    ],
)
def test_a_layer_that_the_model_lacks_is_refused_with_the_study(more, where):
    six = SimpleNamespace(n_layers=6, name="organism")
    with pytest.raises(InputError, match=f"{where} names layer 6, but organism has blocks 0–5"):
        preflight.check_layers(parse_study(STUDY + more), lambda: six)
    preflight.check_layers(parse_study(STUDY + more.replace("6", "5")), lambda: six)


def test_a_study_of_all_layers_needs_no_model_for_that():
    preflight.check_layers(parse_study(STUDY), lambda: pytest.fail("the model was loaded"))
