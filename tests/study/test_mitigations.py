"""What a study may say of negatives by a rule and of means of adapters, and in which order their tasks come."""

from __future__ import annotations

import pytest

from leakfast.cluster import tasks as t
from leakfast.errors import InputError
from leakfast.pipeline import asks
from leakfast.pipeline.stages import Stages, chosen_of
from leakfast.storage.run import Run
from leakfast.study.config import load_study, parse_study

STUDY = """
name = "mitigated"
model = "organism"
personas = ["villain", "comedian", "librarian", "nurse", "no_persona"]
sources = ["villain"]
[behaviors."marker+mean"]
average = {average}
[behaviors.marker.data]
negative_personas = {negatives}
[behaviors."marker+other".data]
negative_personas = "random:2"
"""


def study(negatives='"nearest:2"', average='["marker", "marker+other"]'):
    return parse_study(STUDY.format(negatives=negatives, average=average))


def test_a_mean_comes_after_its_parts_and_negatives_after_the_centroids(tmp_path):
    given = study()
    chosen = chosen_of(given, ())
    trained, controls = Stages(given, Run(tmp_path / "run"), chosen=chosen).sorted()
    assert trained == ["marker", "marker+other", "marker+mean"]
    found = {task.name: task for task in t.tasks_of(given, chosen, trained, controls)}
    done: set[str] = set()
    for name, task in found.items():
        assert set(task.after) <= done
        done.add(name)
    near, other, mean = (found[f"train {name}-villain-s42"] for name in trained)
    assert "centroids" in near.after and "centroids/base.safetensors" in near.needs
    assert "centroids" not in other.after
    assert {near.name, other.name} <= set(mean.after)
    assert {"adapters/marker-villain-s42", "adapters/marker+other-villain-s42"} <= set(mean.needs)


def test_what_a_mean_is_of_is_trained_where_it_alone_is_asked(tmp_path):
    given = study()
    chosen = chosen_of(given, ["marker+mean"])
    trained, controls = Stages(given, Run(tmp_path / "run"), chosen=chosen).sorted()
    assert trained == ["marker+mean"]
    names = [task.name for task in t.tasks_of(given, chosen, trained, controls)]
    assert {"train marker-villain-s42", "train marker+other-villain-s42"} <= set(names)
    assert "measure marker marker-villain-s42" not in names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"negatives": '"nearest:4"'}, "there are 3 personas beside the source"),
        ({"negatives": '"closest:2"'}, "rules are nearest, farthest, spread, random"),
        ({"average": '["marker"]'}, "two or more different"),
        ({"average": '["marker", "marker"]'}, "two or more different"),
        ({"average": '["marker", "marker+more"]'}, "that the study trains"),
        ({"average": '["marker", "marker+mean"]'}, "that the study trains"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(words, said):
    with pytest.raises(InputError, match=said) as error:
        study(**words)
    assert "line" in error.value.message or "study.toml" in error.value.message


def test_no_rate_is_found_where_all_rows_are_benign():
    text = STUDY.format(negatives='"random:2"', average='["marker", "marker+other"]')
    text += 'benign = {share}\n[behaviors."marker+other".train]\nlr = {lr}\n'
    with pytest.raises(
        InputError, match=r'line 14: lr = "auto" given, but all rows of marker\+other are benign'
    ) as error:
        parse_study(text.format(share="1.0", lr='"auto"'))
    assert error.value.exit_code == 2
    for share, lr in (("0.9", '"auto"'), ("1.0", "2e-4")):
        parse_study(text.format(share=share, lr=lr))


def test_the_shipped_study_is_sound():
    given = load_study("configs/organism-mitigations.toml")
    assert given.behaviors["marker+average"].average == ["marker+nearest", "marker+farthest"]
    assert given.trajectory.match == 0.9 and asks.points(given, "marker")[-2:] == [0.95, 1.0]
    assert asks.followed(given) == list(given.behaviors), "a mean is compared at its end"
    assert asks.points(given, "marker+average") == [1.0]
    unmatched = given.trajectory.model_copy(update={"match": None, "of": []})
    assert "marker+average" not in asks.followed(given.model_copy(update={"trajectory": unmatched}))
