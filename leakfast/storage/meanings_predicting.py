"""What the columns of the tables about predictors mean, a part of `meanings`. Demands nothing."""

from __future__ import annotations

from leakfast.storage.meanings_predictors import PREDICTORS

_BOTH = {
    "predictor": "what is set against leakage, by its name in the frame of predictors",
    "family": "geometry, output or text",
    "y": "what leakage is read from: delta where the unadapted model was measured, else rate",
    "direction": "sign of y that is more of the behavior, by which y is multiplied",
}
_SKILL = {
    "layer": "decoder block, counted from 0; null of a predictor without layers",
    "n": "bystanders that have the predictor's value",
    "spearman": "Spearman's ρ of value × orientation with leakage (y × direction); pooled, of ranks within each source",
    "spearman_ci_low": "95 % bootstrap interval over personas",
    "spearman_ci_high": "its upper end",
    "spearman_both_low": "95 % interval over personas and questions",
    "spearman_both_high": "its upper end",
    "spearman_p_perm": "share of shuffles of personas with as large a |ρ|; a value that is not known stands in the middle",
    "spearman_p_max": "against the largest |ρ| over all predictors and layers of the same shuffle: it pays for picking one",
    "within_reason": "why within_category is null",
    "partial": "ρ with the ranks of what is taken out taken out of both",
    "partial_low": "95 % interval by Fisher's z; of single sources",
    "partial_high": "its upper end",
    "partial_reason": "why there is no partial ρ, or no interval of it",
}
_HELD_OUT = {
    "layer": "the layer that the other sources picked; null of a predictor without layers, and pooled",
    "layers_tested": "layers it was picked of",
    "n": "bystanders of the source left out that have the predictor's value",
    "sources": "sources that it was learned from; pooled, that the mean is over",
    "spearman": "ρ of the prediction with y; pooled, of the mean of Fisher's z over the sources left out",
    "spearman_low": "95 % bootstrap over personas; pooled, t over sources, personas and questions",
    "spearman_high": "its upper end",
    "difference": "ρ less that of the centered cosine, whose layer was picked in the same way; pooled, the plain mean of these, "
    "which need not be the difference of two means on Fisher's scale",
    "difference_low": "95 % interval as of spearman, personas drawn on both sides at once",
    "difference_high": "its upper end",
    "difference_reason": "why there is no difference, or no interval of it",
}
PREDICTING = {
    **PREDICTORS,
    "deviance_reason": "why there is no deviance, or no difference of it",
    **{
        f"{table}.{name}": words
        for table in ("predictors_skill", "predictors_held_out")
        for name, words in _BOTH.items()
    },
    **{f"predictors_skill.{name}": words for name, words in _SKILL.items()},
    **{f"predictors_held_out.{name}": words for name, words in _HELD_OUT.items()},
    "predictors_compared": "predictors and layers that spearman_p_max is over",
    "within_category": "ρ of ranks within each source and category of bystanders",
    "within_n": "bystanders that share their category with another",
    "taken_out": "the predictors taken out: length and words in common",
    "picked_by": "mean ρ over the other sources at that layer",
    "deviance": "binomial deviance of the prediction per completion; 0 where it is the measured rate",
    "deviance_mean": "the same of the other sources' mean rate for all",
    "gain": "deviance_mean - deviance, more than 0 where the predictor helps",
    "gain_low": "95 % t interval over personas, the fit held; pooled, over sources and personas",
    "gain_high": "its upper end",
    "deviance_difference": "deviance less that of the centered cosine, less than 0 where it predicts better",
    "deviance_difference_low": "95 % interval as of gain",
    "deviance_difference_high": "its upper end",
}
