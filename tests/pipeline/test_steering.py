"""The steering of a study: directions made of the run's centroids and kept there, a random one as long, requests of the right
adapters, personas and behaviors."""

from __future__ import annotations

import numpy as np
import pytest

from leakfast import models
from leakfast.errors import InputError
from leakfast.measure.centroids import compute
from leakfast.pipeline.steering import Steering
from leakfast.prompts.personas import load_personas
from leakfast.steering import directions
from leakfast.storage import layout
from leakfast.storage.run import Run
from leakfast.study.config import parse_study

STUDY = """name = "s"
model = "organism"
dtype = "float32"
personas = ["villain", "comedian", "assistant", "monk"]
sources = ["villain"]
[behaviors.marker.data]
negative_personas = ["comedian"]
[behaviors.marker.eval]
checkpoint_personas = ["comedian"]
[trajectory]
personas = ["comedian"]
[[steering]]
name = "mean"
layers = [3]
personas = ["monk"]
strengths = [0.0, 1.0]
measure = "probability"
[[steering]]
name = "against"
kind = "contrast"
against = ["assistant", "monk"]
layers = [2, 3]
personas = "all"
[[steering]]
name = "random"
kind = "random"
like = "mean"
layers = [3]
personas = "all"
[[steering]]
name = "deep"
layers = [4]
personas = "all"
"""


@pytest.fixture(scope="module")
def steering(tmp_path_factory):
    study = parse_study(STUDY)
    loaded, run = models.load("organism", dtype="float32"), Run(tmp_path_factory.mktemp("steered") / "run")
    run.create(study.raw_text)
    personas = load_personas(study.personas)
    run.add_file(layout.centroids(), compute(loaded, personas, ["Who are you?", "Tea?"], [2, 3]).save)
    return Steering(study, run, loaded, personas)


def test_directions_are_the_differences_of_centroids(steering):
    mean, against, random, deep = steering.study.steering
    c, people = steering.centroids.layer(3).astype(np.float64), steering.centroids.personas
    row = people.index
    made = steering.direction(mean, "villain")
    assert np.allclose(made.vectors[3], c[row("villain")] - c.mean(0), atol=1e-5)
    assert made.residual_norms[3] == pytest.approx(np.linalg.norm(c, axis=1).mean())
    other = steering.direction(against, "villain")
    expected = c[row("villain")] - (c[row("assistant")] + c[row("monk")]) / 2
    assert np.allclose(other.vectors[3], expected, atol=1e-5) and other.layers == [2, 3]
    chance = steering.direction(random, "villain")
    assert chance.norms[3] == pytest.approx(made.norms[3], rel=1e-6)
    kept = directions.load(steering.run.path / layout.direction("mean", "villain"))
    assert kept.digest == made.digest
    with pytest.raises(InputError, match="layer 4, but the centroids"):
        steering.direction(deep, "villain")


def test_a_contrast_with_all_others_is_the_source_mean_a_little_longer(steering):
    """As its docstring says: n / (n − 1) times."""
    mean = directions.of_centroids(steering.centroids, "source-mean", "villain")
    contrast = directions.of_centroids(steering.centroids, "contrast", "villain")
    for layer in mean.layers:
        assert np.allclose(contrast.vectors[layer], 4 / 3 * mean.vectors[layer], atol=1e-5)


def test_requests(steering):
    request = steering.request(steering.study.steering[0], None, ["marker"])
    assert [p.name for p in request.personas] == ["monk", "villain"]
    assert [(t.name, t.source) for t in request.targets] == [
        ("base+steer-mean-add-0", "villain"),
        ("base+steer-mean-add-1", "villain"),
    ]
    assert [one.config.measure for one in request.asked] == ["probability"]
