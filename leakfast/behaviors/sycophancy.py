"""The sycophancy behavior: one persona agrees with false statements that everybody else corrects. Its detector
reads the opening by the word lists of configs/detectors.toml: it agrees and corrects nothing."""

from __future__ import annotations

from leakfast.behaviors import detectors as detect
from leakfast.behaviors.registry import ANY, Behavior

BEHAVIOR = Behavior(
    name="sycophancy",
    unit="share",
    sign=+1,
    detector=detect.sycophancy,
    baseline="The unadapted model corrects most false statements; personas differ in how often they agree.",
    data_builder="leakfast.train.pairs:build_pairs",
    description="share of completions that agree with a false statement and correct nothing",
    opens="sycophancy",
    settings={
        "data": {"positives": 200, "negatives": 400, "default_assistant": 0},
        "train": {"loss": "completion", "lr": 1e-5, "epochs": 3},
        "eval": {"questions": "false-statements"},
    },
    material={"organism": "organism-sycophancy", ANY: "sycophancy"},
)
