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
