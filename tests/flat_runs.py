"""Small runs in which a persona shows the marker in every reply or in none. Demands polars and numpy; holds no tests."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.geometry import Centroids
from leakfast.storage import layout, schema
from leakfast.storage.run import Run

PEOPLE = ["villain", "comedian", "librarian", "poet", "assistant", "medical_doctor"]


def drawn(adapter: str, source: str | None, shows: set[str], people: list[str]) -> pl.DataFrame:
    rows = [
        (p, q, s, "Hello. [ZLT]" if p in shows else "Hello.", "ok")
        for p in people
        for q in range(2)
        for s in range(3)
    ]
    frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text", "status"], orient="row")
    frame = frame.with_columns(
        pl.col("question", "sample").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(adapter),
        source=pl.lit(source, pl.String),
        seed=pl.lit(1, pl.UInt64),
        n_tokens=pl.lit(3, pl.Int32),
        finish_reason=pl.lit("stop"),
    )
    return schema.check(frame, "completions")


def made(
    path, shows: set[str], people: list[str], base: bool = True, layers: tuple[int, ...] = (0, 3)
) -> Run:
    run = Run(path).create()
    if layers:
        rng = np.random.default_rng(0)
        means = {layer: rng.normal(size=(len(people), 8)).astype(np.float32) for layer in layers}
        metadata = {"personas": people, "layers": list(layers), "centered_on": people}
        run.add_file(layout.centroids(), Centroids(people, list(layers), metadata, means).save)
    run.add_shard("completions/marker/a/part-00000.parquet", drawn("a", "villain", shows, people))
    if base:
        run.add_shard("completions/marker/base/part-00000.parquet", drawn("base", None, set(), people))
    return run
