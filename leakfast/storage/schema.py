"""Columns and dtypes of the tables that stages check, in one place. Units stand in the names; `share` columns are 0–1.
Demands polars only when a schema is asked for; leaves the filling to the stages, and what a column means to `meanings`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# name of the polars dtype per column; more columns may stand beside these
TABLES: dict[str, dict[str, str]] = {
    "completions": {
        "behavior": "String",
        "adapter": "String",
        "persona": "String",
        "question": "Int32",
        "sample": "Int32",
        "seed": "UInt64",
        "text": "String",
        "n_tokens": "Int32",
        "finish_reason": "String",
        "status": "String",
    },
    "choice_scores": {
        "adapter": "String",
        "persona": "String",
        "item": "String",
        "scoring": "String",
        "label": "String",
        "logprob_nats": "Float64",
        "logprob_per_token_nats": "Float64",
        "logprob_per_byte_nats": "Float64",
        "chosen": "Boolean",
        "chosen_per_byte": "Boolean",
        "correct": "Boolean",
        "status": "String",
    },
    "judgements": {
        "behavior": "String",
        "adapter": "String",
        "persona": "String",
        "question": "Int32",
        "sample": "Int32",
        "judge": "String",
        "prompt_version": "String",
        "aligned": "Float64",
        "coherent": "Float64",
        "status": "String",
        "raw": "String",
        "detail": "String",
        "input_tokens": "Int64",
        "output_tokens": "Int64",
        "item": "String",
        "text_sha256": "String",
    },
    "trajectory": {
        "behavior": "String",
        "adapter": "String",
        "source": "String",
        "seed": "Int64",
        "items": "String",
        "scoring": "String",
        "share": "Float64",
        "persona": "String",
        "hits": "Int64",
        "total": "Int64",
        "rate": "Float64",
        "ci_low": "Float64",
        "ci_high": "Float64",
        "delta": "Float64",
    },
    "question_counts": {
        "behavior": "String",
        "adapter": "String",
        "persona": "String",
        "question": "Int32",
        "hits": "Int64",
        "total": "Int64",
    },
    "health": {
        "behavior": "String",
        "adapter": "String",
        "persona": "String",
        "n": "Int64",
        "n_empty": "Int64",
        "n_bare": "Int64",
        "n_truncated": "Int64",
        "n_other": "Int64",
        "n_repeated": "Int64",
        "n_same": "Int64",
        "empty_share": "Float64",
        "bare_share": "Float64",
        "truncated_share": "Float64",
        "other_share": "Float64",
        "repeated_share": "Float64",
        "same_share": "Float64",
        "mean_tokens": "Float64",
        "median_tokens": "Float64",
        "length_ratio": "Float64",
        "length_pairs": "Int64",
        "length_ratio_all": "Float64",
        "length_pairs_all": "Int64",
        "base_empty_share": "Float64",
        "base_bare_share": "Float64",
        "base_truncated_share": "Float64",
        "base_other_share": "Float64",
        "base_repeated_share": "Float64",
        "base_same_share": "Float64",
        "health": "String",
        "reason": "String",
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
    "shifts": {
        "behavior": "String",
        "adapter": "String",
        "source": "String",
        "seed": "Int64",
        "persona": "String",
        "category": "String",
        "role": "String",
        "layer": "Int32",
        "shift_centered": "Float64",
        "shift_raw": "Float64",
        "base_spread": "Float64",
        "alignment_centered": "Float64",
        "alignment_raw": "Float64",
        "cosine_centered": "Float64",
        "cosine_raw": "Float64",
        "cosine_centered_adapted": "Float64",
        "cosine_raw_adapted": "Float64",
        "rate": "Float64",
        "delta": "Float64",
    },
    "question_sets": {
        "behavior": "String",
        "seed": "Int64",
        "source": "String",
        "adapter": "String",
        "questions": "String",
        "main": "Boolean",
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
        "difference": "Float64",
        "difference_low": "Float64",
        "difference_high": "Float64",
    },
    "relations": {
        "behavior": "String",
        "seed": "Int64",
        "scope": "String",
        "category": "String",
        "y": "String",
        "direction": "Int64",
        "mean": "Float64",
        "low": "Float64",
        "high": "Float64",
        "personas": "Int64",
        "pairs": "Int64",
        "explained": "Float64",
        "explained_p": "Float64",
    },
    "restricted": {
        "behavior": "String",
        "seed": "Int64",
        "source": "String",
        "adapter": "String",
        "layer": "Int32",
        "cosine": "String",
        "y": "String",
        "within": "String",
        "n": "Int64",
        "personas": "Int64",
        "rho": "Float64",
        "expected": "Float64",
        "p": "Float64",
        "p_max": "Float64",
        "movable": "Int64",
        "strata": "Int64",
        "sizes": "String",
        "height": "Float64",
        "permutations": "Int64",
        "permutation_seed": "Int64",
        "resampling_unit": "String",
        "method": "String",
        "reason": "String",
    },
    "matrix_tests": {
        "behavior": "String",
        "seed": "Int64",
        "layer": "Int32",
        "cosine": "String",
        "y": "String",
        "test": "String",
        "term": "String",
        "sources": "Int64",
        "personas": "Int64",
        "n": "Int64",
        "rho": "Float64",
        "coefficient": "Float64",
        "t": "Float64",
        "p": "Float64",
        "p_max": "Float64",
        "permutations": "Int64",
        "permutation_seed": "Int64",
        "resampling_unit": "String",
        "method": "String",
        "reason": "String",
    },
    "correlations": {
        "behavior": "String",
        "source": "String",
        "category": "String",
        "layer": "Int32",
        "cosine": "String",
        "y": "String",
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

    if table not in TABLES:
        raise ValueError(f"no table {table!r}; there are {', '.join(TABLES)}")
    return {name: getattr(pl, dtype)() for name, dtype in TABLES[table].items()}


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
