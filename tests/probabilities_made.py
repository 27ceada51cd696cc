"""Scores of measure.probability, and the tables of an adapter that was measured by both, as tests make them up."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.stats import probabilities as stage
from leakfast.storage import schema

PEOPLE = [f"p{i:02d}" for i in range(24)]


def scores_of(values, adapter="marker-villain-s42", status="ok"):
    """Schema `probability` of {(persona, question, sample): probability}."""
    rows = [
        {
            "behavior": "marker",
            "adapter": adapter,
            "source": "villain",
            "persona": persona,
            "question": question,
            "sample": sample,
            "estimator": "end",
            "logprob_nats": None if p is None else float(np.log(p)),
            "probability": p,
            "left_out": None,
            "n_reply_tokens": 9,
            "n_recut": 0,
            "status": "truncated" if p is None else status,
        }
        for (persona, question, sample), p in values.items()
    ]
    return stage.with_columns(pl.DataFrame(rows)).select(
        pl.col(name).cast(dtype) for name, dtype in schema.columns("probability").items()
    )


def measured_by_both():
    """Probabilities, rates and pairs of one adapter over 24 bystanders."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.02, 0.8, len(PEOPLE))
    values = {
        (p, q, 0): float(np.clip(truth[i] + rng.normal(0, 0.02), 1e-3, 1))
        for i, p in enumerate(PEOPLE)
        for q in range(4)
    }
    about = {"behavior": "marker", "source": "villain", "seed": 42, "category": None}
    hits = rng.binomial(40, truth)
    rates = pl.DataFrame(
        [
            {**about, "adapter": "marker-villain-s42", "persona": p, "role": "bystander", "rate": h / 40}
            for p, h in zip(PEOPLE, hits.tolist(), strict=True)
        ],
        schema_overrides={"category": pl.String},
    )
    cosine = truth + rng.normal(0, 0.2, len(PEOPLE))
    pairs = pl.DataFrame(
        [
            {**about, "persona": p, "layer": 3, "cosine_centered": c}
            for p, c in zip(PEOPLE, cosine.tolist(), strict=True)
        ],
        schema_overrides={"layer": pl.Int32, "category": pl.String},
    )
    return stage.table(scores_of(values), rates), rates, pairs
