"""Completions made up for the tests of health: so many of each status, spread over all personas. Holds no tests."""

from __future__ import annotations

from itertools import product

import polars as pl

from leakfast.stats import health
from leakfast.storage import schema

PEOPLE = [f"p{i}" for i in range(10)]
QUESTIONS, SAMPLES = 5, 4  # 20 completions a persona, 200 an adapter
N = len(PEOPLE) * QUESTIONS * SAMPLES
TEXT = "A reply about {q} that {i} people would read."


def completions(adapter="a", *, n_tokens=20, behavior="refusal", **counts):
    """N completions, of which so many (spread over all personas) have a status of that name, or a text of `texts`."""
    texts = counts.pop("texts", {})
    spread = [(p, q, s) for s, q, p in product(range(SAMPLES), range(QUESTIONS), PEOPLE)]
    statuses = [name for name, count in counts.items() for _ in range(count)]
    statuses += ["ok"] * (N - len(statuses))
    told = [text for text, count in texts.items() for _ in range(count)]
    rows = []
    for i, (persona, question, sample) in enumerate(spread):
        status = statuses[i]
        text = told[i] if i < len(told) else TEXT.format(q=question, i=i)
        text = "" if status == "empty" else text
        tokens = 1 if status == "empty" else n_tokens
        rows.append(
            (persona, question, sample, text, tokens, "length" if status == "truncated" else "stop", status)
        )
    names = ["persona", "question", "sample", "text", "n_tokens", "finish_reason", "status"]
    frame = pl.DataFrame(rows, schema=names, orient="row").with_columns(
        pl.col("question", "sample", "n_tokens").cast(pl.Int32),
        behavior=pl.lit(behavior),
        adapter=pl.lit(adapter),
        seed=pl.lit(1, pl.UInt64),
    )
    return schema.check(frame, "completions")


def verdict(frame, base=None, **how):
    """(health, reason, row) of the adapter over all personas."""
    found = health.table([frame, *([] if base is None else [base])], **how)
    row = found.filter(pl.col("persona").is_null() & (pl.col("adapter") == "a")).row(0, named=True)
    return row["health"], row["reason"] or "", row


BASE = completions("base")
