"""In which order a matrix shows its personas: by category, by how much they picked up, by where their centroids lie.
Demands a run's tables, and its centroids for the last."""

from __future__ import annotations

import polars as pl

from leakfast.behaviors.registry import sign_of
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run


def orders(run: Run, stats: Stats, personas: list[str]) -> dict[str, list[int]]:
    """Name of an order → places in `personas`. `category`: as the study lists them; `leakage`: most of the behaviors as
    a bystander first; `cluster`: near ones in the base model's geometry together (`persona_map.in_a_row`; absent where there
    are no centroids of every persona)."""
    out = {"category": _by_category(stats, personas), "leakage": _by_leakage(stats, personas)}
    leaves = _by_cluster(run, personas)
    if leaves is not None:
        out["cluster"] = leaves
    return out


def _by_category(stats: Stats, personas: list[str]) -> list[int]:
    told = dict(stats.rates.select("persona", "category").unique("persona", keep="first").rows())
    kinds = list(dict.fromkeys(told.get(name) for name in personas))
    return sorted(range(len(personas)), key=lambda at: kinds.index(told.get(personas[at])))


def _by_leakage(stats: Stats, personas: list[str]) -> list[int]:
    signs = {name: float(sign_of(name)) for name in stats.behaviors()}
    leaks = pl.col("rate") * pl.col("behavior").replace_strict(signs, default=1.0, return_dtype=pl.Float64)
    # of each behavior its own scale: shares and points are not added up
    scaled = leaks / pl.col("rate").abs().max().over("behavior").clip(lower_bound=1e-9)
    shown = stats.rates.filter(role="bystander").with_columns(rate=scaled)
    means = shown.group_by("persona", maintain_order=True).agg(pl.col("rate").mean())
    rate = {name: value for name, value in means.rows() if value is not None}
    return sorted(range(len(personas)), key=lambda at: (-rate.get(personas[at], -2.0), at))


def _by_cluster(run: Run, personas: list[str]) -> list[int] | None:
    from leakfast.geometry import Centroids
    from leakfast.stats.persona_map import in_a_row

    if len(personas) < 3 or not run.has(layout.centroids()):
        return None
    place = {name: at for at, name in enumerate(personas)}
    row = [place[name] for name in in_a_row(Centroids.load(run.path / layout.centroids())) if name in place]
    return row if len(row) == len(personas) else None
