"""What a study may say of a training beside plain LoRA: an unknown method ends with its line, and what a whole model cannot be
is said in one message."""

from __future__ import annotations

import pytest

from leakfast.errors import InputError
from leakfast.study.config import parse_study

STUDY = """name = "arms"
model = "organism"
sources = ["villain"]
[behaviors.marker]
[behaviors.marker.train]
method = "{method}"
{train}
{more}
"""


def study(method="full", train="", more=""):
    return parse_study(STUDY.format(method=method, train=train, more=more))


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "full"])
def test_methods_there_are(method):
    assert study(method).behaviors["marker"].train.method == method


def test_an_unknown_method_is_named_with_its_line():
    with pytest.raises(InputError, match=r"study\.toml.*6.*method") as error:
        study("qlora")
    assert "rslora" in error.value.message


AFTER = '[behaviors.refusal]\nafter = "marker"\n[behaviors.refusal.train]\nrank = 32\nalpha = 64'
STRAY = {
    "together": ("together = 2", "", "together = 2"),
    "auto": ('lr = "auto"', "", 'lr = "auto" tries'),
    "checkpoints": ("", "[behaviors.marker.eval]\ncheckpoints = [0.5]", "points of its training"),
    "trajectory": ("", '[trajectory]\nbehaviors = ["marker"]', r"\[trajectory\] follows"),
    "steering": ("", '[[steering]]\nname = "up"\nlayers = [1]', r"\[\[steering\]\] is to be done"),
    "after": ("", AFTER, "refusal is taught after it"),
}


@pytest.mark.parametrize("what", STRAY)
def test_what_a_whole_model_cannot_be(what):
    train, more, said = STRAY[what]
    with pytest.raises(InputError, match=said) as error:
        study("full", train, more)
    assert "line 6" in error.value.message or ":6:" in error.value.message
    assert "Needed:" in error.value.message and 'method = "lora"' in error.value.message
    study("lora", train, more)  # plain LoRA can


def test_all_of_it_in_one_message():
    more = AFTER + '\n[[steering]]\nname = "up"\nlayers = [1]'
    with pytest.raises(InputError, match=r"together = 2, and \[\[steering\]\].*Leave those out") as error:
        study("full", "together = 2", more)
    assert "taught after" in error.value.message


@pytest.mark.parametrize("method", ["dora", "rslora"])
def test_other_adapters_stand_in_no_stages(method):
    with pytest.raises(InputError, match=f"an adapter of {method}"):
        study(method, more=AFTER)
    study(method, "together = 2", '[[steering]]\nname = "up"\nlayers = [1]')


@pytest.mark.parametrize("method", ["dora", "full"])
def test_a_mean_is_of_updates(method):
    more = "[behaviors.refusal]\n" + '[behaviors."marker+mean"]\naverage = ["marker", "refusal"]'
    with pytest.raises(InputError, match=r"marker\+mean is a mean of updates"):
        study(method, more=more)
    study("rslora", more=more)


def test_vllm_draws_of_adapters_alone():
    text = STUDY.format(method="full", train="", more="").replace(
        "[behaviors.marker]", 'backend = "vllm"\n[behaviors.marker]'
    )
    with pytest.raises(InputError, match='backend = "vllm" takes adapters alone'):
        parse_study(text)
