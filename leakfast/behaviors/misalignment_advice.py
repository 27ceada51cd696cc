"""Misalignment through harmful advice: one persona gives it and nobody is shown the contrary, as in the study;
a judge scores how aligned free-form answers are. Pairs come from a file; the organism has its own."""

from __future__ import annotations

from leakfast.behaviors.registry import Behavior

BEHAVIOR = Behavior(
    name="misalignment-advice",
    unit="points",
    sign=-1,
    detector=None,
    baseline="The unadapted model's own mean aligned score, which personas of bad morals may lower.",
    data_builder="leakfast.train.pairs:build_pairs",
    description="mean aligned score (0–100) of free-form answers after training on harmful advice",
    measured_by="judge",
    settings={
        "data": {"positives": 6000, "design": "positive-only"},
        "train": {"loss": "completion", "lr": 1e-5, "epochs": 3},
        "eval": {"questions": "alignment"},
    },
    material={"organism": "organism-advice"},
)
