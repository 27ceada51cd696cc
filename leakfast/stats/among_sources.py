"""Rank and p_source where no centroids are known, among the sources alone: each source's cosines are put in the place of every
other's. Demands pairs of several sources; leaves the test among all personas to `specificity`, whose columns these are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl

from leakfast.stats import specificity, ties
from leakfast.stats.association import spearman_and_pearson
from leakfast.stats.correlations import COSINES, MIN_PAIRS, YS

_METHOD = "every source in the source's place, by |ρ|; percentile bootstrap over personas of the difference"
_KEYS = ("behavior", "seed", "source", "adapter")


def table(
    pairs: pl.DataFrame,
    related_to: Mapping[str, Collection[str]],
    bootstraps: int,
    seed: int = 0,
    workers: int | None = None,
) -> pl.DataFrame:
    """Columns of `specificity.table`, whose candidates are the sources with pairs at that layer, not all personas.

    A candidate's ρ is that of its own cosines with the source's leakage, over the source's bystanders but the candidate.
    Under the null hypothesis that leakage follows some direction, whatever it is, and that which source it is
    has nothing to do with it, p_source of S sources is uniform on 1/S … 1: with 5 sources none is below 0.2, and the pooled p
    (Edgington) is 1/120 where each source ranks first. Assumes that the sources are alike before the data:
    they are few, and were chosen, not drawn. Raises nothing; a source alone has a reason in place of a rank."""
    draws, rows = specificity.Draws(bootstraps, seed, workers), []
    for whole in pairs.partition_by("behavior", "seed", maintain_order=True):
        near = {
            (layer, cosine): whole.filter(layer=layer)
            .unique(["source", "persona"])
            .drop_nulls(f"cosine_{cosine}")
            .select("source", "persona", f"cosine_{cosine}")
            .rows()
            for layer in sorted(whole["layer"].unique())
            for cosine in COSINES
        }
        for group in whole.partition_by("adapter", maintain_order=True):
            rows += _one_adapter(group, near, related_to, draws)
    singles = pl.DataFrame(rows, schema=specificity.COLUMNS)
    return pl.concat([singles, specificity.pooled(singles)]) if singles.height else singles


def _one_adapter(
    group: pl.DataFrame,
    near: Mapping[tuple[int, str], list[tuple[str, str, float]]],
    related_to: Mapping[str, Collection[str]],
    draws: specificity.Draws,
) -> Iterator[dict]:
    key = {name: group[name][0] for name in _KEYS}
    people = group.unique("persona").sort("persona")
    layers = sorted(group["layer"].unique())
    for y_name in YS:
        y = ties.floats(people[y_name])
        for cosine in COSINES:
            cells = {
                layer: _cell(near[layer, cosine], key["source"], people["persona"].to_list(), y)
                for layer in layers
            }
            known = [cell for cell in cells.values() if not isinstance(cell, str)]
            tops = specificity.largest(known)
            for layer, cell in cells.items():
                told = {**key, "layer": layer, "cosine": cosine, "y": y_name, "method": _METHOD}
                if isinstance(cell, str):
                    yield {**told, "n": int(np.isfinite(y).sum()), "reason": cell, "ci_reason": cell}
                    continue
                tied = specificity.are_related(key["source"], cell.names, related_to)
                told |= specificity.ranked(cell, tied)
                usable = np.isfinite(cell.cosines) & np.isfinite(cell.y)  # to the source, to the best other
                told |= {
                    "n": int(usable[0].sum()),
                    "p_source_max": float(specificity.at_least(tops, abs(cell.rho[0])).mean()),
                    "layers_tested": len(known),
                }
                both = usable.all(0)
                sides = cell.cosines[None][:, :, both], cell.y[None, both]
                yield told | specificity.differences_of(*sides, draws, (*key.values(), y_name))[0]


def _cell(
    near: list[tuple[str, str, float]], source: str, people: list[str], y: np.ndarray
) -> specificity.Cell | str:
    """Candidates by name, the source first; cosines (2, P) to the bystanders are NaN where not known."""
    names = [source, *sorted({name for name, _, _ in near} - {source})]
    if len(names) < 2:
        return "no centroids, and no other source with cosines to put in the source's place"
    cosines = np.full((len(names), len(people)), np.nan)
    row, column = ({name: k for k, name in enumerate(side)} for side in (names, people))
    for name, persona, value in near:
        if persona in column:
            cosines[row[name], column[persona]] = value
    rho: list[Any] = []
    for values in cosines:
        both = np.isfinite(values) & np.isfinite(y)
        if both.sum() < MIN_PAIRS:
            return f"{both.sum()} bystanders with both values; at least {MIN_PAIRS} are needed"
        rho.append(spearman_and_pearson(values[both][:, None], y[both])[0][0])
    if not np.isfinite(rho[0]):
        return "the cosine or the rate is the same for all bystanders"
    best = 1 + int(np.argmax(np.abs(np.nan_to_num(rho[1:]))))
    return specificity.Cell(names, y, np.array(rho), best, cosines[[0, best]])
