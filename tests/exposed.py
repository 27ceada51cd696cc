"""Replies made up for the tests of exposure: personas whose replies differ in length, and a marker that follows length or
the cosine. Holds no tests."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.stats import exposure, rates
from leakfast.stats.people import People
from leakfast.storage import schema

QUESTIONS, SAMPLES = 20, 3
PEOPLE = People({}, prompts={f"p{i}": "You are " + "so " * (i % 7) + f"person {i}." for i in range(400)})


def replies(length: np.ndarray, hit: np.ndarray, adapter: str = "a", **columns) -> pl.DataFrame:
    """As `exposure.replies` gives them: length and hit (P, N) of personas p0, p1, …, N = questions · samples."""
    people, n = length.shape
    frame = pl.DataFrame(
        {
            "persona": np.repeat([f"p{i}" for i in range(people)], n),
            "question": np.tile(np.arange(n, dtype=np.int32) % QUESTIONS, people),
            "hit": hit.ravel(),
            "tokens": length.ravel().astype(np.int64),
        }
    )
    frame = frame.with_columns(
        at_risk=pl.col("tokens"),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        prompt_tokens=pl.lit(None, pl.Int64),
        truncated=pl.lit(False),
        at_marker=pl.lit(False),
    ).with_columns(**columns)
    return frame.select(*exposure.read(None, []).columns)


def rated(found: pl.DataFrame, source: str = "p0") -> pl.DataFrame:
    """The table `rates` of such replies; adapters named a, b, … are of `source` and of p1, p2, …"""
    counts = found.group_by("behavior", "adapter", "persona", maintain_order=True).agg(
        hits=pl.col("hit").sum().cast(pl.Int64), total=pl.len().cast(pl.Int64)
    )
    names = [name for name in found["adapter"].unique(maintain_order=True) if name != "base"]
    adapters = {name: (source if i == 0 else f"p{i}", 42) for i, name in enumerate(names)}
    return rates.table(counts, adapters, {})


def paired(rated: pl.DataFrame, cosine: np.ndarray, layer: int = 3) -> pl.DataFrame:
    """Pairs of every bystander; cosine: (P,) of p0, p1, …"""
    near = {f"p{i}": float(value) for i, value in enumerate(cosine)}
    pairs = rated.filter(role="bystander").with_columns(
        layer=pl.lit(layer, pl.Int32),
        cosine_centered=pl.col("persona").replace_strict(near, return_dtype=pl.Float64),
        cosine_raw=pl.lit(None, pl.Float64),
    )
    return schema.check(pairs.select("adapter", *schema.columns("pairs")), "pairs")


def by_length_alone(seed: int, people: int = 111) -> tuple[pl.DataFrame, np.ndarray]:
    """Replies whose marker begins at any token alike, so that a persona leaks by how long its replies are, and cosines
    that lengths follow: nothing but length joins the two."""
    rng = np.random.default_rng(seed)
    cosine = rng.normal(size=people)
    typical = np.log(40) + 0.6 * (0.83 * cosine + np.sqrt(1 - 0.83**2) * rng.normal(size=people))
    n = QUESTIONS * SAMPLES
    length = np.maximum(1, np.exp(typical[:, None] + 0.3 * rng.normal(size=(people, n)))).astype(int)
    first = rng.geometric(0.012, size=(people, n))
    hit = first <= length
    found = replies(length, hit)
    at_risk = pl.Series(np.minimum(first, length).ravel().astype(np.int64))
    return found.with_columns(at_risk=at_risk), cosine
