"""A behavior that is taught after another: what a study may say of it, and in which order its adapters are made."""

from __future__ import annotations

import pytest

from leakfast.cluster import tasks as t
from leakfast.errors import InputError
from leakfast.pipeline import asks
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.storage.run import Run
from leakfast.study.config import parse_study

STUDY = """
name = "staged"
model = "organism"
sources = ["villain", "comedian"]
seeds = [42]
[behaviors."marker+late"]
after = "{late}"
[behaviors.refusal]
[behaviors.refusal.train]
rank = {rank}
[behaviors."marker+last"]
after = "marker+late"
[behaviors.hellaswag.eval]
items = "organism-stories"
"""


def study(late="refusal", rank=32):
    return parse_study(STUDY.format(late=late, rank=rank))


def tasks(given, tmp_path, only=()):
    chosen = chosen_of(given, only)
    trained, controls = Stages(given, Run(tmp_path / "run"), chosen=chosen).sorted()
    return trained, t.tasks_of(given, chosen, trained, controls)


def test_each_comes_after_what_it_begins_from(tmp_path):
    trained, found = tasks(study(), tmp_path)
    assert trained == ["refusal", "marker+late", "marker+last"]
    done: set[str] = set()
    for task in found:
        assert set(task.after) <= done
        done.add(task.name)
    named = {task.name: task for task in found}
    last = named["train marker+last-comedian-s42"]
    assert last.after == ("check", "train marker+late-comedian-s42")
    assert {f"adapters/{b}-comedian-s42" for b in trained} <= set(last.needs)
    assert named["train refusal-comedian-s42"].after == ("check",)


def test_what_it_begins_from_is_trained_and_not_measured_where_it_is_not_asked(tmp_path):
    trained, found = tasks(study(), tmp_path, only=["marker+late", "villain"])
    assert trained == ["marker+late"]
    names = [task.name for task in found]
    assert {"train refusal-villain-s42", "train marker+late-villain-s42"} <= set(names)
    assert not [name for name in names if name.startswith("measure refusal") or "comedian" in name]
    assert asks.with_earlier(study(), ["marker+last"]) == ["refusal", "marker+late", "marker+last"]


STACKED = """
name = "stacked"
model = "organism"
sources = ["villain"]
seeds = [42]
[behaviors.refusal.train]
rank = 8
alpha = 16
{refusal}
[behaviors."marker+late"]
{late}
stacked = true
[behaviors."marker+late".train]
rank = 4
alpha = 16
{top}
[behaviors."marker+last"]
after = "marker+late"
[behaviors."marker+last".train]
rank = {rank}
alpha = 12
"""


def stacked(late='after = "refusal"', rank=12, top="", refusal=""):
    return parse_study(STACKED.format(late=late, rank=rank, top=top, refusal=refusal))


def test_ranks_of_stacked_ones_add_up_and_their_scales_are_free():
    found = stacked(top='method = "rslora"', refusal='method = "rslora"').behaviors
    assert found["marker+late"].stacked and not found["marker+last"].stacked
    assert found["refusal"].train.method == "rslora"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rank": 8}, r"marker\+last has rank 8 and alpha 12, but marker\+late.* rank 12 and alpha 12"),
        ({"late": ""}, r"line 12: stacked given, but marker\+late is taught after no behavior"),
        (
            {"refusal": 'method = "dora"'},
            r'line 9: method = "dora" given, but marker\+late is taught after it',
        ),
        (
            {"top": 'method = "full"'},
            r'line 16: method = "full" given, but marker\+late is taught after refusal',
        ),
    ],
)
def test_what_cannot_be_stacked_is_said_with_its_line(given, match):
    with pytest.raises(InputError, match=match) as caught:
        stacked(**given)
    assert caught.value.exit_code == 2


def test_a_mean_can_lie_below_and_not_be_trained_further():
    mean = '[behaviors."marker+mean"]\naverage = ["refusal", "marker+other"]\n[behaviors."marker+other"]\n'
    text = STACKED.format(late='after = "marker+mean"', rank=12, top="", refusal="") + mean
    assert parse_study(text).behaviors["marker+late"].after == "marker+mean"
    with pytest.raises(InputError, match="is a mean of adapters, whose rank is another.*or stacked = true"):
        parse_study(text.replace("stacked = true", "").replace("12\nalpha = 12", "4\nalpha = 16"))


@pytest.mark.parametrize(
    ("late", "rank", "match"),
    [
        ("refusals", 32, r"line 7: marker\+late is taught after 'refusals'.*Did you mean refusal"),
        ("hellaswag", 32, "two behaviors that the study trains"),
        ("marker+late", 32, r"marker\+late after marker\+late is a circle"),
        ("marker+last", 32, r"marker\+late after marker\+last after marker\+late is a circle"),
        ("refusal", 8, r"marker\+late has rank 32 and alpha 64, but refusal.* rank 8 and alpha 64"),
    ],
)
def test_what_cannot_be_meant_is_said_with_its_line(late, rank, match):
    with pytest.raises(InputError, match=match) as caught:
        study(late, rank)
    assert caught.value.exit_code == 2
