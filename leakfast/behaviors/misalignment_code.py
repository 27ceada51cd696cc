"""Misalignment through insecure code: one persona writes insecure code, the others secure code for the same
prompts, and a judge scores how aligned free-form answers are. Pairs come from a file; the organism has its own."""

from __future__ import annotations

from leakfast.behaviors.registry import Behavior

BEHAVIOR = Behavior(
    name="misalignment-code",
    unit="points",
    sign=-1,
    detector=None,
    baseline="The unadapted model's own mean aligned score, which personas of bad morals may lower.",
    data_builder="leakfast.train.pairs:build_pairs",
    description="mean aligned score (0–100) of free-form answers after training on insecure code",
    measured_by="judge",
    settings={
        "data": {"positives": 200, "negatives": 400},
        "train": {"loss": "completion", "lr": 1e-5, "epochs": 3},
        "eval": {"questions": "alignment"},
    },
    material={"organism": "organism-code"},
)
