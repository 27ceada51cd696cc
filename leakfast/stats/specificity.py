"""Is it the cosine to *this* source that orders leakage, or would another persona's do as well? Every other persona is put
in the source's place. Demands pairs and the centroids of the base model; leaves p-values of shuffles to `correlations`.

A shuffle of personas takes them as exchangeable, which they are not: their centroids lie in a few dimensions, and leakage
along any direction of these is correlated with the cosine to most personas. Here the personas stay where they are and the
source moves: with P candidates, p_source is the share of them, the source among them, whose |ρ| with the source's leakage
is at least as large. Under the null hypothesis that the source was drawn from the P personas independently of the pattern
of leakage, whatever its direction, p_source is uniform on 1/P … 1 but for ties, which make it larger."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import comb, factorial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import scipy  # loads its parts when they are used
from scipy.special import ndtr

from leakfast.stats import intervals, resample, ties
from leakfast.stats.correlations import COSINES, MIN_BOOTSTRAP, MIN_PAIRS, POOLED, YS
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids

_METHOD = "every persona in the source's place, by |ρ|; percentile bootstrap over personas of the difference"
_METHOD_POOLED = "sum of the sources' p_source, against sums of uniforms (Edgington)"
_KEYS = ("behavior", "seed", "source", "adapter")
COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("behavior", "source", "adapter"), pl.String),
    "seed": pl.Int64,
    "layer": pl.Int32,
    "cosine": pl.String,
    "y": pl.String,
    "n": pl.Int64,
    "spearman": pl.Float64,
    "candidates": pl.Int64,
    "rank": pl.Float64,
    "p_source": pl.Float64,
    "p_source_max": pl.Float64,
    "layers_tested": pl.Int64,
    "rank_signed": pl.Float64,
    "p_source_signed": pl.Float64,
    "unrelated": pl.Int64,
    "rank_unrelated": pl.Float64,
    "p_source_unrelated": pl.Float64,
    "best_other": pl.String,
    "best_other_spearman": pl.Float64,
    "best_other_related": pl.Boolean,
    "difference": pl.Float64,
    "difference_low": pl.Float64,
    "difference_high": pl.Float64,
    "reason": pl.String,
    "ci_reason": pl.String,
    "bootstraps": pl.Int64,
    "bootstrap_seed": pl.Int64,
    "resampling_unit": pl.String,
    "method": pl.String,
}


@dataclass(frozen=True)
class Draws:
    """How many resamples of the difference's interval, from which seed, by how many threads."""

    bootstraps: int
    seed: int
    workers: int | None


def table(
    pairs: pl.DataFrame,
    centroids: Centroids,
    related_to: Mapping[str, Collection[str]],
    bootstraps: int,
    seed: int = 0,
    workers: int | None = None,
) -> pl.DataFrame:
    """A row per adapter (and `pooled` over the sources of a training seed), layer, cosine and y; columns COLUMNS.

    Candidates are the source and its bystanders that have a centroid. A candidate's ρ is taken over the source's
    bystanders but itself. `rank` 1 is the largest |ρ|; equal ones count as larger. `rank_signed`: by ρ, the largest first.
    `rank_unrelated`: among the source and candidates that `related_to` does not tie to it, either way round.
    `p_source_max` sets |ρ| against each candidate's largest over the layers: it pays for picking one. `best_other`: the
    candidate beside the source with the largest |ρ|; `difference`: |ρ| of the source less its, over the bystanders that
    both have, with a 95 % interval over personas (the other candidate stays the same in all resamples, so the pick is not
    paid for). Pooled: means over the sources, and p from the sum of their p, which takes the sources as drawn
    independently (without replacement it is, if anything, too large)."""
    draws, rows = Draws(bootstraps, seed, workers), []
    near = cache(centroids.cosine)  # the same for all adapters
    for group in pairs.partition_by(*_KEYS, maintain_order=True):
        rows += _one_adapter(group, centroids, near, related_to, draws)
    singles = pl.DataFrame(rows, schema=COLUMNS)
    return pl.concat([singles, _pooled(singles)]) if singles.height else singles


def beside(summary: pl.DataFrame, table: pl.DataFrame | None) -> pl.DataFrame:
    """`summary` (from `summary.summarize`) + rank, candidates, p_source, p_source_max; null where `table` has no row."""
    table = pl.DataFrame(schema=COLUMNS) if table is None else table
    key = [*_KEYS, "layer", "cosine", "y"]
    ours = table.select(*key, "rank", "candidates", "p_source", "p_source_max")
    return summary.join(ours, on=key, how="left", nulls_equal=True, maintain_order="left")


def place(rank: float | None, of: int | None) -> str | None:
    """A rank in words: 3 of 111; a mean of ranks with one digit."""
    if rank is None:
        return None
    return f"{rank:.0f} of {of}" if rank == int(rank) else f"{rank:.1f} of {of}"


def candidate_rhos(cosines: np.ndarray, y: np.ndarray, source: int) -> np.ndarray:
    """(P,) Spearman's ρ of y with the cosines to each of P candidates, over all personas but the source and the candidate.

    cosines: (P, P) finite; y: (P,), the source's own is not read. Equal to scipy.stats.spearmanr candidate by candidate;
    NaN where a side does not vary."""
    return rank_rhos(ranks_without(cosines, source), ranks_without(np.broadcast_to(y, cosines.shape), source))


def ranks_without(values: np.ndarray, source: int) -> np.ndarray:
    """(P, P) centered average ranks of each row over all but the source's column and the diagonal, which are 0."""
    left_out = np.eye(len(values), dtype=bool)
    left_out[:, source] = True
    ranks = scipy.stats.rankdata(np.where(left_out, -np.inf, values), axis=1)
    n = (~left_out).sum(1, keepdims=True)
    return np.where(left_out, 0.0, ranks - (len(values) - n) - (n + 1) / 2)


def rank_rhos(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of centered ranks along the last axis, NaN where a side does not vary."""
    length = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.where(length > 0, np.clip((x * y).sum(-1) / length, -1, 1), np.nan)


def _one_adapter(
    group: pl.DataFrame,
    centroids: Centroids,
    near: Callable[..., np.ndarray],
    related_to: Mapping[str, Collection[str]],
    draws: Draws,
) -> Iterator[dict]:
    key = {name: group[name][0] for name in _KEYS}
    source = key["source"]
    people = group.unique("persona", maintain_order=True).sort("persona")
    for y_name in YS:
        value = ties.floats(people[y_name])
        known = np.isfinite(value) & np.array([name in centroids.personas for name in people["persona"]])
        names = [source, *people["persona"].filter(pl.Series(known))]
        y = np.concatenate([[0.0], value[known]])
        for cosine in COSINES:
            cells = {
                layer: _cell(centroids, near, (layer, cosine), names, y)
                for layer in _layers(group, centroids)
            }
            tops = _tops([cell for cell in cells.values() if not isinstance(cell, str)])
            for layer, cell in cells.items():
                told = {**key, "layer": layer, "cosine": cosine, "y": y_name, "method": _METHOD}
                if isinstance(cell, str):
                    yield {**told, "n": len(names) - 1, "reason": cell, "ci_reason": cell}
                    continue
                told |= _ranked(cell, _tied(source, cell.names, related_to))
                told |= {
                    "p_source_max": float(_at_least(tops, abs(cell.rho[0])).mean()),
                    "layers_tested": sum(not isinstance(one, str) for one in cells.values()),
                }
                yield told | _difference(cell, draws, (*key.values(), y_name))


def _layers(group: pl.DataFrame, centroids: Centroids) -> list[int]:
    return [layer for layer in sorted(group["layer"].unique()) if layer in centroids.layers]


@dataclass(frozen=True)
class _Cell:
    """A layer and cosine: candidates by name, the source first; their cosines (P, P), y (P,), ρ (P,)."""

    names: list[str]
    cosines: np.ndarray
    y: np.ndarray
    rho: np.ndarray


def _cell(
    centroids: Centroids,
    near: Callable[..., np.ndarray],
    at: tuple[int, str],
    names: list[str],
    y: np.ndarray,
) -> _Cell | str:
    """The candidates' ρ at a layer of a cosine, or why there is none."""
    layer, cosine = at
    if names[0] not in centroids.personas:
        return "the source has no centroid"
    if cosine == "centered" and len(centroids.metadata["centered_on"]) < 2:
        return "no mean to take away"
    rows = [centroids.personas.index(name) for name in names]
    whole = near(layer, cosine)[np.ix_(rows, rows)]
    kept = np.isfinite(np.diag(whole))
    if not kept[0]:
        return "the source's centroid has no direction"
    if kept.sum() - 1 < MIN_PAIRS + 1:
        return f"{kept.sum() - 1} bystanders with both values; at least {MIN_PAIRS + 1} are needed"
    whole, y = whole[np.ix_(kept, kept)], y[kept]
    rho = candidate_rhos(whole, y, 0)
    if not np.isfinite(rho[0]):
        return "the cosine or the rate is the same for all bystanders"
    return _Cell([name for name, one in zip(names, kept, strict=True) if one], whole, y, rho)


def _tops(cells: list[_Cell]) -> np.ndarray:
    """(P,) each candidate's largest |ρ| over the layers."""
    tops: dict[str, float] = {}
    for cell in cells:
        for name, rho in zip(cell.names, np.abs(np.nan_to_num(cell.rho)), strict=True):
            tops[name] = max(tops.get(name, 0.0), rho)
    return np.array(list(tops.values()))


def _ranked(cell: _Cell, tied: np.ndarray) -> dict[str, Any]:
    """The source's places at one layer. tied: (P,) whether a candidate is related to the source."""
    size, own = np.abs(np.nan_to_num(cell.rho)), abs(cell.rho[0])
    as_large = _at_least(size, own)
    signed = _at_least(np.nan_to_num(cell.rho, nan=-1.0), cell.rho[0])
    count, free = len(size), ~tied
    best = 1 + int(np.argmax(size[1:]))
    return {
        "n": count - 1,
        "spearman": float(cell.rho[0]),
        "candidates": count,
        "rank": float(as_large.sum()),
        "p_source": float(as_large.mean()),
        "rank_signed": float(signed.sum()),
        "p_source_signed": float(signed.mean()),
        "unrelated": int(free.sum()),
        "rank_unrelated": float(as_large[free].sum()),
        "p_source_unrelated": float(as_large[free].mean()),
        "best_other": cell.names[best],
        "best_other_spearman": float(cell.rho[best]),
        "best_other_related": bool(tied[best]),
    }


def _at_least(values: np.ndarray, own: float) -> np.ndarray:
    """Which are no smaller than `own` but for rounding."""
    return values >= own - 1e-12


def _tied(source: str, names: list[str], related_to: Mapping[str, Collection[str]]) -> np.ndarray:
    """(P,) whether each candidate's entry names the source, or the source's names it; False for the source itself."""
    of_source = related_to.get(source, ())
    return np.array(
        [name != source and (name in of_source or source in related_to.get(name, ())) for name in names]
    )


def _difference(cell: _Cell, draws: Draws, scope: tuple) -> dict[str, Any]:
    """|ρ| of the source less that of the best other candidate, over bystanders that both have."""
    size = np.abs(np.nan_to_num(cell.rho))
    best = 1 + int(np.argmax(size[1:]))
    both = np.ones(len(size), dtype=bool)
    both[[0, best]] = False
    x, y = cell.cosines[[0, best]][:, both], cell.y[both]
    ranks = scipy.stats.rankdata(np.vstack([x, y]), axis=1) - (both.sum() + 1) / 2
    rho = rank_rhos(ranks[:2], ranks[2])
    signs = np.where(rho < 0, -1.0, 1.0)
    if not np.isfinite(rho).all():
        return {"ci_reason": "over the bystanders that both have, a side does not vary"}
    out: dict[str, Any] = {"difference": float(abs(rho[0]) - abs(rho[1]))}
    if draws.bootstraps < 2 or both.sum() < MIN_BOOTSTRAP:
        few = f"{both.sum()} bystanders; a bootstrap needs at least {MIN_BOOTSTRAP}"
        return {**out, "ci_reason": "no bootstrap was asked for" if draws.bootstraps < 2 else few}
    seed = derive_seed("specificity", draws.seed, *scope)
    drawn = resample.bootstrap_spearman(x, y, draws.bootstraps, seed, workers=draws.workers)
    drawn = (drawn * signs) @ np.array([[1.0], [-1.0]])
    if np.isnan(drawn).mean() > intervals.TOO_FEW_DRAWS:
        return {**out, "ci_reason": "too many resamples do not vary"}
    low, high = intervals.percentiles(drawn)
    told = {"bootstraps": draws.bootstraps, "bootstrap_seed": seed, "resampling_unit": "persona"}
    return {**out, "difference_low": float(low[0]), "difference_high": float(high[0]), **told}


def _pooled(singles: pl.DataFrame) -> pl.DataFrame:
    """The sources of a training seed together; none where there is one adapter, or a source has several."""
    rows = []
    key = ["behavior", "seed", "layer", "cosine", "y"]
    for names, group in singles.group_by(key, maintain_order=True):
        if group.height < 2 or group["source"].n_unique() < group.height:
            continue
        told = {
            **dict(zip(key, names, strict=True)),
            "source": POOLED,
            "adapter": None,
            "n": group["n"].sum(),
        }
        lacking = group.filter(pl.col("p_source").is_null())
        if lacking.height:
            why = f"no value for {', '.join(lacking['source'])}"
            rows.append({**told, "reason": why, "ci_reason": why})
            continue
        means = {name: group[name].mean() for name in ("spearman", "rank", "rank_signed", "rank_unrelated")}
        ps = ("p_source", "p_source_max", "p_source_signed", "p_source_unrelated")
        rows.append(
            {
                **told,
                **means,
                **{name: edgington(group[name].to_numpy()) for name in ps},
                "candidates": group["candidates"].min(),
                "unrelated": group["unrelated"].min(),
                "layers_tested": group["layers_tested"].min(),
                "ci_reason": "the best other persona is another one for each source",
                "method": _METHOD_POOLED,
            }
        )
    return pl.DataFrame(rows, schema=COLUMNS)


def edgington(p: np.ndarray) -> float:
    """P(U₁ + … + U_k ≤ Σ p) of k ≥ 1 independent uniforms on 0–1 (Edgington 1972): one p of k independent ones. From 21
    on by the normal distribution of that mean and variance, since the alternating sum loses its digits in float64."""
    k, total = len(p), float(np.sum(p))
    if k > 20:
        return float(ndtr((total - k / 2) / np.sqrt(k / 12)))
    terms = ((-1) ** j * comb(k, j) * (total - j) ** k for j in range(int(min(total, k)) + 1))
    return float(min(1.0, max(0.0, sum(terms) / factorial(k))))
