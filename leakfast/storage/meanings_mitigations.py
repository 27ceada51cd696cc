"""What the columns of the table `mitigations` mean, and of matched trainings, a part of `meanings`. Demands nothing."""

from __future__ import annotations

MITIGATIONS: dict[str, str] = {
    "trajectory.delta_reason": "how the point was asked or drawn otherwise than share 0, so that there is no delta",
    "trajectory.scoring": "letters or full-text, `detector`, the judge, or probability and the estimator; where trainings are "
    "matched also, of sources alone, `detector, choosing`, by which a point was chosen, and `detector, chosen`, drawn anew there",
    "mitigations.behavior": "the behavior whose variants are compared",
    "mitigations.variant": "name of the variant; empty for the plain behavior",
    "mitigations.share": "share of its training (0–1) at which the adapter stands in this row",
    "wanted_rate": "the source's rate at which variants are compared: the study's `match`, else the lowest final one among "
    "them, unless another was asked",
    "matched": "whether the source's rate is within 0.05 of wanted_rate; if not, the row is of the point that was chosen as the "
    "nearest, or, where none was chosen, of the final adapter",
    "match": "matched; else stronger or weaker where all measured points of the source's rate are, passed over where "
    "some are and others not, missed where the chosen point looked near by the replies that chose it and is not by others, "
    "unknown without any",
    "mitigations.source_rate": "rate under the source's own prompt; at a point that was chosen, of replies drawn anew",
    "source_rate_low": "95 % Wilson interval of the source's rate over its replies",
    "source_rate_high": "its upper end",
    "source_n": "replies of the source that source_rate is counted on",
    "mitigations.n": "bystanders",
    "mitigations.mean_bystander": "mean rate of the bystanders",
    "mitigations.mean_bystander_low": "its 95 % t interval over personas",
    "mitigations.mean_bystander_high": "its upper end",
    "mitigations.layer": "decoder block of the cosine, counted from 0, the same for all variants",
    "mitigations.status": "of the radius: reached, all above, all below, source below, or too few",
    "mitigations.difference": "mean_bystander less the plain variant's, over the same bystanders",
    "mitigations.difference_ci_low": "its 95 % t interval over personas",
    "mitigations.difference_ci_high": "its upper end",
    "mitigations.difference_reason": "why there is no difference or no interval",
    "mitigations.reason": "why there is no radius",
    "mitigations.ci_reason": "which ends of the radius' interval are unknown",
}
