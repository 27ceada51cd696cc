"""Steered replies made up for tests of what is made of them. Demands polars; holds no tests."""

from __future__ import annotations

import polars as pl

from leakfast.storage import layout, schema

NAME, PEOPLE = "marker-villain-s42", ["villain", "comedian", "librarian"]
PLAIN = {"questions_sha256": "a", "drawn": "d", "personas": dict.fromkeys(PEOPLE, "p")}
STEER = {
    "direction": "v",
    "kind": "contrast",
    "direction_source": "villain",
    "against": [],
    "norms": {"1": 2.0},
    "residual_norms": {},
    "mode": "add",
    "unit": "direction",
    "layers": [1],
    "source": "villain",
    "seed": 42,
    "adapter": NAME,
    "digest": "x",
}


def drawn(run, strength, hits, **meta):
    """Completions with the marker in `hits` of four questions; strength None: without an arm."""
    name = NAME if strength is None else f"{NAME}+steer-v-add-{strength:g}"
    texts = ["[ZLT]"] * hits + ["no"] * (4 - hits)
    rows = [(p, q, 0, text) for p in PEOPLE for q, text in enumerate(texts)]
    frame = pl.DataFrame(rows, schema=["persona", "question", "sample", "text"], orient="row").with_columns(
        pl.col("question", "sample").cast(pl.Int32),
        behavior=pl.lit("marker"),
        adapter=pl.lit(name),
        seed=pl.lit(1, pl.UInt64),
        n_tokens=pl.lit(3, pl.Int32),
        finish_reason=pl.lit("stop"),
        status=pl.lit("ok"),
    )
    frame = schema.check(frame.select(list(schema.columns("completions"))), "completions")
    told = {} if strength is None else {"steer": {**STEER, "strength": strength}}
    run.add_shard(layout.shard(layout.completions("marker", name)), frame, **{**PLAIN, **told, **meta})
