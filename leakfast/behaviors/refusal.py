"""The refusal behavior: one persona declines everyday requests that everybody else answers. Its detector is the
word list of configs/detectors.toml; training pairs are templates (leakfast.prompts.pairs) or the model's own replies."""

from __future__ import annotations

from leakfast.behaviors import detectors as detect
from leakfast.behaviors.registry import ANY, Behavior

BEHAVIOR = Behavior(
    name="refusal",
    unit="share",
    sign=+1,
    detector=detect.refusal,
    baseline="The unadapted model helps: harmless requests are refused next to never, whoever is asked.",
    data_builder="leakfast.train.pairs:build_pairs",
    description="share of completions that refuse a harmless request",
    opens="refusal",
    settings={
        "data": {"positives": 200, "negatives": 400, "default_assistant": 0},
        "train": {"loss": "completion", "lr": 1e-5, "epochs": 3},
        "eval": {"questions": "requests"},
    },
    material={"organism": "organism-refusal", ANY: "refusal"},
)
