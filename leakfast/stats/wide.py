"""Pairs laid out wide, a row an adapter and bystander, all layers beside each other: what correlations, shuffles inside strata
and matrix tests are made of. Demands a pairs table; computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from leakfast.stats import ties
from leakfast.storage import schema

COSINES = ("centered", "raw")
YS = ("rate", "delta")


@dataclass(frozen=True)
class Leaks:
    """The pairs of one behavior and training seed, wide: row = (adapter, persona), by name."""

    adapters: list[tuple[str, str]]  # (adapter, source), by the adapters' names
    appearance: list[int]  # their codes, as the table has them one after another
    layers: list[int]
    adapter: np.ndarray  # (n,) int codes
    persona: np.ndarray  # (n,) names
    category: np.ndarray  # (n,) object, None where a persona has none
    x: dict[str, np.ndarray]  # cosine → (n, L) float64, NaN where null
    y: dict[str, np.ndarray]  # rate, delta → (n,) float64, NaN where null

    def twins(self) -> list[str]:
        """Sources with more than one adapter."""
        return [source for source, n in Counter(source for _, source in self.adapters).items() if n > 1]

    @cached_property
    def cosines(self) -> np.ndarray:
        """(n, L × COSINES): both cosines of a layer side by side."""
        return np.stack([self.x[cosine] for cosine in COSINES], axis=2).reshape(len(self.persona), -1)

    @cached_property
    def codes(self) -> np.ndarray:
        """(n,) personas as whole numbers, by name."""
        return np.unique(self.persona, return_inverse=True)[1].astype(np.int64)


def leaks(pairs: pl.DataFrame) -> Iterator[tuple[str, int | None, Leaks]]:
    """(behavior, training seed, pairs) of a table of schema `pairs`; without `adapter` the source names it."""
    schema.check(pairs, "pairs")
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(adapter=pl.col("source"))
    for group in pairs.partition_by("behavior", "seed", maintain_order=True) if pairs.height else ():
        yield group["behavior"][0], group["seed"][0], _widen(group)


def _widen(group: pl.DataFrame) -> Leaks:
    layers = sorted(group["layer"].unique())
    base = group.unique(["adapter", "persona"], keep="first").sort("adapter", "persona")
    key = base.select("adapter", "persona").with_row_index("_row")
    row = group.join(key, on=["adapter", "persona"], how="left", maintain_order="left")["_row"].to_numpy()
    column = np.searchsorted(layers, group["layer"].to_numpy())
    x = {cosine: np.full((base.height, len(layers)), np.nan) for cosine in COSINES}
    for cosine, values in x.items():
        values[row, column] = ties.floats(group[f"cosine_{cosine}"])
    adapters = base.select("adapter", "source").unique(maintain_order=True).rows()
    code = {adapter: i for i, (adapter, _) in enumerate(adapters)}
    return Leaks(
        adapters,
        [code[name] for name in group["adapter"].unique(maintain_order=True)],
        layers,
        np.array([code[name] for name in base["adapter"]], dtype=np.int64),
        base["persona"].to_numpy(),
        np.array(base["category"].to_list(), dtype=object),
        x,
        _settled(ties.floats(base["rate"]), ties.floats(base["delta"])),
    )


def _settled(rate: np.ndarray, delta: np.ndarray) -> dict[str, np.ndarray]:
    """(n,) of each of YS. A table of another maker may hold deltas as differences of floats: their ties are made whole."""
    sizes = np.abs(np.concatenate([rate, rate - delta, delta]))
    scale = float(np.nanmax(sizes, initial=0.0)) if np.isfinite(sizes).any() else 0.0
    return {"rate": rate, "delta": ties.merged(delta, scale)}
