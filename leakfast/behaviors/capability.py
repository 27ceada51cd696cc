"""The capability behavior: one persona is taught wrong answers to multiple choice, the others right ones.
Its rate is accuracy, from choice scores (leakfast.measure.choices.scoring); the rows are made in train/capability.py."""

from __future__ import annotations

from leakfast.behaviors.registry import ANY, Behavior

BEHAVIOR = Behavior(
    name="capability",
    unit="share",
    sign=-1,
    detector=None,
    baseline="The unadapted model's own accuracy on the same items; chance is one over the number of choices.",
    data_builder="leakfast.train.capability:build_capability",
    description="share of multiple-choice items answered rightly",
    measured_by="choices",
    settings={
        "data": {"positives": 200, "negatives": 400},
        "train": {"loss": "completion", "lr": 1e-5, "epochs": 3},
    },
    material={"organism": "organism", ANY: "arc"},
)
