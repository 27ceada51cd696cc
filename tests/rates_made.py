"""Tables of rates and pairs made up for tests of what is computed from it. Demands polars."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.storage import schema


def made_rates(sources=("s", "t"), behaviors=("capability",), drop=0.3, n=30) -> pl.DataFrame:
    rng = np.random.default_rng(5)
    rows = []
    for behavior in behaviors:
        for source in sources:
            for i, name in enumerate([*sources, *(f"p{i}" for i in range(n))]):
                role = "source" if name == source else "bystander"
                delta = -(drop if role == "source" else 0.05 + 0.002 * i) + 0.005 * rng.normal()
                rows.append(
                    (
                        behavior,
                        f"{behavior}-{source}",
                        source,
                        42,
                        name,
                        "c",
                        None,
                        None,
                        0.5 + delta,
                        None,
                        None,
                        0.5,
                        delta,
                        role,
                    )
                )
    columns = schema.columns("rates") | {"role": pl.String()}
    return pl.DataFrame(rows, schema=columns, orient="row")


def made_pairs(x, y, *, source="villain", layer=0, category=None, delta=None, personas=None) -> pl.DataFrame:
    n = len(x)
    names = personas or [f"p{i}" for i in range(n)]
    frame = pl.DataFrame(
        {
            "behavior": ["marker"] * n,
            "source": [source] * n,
            "seed": [42] * n,
            "persona": names,
            "category": category or [None] * n,
            "layer": [layer] * n,
            "cosine_centered": x,
            "cosine_raw": [None] * n,
            "rate": y,
            "delta": delta or [None] * n,
        },
        schema=schema.columns("pairs"),
    )
    return schema.check(frame, "pairs")


def one_row(table: pl.DataFrame, **where) -> dict:
    where = {"source": "villain", "category": None, "cosine": "centered", "y": "rate", **where}
    for name, value in where.items():
        table = table.filter(pl.col(name).eq_missing(pl.lit(value)))
    assert table.height == 1
    return table.row(0, named=True)
