"""What every column of every table means, in words, and the dtypes of the tables that `schema` does not declare. Demands
nothing; docs/tables.md is made of it. A table may have the columns of `SOMETIMES` besides."""

from __future__ import annotations

from typing import NamedTuple

from leakfast.storage import schema


class Column(NamedTuple):
    """dtype: the polars dtype's name."""

    name: str
    dtype: str
    meaning: str


# table → (what one row is, its columns in order); the columns of a table that `schema` declares stand there
MEASUREMENTS = {
    "completions": ("a completion: one reply of one model to one prompt", ""),
    "choice_scores": (
        "a label of an item; an item is right where a row is both chosen and correct",
        "behavior source items n_tokens logprob_per_char_nats chosen_per_char answer_mass",
    ),
    "predictors": ("an ordered pair of two personas, a predictor and a layer", ""),
    "probability": ("an estimator of a behavior's words, beginnings or replies, on what is asked", ""),
    "judgements": ("a judged completion, whether it got scores or not", ""),
    "steered_text": (
        "a reply of the unadapted model that a steered model reads",
        "adapter persona question sample n_tokens logprob_nats",
    ),
}
_HEAD = "behavior seed source adapter"
_CELL = f"{_HEAD} layer cosine y"
_DRAWN = "permutations permutation_seed bootstraps bootstrap_seed"
_CORRELATION = (
    "adapter seed reason kendall spearman_ci_low spearman_ci_high spearman_se_z ci_reason spearman_p_max layers_tested "
    f"spearman_p_bh family family_size detectable personas {_DRAWN} spearman_plain spearman_plain_p_t "
    "pearson_plain pearson_plain_p resampling_unit method"
)
_LEFT_OUT = f"{_CELL} left_out n spearman spearman_all change reason method"
_CURVE = "far far_low far_high near near_low near_high midpoint midpoint_low midpoint_high width width_low width_high"
RESULTS = {
    "rates": (
        "a persona under an adapter, or under the unadapted model",
        "role taught questions icc effective_total bb_low bb_high bb_reason delta_low delta_high delta_reason "
        "delta_method method",
    ),
    "pairs": ("a source with a bystander at a layer", "adapter related"),
    "correlations": (
        "a source (or `pooled`), category (or all), layer, cosine and y",
        f"{_CORRELATION} questions spearman_question_se_z spearman_cell_se_z spearman_both_low spearman_both_high both_reason",
    ),
}
FURTHER = {
    "health": ("an adapter (persona null), or a persona under it", ""),
    "question_counts": ("a question (or item) of a persona under an adapter", ""),
    "chosen_labels": (
        "a label, under an adapter and a persona (null: all personas)",
        "behavior adapter persona label n n_right total share ci_low ci_high share_right mostly",
    ),
    "judged": (
        "a question of a persona; with a null persona, of all bystanders",
        "behavior adapter source seed role persona question mean_aligned ci_low ci_high n_judged n_incoherent n_unscored "
        "mean_coherent coverage judge method",
    ),
    "shifts": ("a persona under an adapter, at a layer", ""),
    "shift_correlations": ("as in `correlations`, for each geometry", f"geometry {_CORRELATION}"),
    "question_sets": (
        "a source (or `pooled`), question set, layer, cosine and y",
        "spearman_p_perm spearman_p_max reason difference_reason bootstraps method",
    ),
    "set_rates": ("as in `rates`, on each question set", "role questions main"),
    "layers": (
        "a layer of a source (or `pooled`)",
        f"{_HEAD} cosine y layer n spearman spearman_ci_low spearman_ci_high spearman_p_perm spearman_p_max layers_tested "
        f"best reason ci_reason resampling_unit {_DRAWN} method",
    ),
    "means": (
        "a mean of ρ over sources (source null), or over training seeds (seed null)",
        "behavior layer cosine y seed source over k mean low high tau2 i2 q q_p predict_low predict_high predict_new_low "
        "predict_new_high own_se_z shared_se_z personas questions resampling_unit reason method",
    ),
    "picked": (
        "a source (or `pooled`), cosine and y, where there are several layers",
        f"{_HEAD} cosine y layer layers_tested n spearman optimism picked_low picked_high cross_fitted cross_fitted_layer "
        "cross_fitted_share questions reason cross_fitted_reason bootstraps bootstrap_seed resampling_unit method",
    ),
    "growth": (
        "a layer (null: the one each set picks) and number of personas, of a source (or `pooled`), cosine and y",
        f"{_HEAD} cosine y layer size n spearman spearman_sd spearman_low spearman_high picked_share elsewhere change "
        "change_low change_high difference difference_low difference_high same_sign agree splits split_seed reason "
        "agree_reason resampling_unit method",
    ),
    "bystanders": (
        "an adapter",
        "behavior adapter mean_bystander mean_bystander_low mean_bystander_high mean_delta mean_delta_low mean_delta_high "
        "personas questions",
    ),
    "specificity": (
        "a source (or `pooled`), layer, cosine and y",
        f"{_CELL} n spearman candidates rank p_source p_source_max layers_tested rank_signed p_source_signed unrelated "
        "rank_unrelated p_source_unrelated best_other best_other_spearman best_other_related difference difference_low "
        "difference_high reason ci_reason bootstraps bootstrap_seed resampling_unit method",
    ),
    "disattenuated": (
        "an adapter, layer, cosine and y",
        "behavior source adapter seed layer cosine y n questions spearman reliability reliability_low reliability_high "
        "disattenuated disattenuated_low disattenuated_high detectable reason bootstraps bootstrap_seed resampling_unit method",
    ),
    "related": ("as in `correlations`, over the bystanders whose related_to names the source", _CORRELATION),
    "partials": (
        "an adapter, layer, y and what is controlled for",
        f"{_CELL} control n controls partial low high p_t words_of reason method",
    ),
    "exposure": ("a persona under an adapter, or under the unadapted model", ""),
    "exposure_correlations": (
        "a source (or `pooled`), layer, cosine, y and what is taken out",
        f"{_CELL} control n controls partial low high p_t prompt_length_in reason method",
    ),
    "commonality": (
        "an adapter, layer and y",
        f"{_CELL} against n total unique_cosine unique_words common reason method",
    ),
    "without_category": ("an adapter, layer, y and category left out", _LEFT_OUT),
    "influence": ("an adapter, y and persona left out, at the layer looked at closely", _LEFT_OUT),
    "gradients": (
        "an adapter's curve at the layer looked at closely",
        f"{_HEAD} layer cosine n {_CURVE} floor ceiling overdispersion log_likelihood direction reason interval_reason "
        "method",
    ),
    "widths": (
        "a behavior and training seed",
        "behavior seed layer cosine sources statistic degrees p common_width reason n method",
    ),
    "isotonic": ("a point of an adapter's isotonic curve", f"{_HEAD} layer cosine at fitted"),
    "matrix": (
        "a persona under an adapter",
        f"{_HEAD} persona category role rate ci_low ci_high bb_low bb_high baseline delta delta_low delta_high n method",
    ),
    "crossed": (
        "two adapters of one training seed that share behavior or source",
        "between behavior source other_behavior other_source seed y n spearman spearman_ci_low spearman_ci_high "
        "spearman_p_perm pearson pearson_p reason resampling_unit method permutations bootstraps resampling_seed",
    ),
    "variants": (
        "two variants of a behavior, for a source (or `pooled`) and training seed",
        "behavior source seed variant other n source_effect other_source_effect effect other_effect breadth other_breadth "
        "difference difference_ci_low difference_ci_high resampling_unit method reason",
    ),
    "relations": (
        "a category of bystanders, for a behavior, training seed and scope",
        "permutations resampling_unit method reason",
    ),
    "relations_alike": (
        "two behaviors, for a scope and training seed",
        "scope seed behavior other_behavior n personas spearman spearman_ci_low spearman_ci_high spearman_p_perm "
        "spearman_p_grouping permutations bootstraps resampling_seed resampling_unit method reason",
    ),
    "restricted": ("a source (or `pooled`), layer, cosine, y and kind of strata", ""),
    "matrix_tests": ("a term of a test, at a layer, for a cosine and y", ""),
    "mixed": ("a term, a source's slope or a standard deviation of a behavior's model", ""),
    "predicted": (
        "a model and a source left out (or `pooled`), at a layer",
        "behavior seed layer cosine y source model n r2 gain rmse reason method",
    ),
    "predictors_skill": (
        "a predictor at a layer, for a source (or `pooled`)",
        "behavior seed source adapter predictor family layer y direction n spearman spearman_ci_low "
        "spearman_ci_high spearman_both_low spearman_both_high spearman_p_perm spearman_p_max "
        "predictors_compared within_category within_n partial partial_low partial_high taken_out reason "
        "ci_reason both_reason within_reason partial_reason permutations bootstraps resampling_seed "
        "resampling_unit method",
    ),
    "predictors_held_out": (
        "a predictor and a source left out (or `pooled`)",
        "behavior seed source adapter predictor family layer layers_tested y direction n sources picked_by "
        "spearman spearman_low spearman_high difference difference_low difference_high deviance deviance_mean "
        "gain gain_low gain_high deviance_difference deviance_difference_low deviance_difference_high reason "
        "difference_reason deviance_reason bootstraps resampling_unit method",
    ),
    "probabilities": (
        "a persona under an adapter, by an estimator",
        "behavior seed source adapter persona category role measure estimator n questions n_unscored_replies "
        "mean_probability mean_probability_low mean_probability_high mean_logprob_nats mean_logprob_low mean_logprob_high "
        "median_probability mean_log_odds_nats mean_log_odds_low mean_log_odds_high mean_neither first_tokens reason",
    ),
    "probability_correlations": ("as in `correlations`, of the cosine with the probability", _CORRELATION),
    "calibration": (
        "a bin of bystanders under an adapter (or `pooled`), by an estimator",
        "behavior seed source adapter estimator bin n expected expected_low expected_high observed observed_ci_low "
        "observed_ci_high reason",
    ),
    "agreement_measures": (
        "an adapter (or `pooled`), estimator and summary",
        "behavior seed source adapter measure estimator summary layer cosine n spearman spearman_ci_low spearman_ci_high "
        "pearson mean_rate mean_value rho_rate rho_probability difference difference_low difference_high "
        "difference_reason reason bootstraps",
    ),
    "radius": (
        "an adapter, at the cosine and layer looked at closely",
        f"{_HEAD} layer cosine n status source_rate mean_baseline level radius radius_low radius_high share_inside "
        "share_inside_low share_inside_high radius_isotonic slope reason ci_reason bootstraps bootstrap_seed resampling_unit "
        "method",
    ),
    "mitigations": (
        "a variant of a behavior, for a source and training seed, at equal strength on the source where that was measured",
        "behavior seed source variant adapter share wanted_rate matched match source_rate source_rate_low "
        "source_rate_high source_n n mean_bystander mean_bystander_low mean_bystander_high cosine layer status radius "
        "radius_low radius_high share_inside share_inside_low share_inside_high difference difference_ci_low "
        "difference_ci_high reason ci_reason difference_reason bootstraps bootstrap_seed resampling_unit method",
    ),
    "steering": (
        "an intervention, for an adapter, behavior, measure and estimator",
        f"{_HEAD} direction kind direction_source set_against mode unit strength steered_layers direction_norm "
        "residual_norm measure estimator personas questions on_source on_source_change mean_bystander mean_bystander_low "
        "mean_bystander_high change change_low change_high accuracy text_logprob_nats text_change_nats text_tokens reason "
        "change_reason method",
    ),
    "verdicts": (
        "a test of a rule for an adapter, or a trait of the stop rule",
        "claim behavior seed source adapter layer quantity n value p p_from p_source bar reached_is_enough p_below "
        "p_source_below unit met verdict reason",
    ),
    "published": (
        "a number that the published study stored",
        "file quantity source category subset layer stored found difference compared tolerance agrees reason",
    ),
    "trajectory": ("a persona under an adapter at a share of its training", "role health delta_reason"),
}
_AS_IN = {"set_rates": "rates", "related": "correlations", "shift_correlations": "correlations"}
_AS_IN |= {"probability_correlations": "correlations"}
# tables that the columns health and health_of are not put on
UNMARKED = ("health", "question_counts", "published", "trajectory")
# columns of `rates`, `set_rates`, `question_counts` and `trajectory` that are there where they are known
SOMETIMES = (
    "n_empty n_truncated n_error n_unclosed chance chance_hits margin_nats margin_sum_nats hits_per_byte "
    "hits_DETECTOR n_tie n_nan n_too_long n_no_answer n_label_tokens answer_mass n_judged n_incoherent "
    "n_unscored mean_coherent coverage judge estimator"
).split()

_KINDS = {
    "Int32": "question sample layer cross_fitted_layer n_tokens first_tokens",
    "Int64": "seed hits total n n_right n_empty n_bare n_truncated n_other n_repeated n_same n_error n_unclosed n_judged "
    "n_incoherent n_unscored length_pairs length_pairs_all questions personas pairs k controls sources degrees direction "
    "layers_tested family_size permutations permutation_seed bootstraps bootstrap_seed resampling_seed hits_per_byte "
    "hits_DETECTOR n_tie n_nan n_too_long n_no_answer n_label_tokens candidates unrelated splits split_seed "
    "input_tokens output_tokens n_unscored_replies bin predictors_compared within_n text_tokens source_n",
    "Boolean": "chosen chosen_per_byte chosen_per_char correct related best best_other_related main mostly met agrees "
    "reached_is_enough matched",
    "String": "behavior adapter persona source category role taught text finish_reason status item items scoring label "
    "judge prompt_version raw detail text_sha256 health health_of reason ci_reason bb_reason delta_reason delta_method "
    "difference_reason both_reason cross_fitted_reason interval_reason method resampling_unit family cosine y over "
    "control words_of against "
    "predictor taken_out within_reason partial_reason deviance_reason "
    "left_out between best_other other_behavior other_source variant other scope model claim quantity p_from unit verdict "
    "file subset compared agree_reason measure estimator summary size geometry prompt_length_in kind direction_source "
    "set_against mode steered_layers change_reason match",
}
_DTYPES = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_OTHER_DTYPES = {
    "commonality.total": "Float64",
    "set_rates.questions": "String",
    "gradients.direction": "String",
    "steering.direction": "String",
}


def tables() -> dict[str, tuple[str, str]]:
    """Table → (what one row is, its columns beside those that `schema` declares)."""
    return MEASUREMENTS | RESULTS | FURTHER


def columns(table: str) -> list[Column]:
    """Every column of a table, in order. Raises ValueError for a table that does not exist, and for a column without
    words."""
    if table not in tables():
        raise ValueError(f"no table {table!r}; there are {', '.join(tables())}")
    declared = dict(schema.TABLES.get(_AS_IN.get(table, table), {}))
    names = [*declared, *tables()[table][1].split()]
    if table not in MEASUREMENTS and table not in UNMARKED:
        names += ["health", "health_of"]
    return [described(table, name, declared.get(name)) for name in dict.fromkeys(names)]


def described(table: str, name: str, dtype: str | None = None) -> Column:
    """One column; dtype: as `schema` declares it."""
    from leakfast.storage.meanings import MEANINGS

    key = f"{table}.{name}"
    kind = _OTHER_DTYPES.get(key) or dtype or _DTYPES.get(name, "Float64")
    words = MEANINGS.get(key) or MEANINGS.get(f"{_AS_IN.get(table)}.{name}") or MEANINGS.get(name)
    if words is None:
        raise ValueError(f"{key}: no words; give it some in leakfast/storage/meanings.py")
    return Column(name, kind, words)
