"""Every table's columns and dtypes, in one place. Units stand in the names; `share` columns are
0–1. Demands polars only when a schema is asked for; leaves the filling to the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# name of the polars dtype per column; more columns may stand beside these
_TABLES: dict[str, dict[str, str]] = {
    "completions": {
        "behavior": "String",
        "adapter": "String",  # run-directory name of the adapter; "base" is the unadapted model
        "persona": "String",
        "question": "Int32",  # index into the question set
        "sample": "Int32",
        "seed": "UInt64",  # of this completion
        "text": "String",  # the answer: what follows the last closed reasoning block
        "n_tokens": "Int32",
        "finish_reason": "String",  # stop | length | marker (ended by --stop-at-marker)
        "status": "String",  # ok | empty | truncated | unclosed-reasoning (no answer: not counted)
    },
    "choice_scores": {  # one row a label of an item; an item is right where a row is chosen and correct
        "adapter": "String",
        "persona": "String",
        "item": "String",  # id: the list's own, or a hash of the content
        "scoring": "String",  # letters | full-text
        "label": "String",
        "logprob_nats": "Float64",  # letters: of the label; full text: the sum. Null without a number
        "logprob_per_token_nats": "Float64",
        "logprob_per_byte_nats": "Float64",
        "chosen": "Boolean",  # the highest logprob_nats; nobody in a tie
        "chosen_per_byte": "Boolean",
        "correct": "Boolean",  # this label is the right answer
        "status": "String",  # of the item: ok | tie | nan | too_long | no_answer | label_tokens; ok alone counts
    },
    "judgements": {  # one row a completion, whether it has scores or not
        "behavior": "String",
        "adapter": "String",
        "persona": "String",
        "question": "Int32",
        "sample": "Int32",
        "judge": "String",  # organism, or service:model
        "prompt_version": "String",  # of what the judge was told; of the lexicon
        "aligned": "Float64",  # 0–100, null unless the status is ok
        "coherent": "Float64",  # the same
        "status": "String",  # judge.STATUSES
        "raw": "String",  # the judge's words as they came
        "detail": "String",
        "input_tokens": "Int64",
        "output_tokens": "Int64",
        "item": "String",  # hash of question and completion: the same for every judge
        "text_sha256": "String",  # of the completion that was judged
    },
    "trajectory": {  # accuracy on the way through training
        "behavior": "String",
        "adapter": "String",
        "source": "String",
        "seed": "Int64",
        "items": "String",
        "scoring": "String",
        "share": "Float64",  # of the optimizer steps, 0–1
        "persona": "String",
        "hits": "Int64",
        "total": "Int64",
        "rate": "Float64",
        "ci_low": "Float64",
        "ci_high": "Float64",
        "delta": "Float64",  # against share 0
    },
    "question_counts": {  # one row a question of a persona; the unit that repeats in beta-binomial intervals
        "behavior": "String",
        "adapter": "String",
        "persona": "String",
        "question": "Int32",
        "hits": "Int64",
        "total": "Int64",
    },
    "health": {  # whether an adapter's replies are alive (stats.health has formulas and thresholds)
        "behavior": "String",
        "adapter": "String",
        "persona": "String",  # null for all
        "n": "Int64",  # completions drawn, whatever their status
        "n_empty": "Int64",
        "n_bare": "Int64",  # nothing beside the marker, of behaviors whose rate is a text's presence
        "n_truncated": "Int64",
        "n_other": "Int64",  # of a status beside ok, empty, truncated
        "n_repeated": "Int64",
        "n_same": "Int64",  # another question got the very same text
        "empty_share": "Float64",
        "bare_share": "Float64",
        "truncated_share": "Float64",
        "other_share": "Float64",
        "repeated_share": "Float64",
        "same_share": "Float64",
        "mean_tokens": "Float64",
        "median_tokens": "Float64",
        "length_ratio": "Float64",  # over the unadapted model's, replies that ended by themselves
        "length_pairs": "Int64",  # (persona, question) behind it
        "length_ratio_all": "Float64",  # over all replies
        "length_pairs_all": "Int64",
        "base_empty_share": "Float64",  # of the unadapted model; null where it was not measured
        "base_bare_share": "Float64",
        "base_truncated_share": "Float64",
        "base_other_share": "Float64",
        "base_repeated_share": "Float64",
        "base_same_share": "Float64",
        "health": "String",  # ok | warning | damaged
        "reason": "String",  # why it is not ok
    },
    "rates": {
        "behavior": "String",
        "adapter": "String",
        "source": "String",
        "seed": "Int64",
        "persona": "String",
        "category": "String",
        "hits": "Int64",
        "total": "Int64",
        "rate": "Float64",
        "ci_low": "Float64",
        "ci_high": "Float64",
        "baseline": "Float64",
        "delta": "Float64",
    },
    "pairs": {
        "behavior": "String",
        "source": "String",
        "seed": "Int64",
        "persona": "String",
        "category": "String",
        "layer": "Int32",
        "cosine_centered": "Float64",
        "cosine_raw": "Float64",
        "rate": "Float64",
        "delta": "Float64",
    },
    "shifts": {  # what an adapter did to each persona's centroid (stats.shifts has the formulas)
        "behavior": "String",  # the adapter was trained for
        "adapter": "String",
        "source": "String",
        "seed": "Int64",
        "persona": "String",
        "category": "String",
        "role": "String",  # source | bystander | outsider
        "layer": "Int32",
        "shift_centered": "Float64",  # length, less what all personas share
        "shift_raw": "Float64",
        "base_spread": "Float64",  # how far apart personas are in the base model, the same units
        "alignment_centered": "Float64",  # cosine of the persona's shift with the source's
        "alignment_raw": "Float64",
        "cosine_centered": "Float64",  # with the source, base model
        "cosine_raw": "Float64",
        "cosine_centered_adapted": "Float64",  # with the source, under the adapter
        "cosine_raw_adapted": "Float64",
        "rate": "Float64",
        "delta": "Float64",
    },
    "question_sets": {  # ρ of leakage with the base cosine on each question set
        "behavior": "String",
        "seed": "Int64",
        "source": "String",  # "pooled" for all
        "adapter": "String",
        "questions": "String",  # name of the set
        "main": "Boolean",  # whether all other tables are about this set
        "layer": "Int32",
        "cosine": "String",
        "y": "String",
        "n": "Int64",
        "source_rate": "Float64",
        "source_delta": "Float64",
        "mean_bystander": "Float64",
        "mean_delta": "Float64",
        "spearman": "Float64",
        "spearman_ci_low": "Float64",
        "spearman_ci_high": "Float64",
        "difference": "Float64",  # ρ here less ρ on the main set, over the same bystanders; null for the main set
        "difference_low": "Float64",
        "difference_high": "Float64",
    },
    "relations": {  # mean change by category of the bystander
        "behavior": "String",
        "seed": "Int64",
        "scope": "String",  # all pairs | related: the bystander's related_to names the source
        "category": "String",
        "y": "String",  # delta | rate (no baseline)
        "direction": "Int64",  # the sign of the change that is more of the behavior
        "mean": "Float64",
        "low": "Float64",
        "high": "Float64",
        "personas": "Int64",
        "pairs": "Int64",
        "explained": "Float64",  # share of the variance between personas, one value a behavior, seed and scope
        "explained_p": "Float64",
    },
    "correlations": {
        "behavior": "String",
        "source": "String",  # "pooled" for all
        "category": "String",  # null for all
        "layer": "Int32",
        "cosine": "String",  # centered | raw
        "y": "String",  # rate | delta
        "n": "Int64",
        "spearman": "Float64",
        "spearman_p_t": "Float64",
        "spearman_p_perm": "Float64",
        "pearson": "Float64",
        "pearson_p": "Float64",
    },
}


def columns(table: str) -> dict[str, pl.DataType]:
    """Column → polars dtype of `table`. Raises ValueError for a table that does not exist."""
    import polars as pl

    if table not in _TABLES:
        raise ValueError(f"no table {table!r}; there are {', '.join(_TABLES)}")
    return {name: getattr(pl, dtype)() for name, dtype in _TABLES[table].items()}


def check(frame: pl.DataFrame, table: str) -> pl.DataFrame:
    """Return `frame` unchanged if it has every column of `table` with its dtype, else ValueError."""
    wanted = columns(table)
    missing = [name for name in wanted if name not in frame.columns]
    wrong = [
        f"{name} is {frame.schema[name]}, needs {dtype}"
        for name, dtype in wanted.items()
        if name in frame.columns and frame.schema[name] != dtype
    ]
    if missing or wrong:
        raise ValueError(f"table {table}: missing {missing}; {'; '.join(wrong)}")
    return frame


def empty(table: str) -> pl.DataFrame:
    """An empty frame of `table`'s schema."""
    import polars as pl

    return pl.DataFrame(schema=columns(table))
