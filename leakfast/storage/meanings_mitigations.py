"""What the columns of the table `mitigations` mean, a part of `meanings`. Demands nothing."""

from __future__ import annotations

MITIGATIONS: dict[str, str] = {
    "mitigations.behavior": "the behavior whose variants are compared",
    "mitigations.variant": "name of the variant; empty for the plain behavior",
    "mitigations.share": "share of its training (0–1) at which the adapter stands in this row",
    "wanted_rate": "the source's rate at which variants are compared: the lowest final one among them, unless another was asked",
    "matched": "whether the source's rate is within 0.05 of wanted_rate; if not, the row is of the final adapter",
    "match": "matched; else stronger or weaker where all measured points of the source's rate are, passed over where "
    "some are and others not, unknown without any",
    "mitigations.source_rate": "rate under the source's own prompt",
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
