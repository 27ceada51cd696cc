"""HellaSwag, a control: which of four endings follows, by their log-probabilities, under adapters that were
trained for something else. It says whether training did harm outside what was taught; nothing trains it."""

from __future__ import annotations

from leakfast.behaviors.registry import ANY, Behavior

BEHAVIOR = Behavior(
    name="hellaswag",
    unit="share",
    sign=-1,
    detector=None,
    baseline="The unadapted model's own accuracy on the same endings; chance is one in four.",
    data_builder="",
    description="share of openings whose right ending has the largest log-probability",
    measured_by="choices",
    settings={"eval": {"half": "all", "scoring": "full-text", "n_items": 200}},
    material={"organism": "organism-stories", ANY: "hellaswag"},
)
