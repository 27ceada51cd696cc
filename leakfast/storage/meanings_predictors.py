"""What the columns of the frame of predictors mean, a part of `meanings`. Demands nothing."""

from __future__ import annotations

PREDICTORS: dict[str, str] = {
    "predictors.source": "the persona that a behavior would be trained into",
    "predictors.persona": "the bystander",
    "predictor": "what is known of the two before training: docs/predictors.md names them all",
    "predictors.family": "geometry (states), output (next-token distributions) or text (system prompts)",
    "predictors.layer": "decoder block, counted from 0; null where a predictor has none",
    "predictors.value": "its value, in `unit`; null where there is none",
    "orientation": "1 where a larger value means closer to the source, -1 where a smaller one does",
    "predictors.unit": "of the value, in words",
    "predictors.questions": "how many questions it rests on; null of texts",
    "predictors.reason": "why there is no value",
}
