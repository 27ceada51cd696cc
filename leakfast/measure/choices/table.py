"""Choice scores as tables: which choice was chosen, ties, the mass on the answers, and accuracy per persona.
Demands the arrays of scores.py; computes nothing with a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from leakfast.measure.choices.scores import LETTERS, OK, Scores
from leakfast.storage import schema

if TYPE_CHECKING:
    from leakfast.prompts.items import Item

BEHAVIOR = "capability"
COUNTED = "ok"
STATUSES = ("ok", "tie", "nan", "too_long", "no_answer", "label_tokens")
# which column of choice_scores decides: the sum, or it divided by characters or bytes of the choice
CHOSEN = {"sum": "chosen", "char": "chosen_per_char", "byte": "chosen_per_byte"}


def frame(
    scores: Scores,
    personas: Sequence[str],
    items: Sequence[Item],
    *,
    scoring: str,
    adapter: str,
    source: str | None = None,
    items_name: str = "list",
    behavior: str = BEHAVIOR,
) -> pl.DataFrame:
    """Schema `choice_scores`, one row a persona, item and label in that order, and beside it: behavior,
    source, items (the list's name), n_tokens, logprob_per_char_nats, chosen_per_char, answer_mass.

    `correct` is true for the right label. status, one an item and persona: ok; tie (two labels share the
    highest log-probability: none is chosen); nan; too_long (beyond the model's context); no_answer (the item
    has none: `chosen` stands, but it cannot be right or wrong); label_tokens (a label is not one token).
    Without numbers nothing is chosen. answer_mass is P(all labels), 0–1, for letters alone."""
    n_labels = np.array([len(item.labels) for item in items], np.int64)
    width = scores.logprobs.shape[2]
    there = np.arange(width) < n_labels[:, None]  # (Q, C)
    logprobs = scores.logprobs
    measured = scores.reason == OK
    broken = measured & (there & ~np.isfinite(logprobs)).any(2)
    usable = measured & ~broken
    by, chosen, tied = _choices(logprobs, items, there, usable, scoring)
    status = np.full(usable.shape, "ok", object)
    status[:, [item.answer is None for item in items]] = "no_answer"
    status[tied & (status == "ok")] = "tie"
    status[broken] = "nan"
    status[~measured] = scores.reason[~measured]

    p, q, c = np.nonzero(np.broadcast_to(there, logprobs.shape))
    rows = p.size
    names, labels, ids = (
        np.array(x, object) for x in (personas, _padded(items, width), [i.id for i in items])
    )
    answers = np.array([item.answer for item in items], object)
    lacks = ~usable[p, q]

    def number(values: np.ndarray) -> pl.Series:
        return pl.Series(np.where(lacks, np.nan, values[p, q, c])).fill_nan(None)

    with np.errstate(divide="ignore", invalid="ignore"):
        per_token = logprobs / scores.n_tokens
        mass = np.where(there, np.exp(logprobs), 0.0).sum(2)
    label = labels[q, c]
    made = pl.DataFrame(
        {
            "behavior": pl.Series([behavior] * rows, dtype=pl.String),
            "adapter": pl.Series([adapter] * rows, dtype=pl.String),
            "source": pl.Series([source] * rows, dtype=pl.String),
            "persona": pl.Series(names[p].tolist(), dtype=pl.String),
            "items": pl.Series([items_name] * rows, dtype=pl.String),
            "item": pl.Series(ids[q].tolist(), dtype=pl.String),
            "scoring": pl.Series([scoring] * rows, dtype=pl.String),
            "label": pl.Series(label.tolist(), dtype=pl.String),
            "n_tokens": pl.Series(scores.n_tokens[p, q, c], dtype=pl.Int32),
            "logprob_nats": number(logprobs),
            "logprob_per_token_nats": number(per_token),
            "logprob_per_char_nats": number(by["_per_char"]),
            "logprob_per_byte_nats": number(by["_per_byte"]),
            **{f"chosen{name}": pl.Series(chosen[name][p, q, c]) for name in by},
            "correct": pl.Series(label == answers[q], dtype=pl.Boolean),
            "status": pl.Series(status[p, q].tolist(), dtype=pl.String),
            "answer_mass": pl.Series(
                np.where(lacks | (scoring != LETTERS), np.nan, mass[p, q]), dtype=pl.Float64
            ).fill_nan(None),
        }
    )
    return schema.check(made, "choice_scores")


def _choices(
    logprobs: np.ndarray, items: Sequence[Item], there: np.ndarray, usable: np.ndarray, scoring: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """(log-probabilities, which choice has the highest alone) by suffix of a column, (P, Q, C), in nats: the sum, per
    character, per byte; and where two share the highest sum (P, Q)."""
    width = logprobs.shape[2]
    texts = [item.labels if scoring == LETTERS else item.choices for item in items]
    chars, sizes = (np.ones((len(items), width)) for _ in range(2))
    for q, one in enumerate(texts):
        chars[q, : len(one)] = [len(text) for text in one]
        sizes[q, : len(one)] = [len(text.encode()) for text in one]
    by = {"": logprobs, "_per_char": logprobs / chars, "_per_byte": logprobs / sizes}
    chosen, tied = {}, None
    for name, values in by.items():
        best = np.where(there, values, -np.inf)
        top = best == best.max(2, keepdims=True, initial=-np.inf)
        alone = (top.sum(2) == 1) & usable
        tied = usable & ~alone if tied is None else tied
        chosen[name] = top & alone[..., None]
    return by, chosen, tied


def counts(scores: pl.DataFrame, by: str = "sum", keys: Sequence[str] = ()) -> pl.DataFrame:
    """Per (behavior, adapter, persona, *keys): `hits` (right choices) of `total` (items of status ok), n_error
    (the others) with n_tie, n_nan, n_too_long, n_no_answer, n_label_tokens, chance_hits (what guessing gives: Σ 1 /
    number of choices over the items of status ok), margin_sum_nats (of these, log P of the right choice less
    that of the likeliest wrong one), and the mean answer_mass.

    by: "sum", "char" or "byte", what the choice is made by; where two share the highest value of another
    than the sum, none is chosen and the item counts as wrong in neither: it is one of n_error."""
    if by not in CHOSEN:
        raise ValueError(f"by must be one of {', '.join(CHOSEN)}, not {by!r}")
    group = ["behavior", "adapter", "persona", *keys]
    chosen = pl.col(CHOSEN[by])
    an_item = scores.group_by(
        list(dict.fromkeys([*group, "items", "item", "scoring"])), maintain_order=True
    ).agg(
        (chosen & pl.col("correct")).any().alias("hit"),
        chosen.any().alias("decided"),
        pl.col("status").first(),
        pl.col("answer_mass").first(),
        (1.0 / pl.len()).alias("guess"),
        (
            pl.col("logprob_nats").filter(pl.col("correct")).max()
            - pl.col("logprob_nats").filter(~pl.col("correct")).max()
        ).alias("margin"),
    )
    status = (
        pl.when(~pl.col("decided") & pl.col("status").is_in(["ok"]))
        .then(pl.lit("tie"))
        .when(pl.col("decided") & (pl.col("status") == "tie"))
        .then(pl.lit("ok"))
        .otherwise(pl.col("status"))
    )
    an_item = an_item.with_columns(status.alias("status"))
    ok = pl.col("status") == COUNTED
    return an_item.group_by(group, maintain_order=True).agg(
        (ok & pl.col("hit")).sum().cast(pl.Int64).alias("hits"),
        ok.sum().cast(pl.Int64).alias("total"),
        (~ok).sum().cast(pl.Int64).alias("n_error"),
        pl.col("guess").filter(ok).sum().alias("chance_hits"),
        pl.col("margin").filter(ok).sum().alias("margin_sum_nats"),
        *[
            (pl.col("status") == name).sum().cast(pl.Int64).alias(f"n_{name}")
            for name in STATUSES
            if name != "ok"
        ],
        pl.col("answer_mass").mean(),
    )


def rates(
    scores: pl.DataFrame,
    adapters: Mapping[str, tuple[str, int | None]],
    categories: Mapping[str, str | None],
    by: str = "sum",
    unlike: Collection[tuple[str, str, str]] = (),
) -> pl.DataFrame:
    """Schema `rates` of accuracy: share of right choices with its 95 % Wilson interval, delta against `base`.

    adapters: name → (source, seed); unlike: (behavior, adapter, persona) without a baseline. Estimand: the
    probability of a right choice on one more item of the list; the model's scores are exact, the items are the
    sample."""
    from leakfast.stats import rates as rate_tables

    return rate_tables.table(counts(scores, by), adapters, categories, unlike=unlike)


def troubles(counted: pl.DataFrame) -> str:
    """`3 tie, 1 nan` over all rows of `counts`; empty when every item counted."""
    sums = {name: int(counted[f"n_{name}"].sum() or 0) for name in STATUSES if name != "ok"}
    return ", ".join(f"{n} {name}" for name, n in sums.items() if n)


def _padded(items: Sequence[Item], width: int) -> list[list[Any]]:
    return [[*item.labels, *[None] * (width - len(item.labels))] for item in items]
