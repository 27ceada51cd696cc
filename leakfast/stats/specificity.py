"""Is it the cosine to *this* source that orders leakage, or would another persona's do as well? Every other persona is put
in the source's place. Demands pairs and the centroids of the base model; leaves p-values of shuffles to `correlations`.

A shuffle of personas takes them as exchangeable, which they are not: their centroids lie in a few dimensions, and leakage
along any direction of these is correlated with the cosine to most personas. Here the personas stay where they are and the
source moves: with P candidates, p_source is the share of them, the source among them, whose |ρ| with the source's leakage
is at least as large. Under the null hypothesis that the source was drawn from the P personas independently of the pattern
of leakage, whatever its direction, p_source is uniform on 1/P … 1 but for ties, which make it larger."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from math import comb, factorial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy.special import ndtr

from leakfast.stats import intervals, resample, ties
from leakfast.stats.correlations import COSINES, MIN_BOOTSTRAP, MIN_PAIRS, POOLED, YS
from leakfast.stats.ranking import average_ranks
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids

_METHOD = "every persona in the source's place, by |ρ|; percentile bootstrap over personas of the difference"
_KEPT = 600  # rankings of cosines: 50 KB each with 112 personas
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
    geometry = _Geometry(centroids)
    for group in pairs.partition_by(*_KEYS, maintain_order=True):
        rows += _one_adapter(group, geometry, related_to, draws)
    singles = pl.DataFrame(rows, schema=COLUMNS)
    return pl.concat([singles, pooled(singles)]) if singles.height else singles


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
    ranks = average_ranks(np.where(left_out, -np.inf, values))
    n = (~left_out).sum(1, keepdims=True)
    return np.where(left_out, 0.0, ranks - (len(values) - n) - (n + 1) / 2)


def rank_rhos(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of centered ranks along the last axis, NaN where a side does not vary."""
    length = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    with np.errstate(invalid="ignore"):
        return np.where(length > 0, np.clip((x * y).sum(-1) / length, -1, 1), np.nan)


class _Geometry:
    """Cosines of all personas and their ranks, each made once: they are the same for every adapter of a source."""

    def __init__(self, centroids: Centroids) -> None:
        self.centroids = centroids
        self.cosine = cache(centroids.cosine)
        self.place = {name: i for i, name in enumerate(centroids.personas)}
        self.ranked = lru_cache(maxsize=_KEPT)(self._ranked)

    def _ranked(self, layer: int, cosine: str, rows: tuple[int, ...]) -> np.ndarray:
        """`ranks_without` the first of `rows` at a layer: (P, P); halves of whole numbers, so exact in float32."""
        return ranks_without(self.cosine(layer, cosine)[np.ix_(rows, rows)], 0).astype(np.float32)


def _one_adapter(
    group: pl.DataFrame, geometry: _Geometry, related_to: Mapping[str, Collection[str]], draws: Draws
) -> Iterator[dict]:
    key = {name: group[name][0] for name in _KEYS}
    source = key["source"]
    people = group.unique("persona", maintain_order=True).sort("persona")
    layers = [layer for layer in sorted(group["layer"].unique()) if layer in geometry.centroids.layers]
    made: dict[bytes, tuple[_Side, dict]] = {}  # a delta over a baseline of 0 is the rate
    for y_name in YS:
        value = ties.floats(people[y_name])
        known = np.isfinite(value) & np.array([name in geometry.place for name in people["persona"]])
        side = _Side(
            [source, *people["persona"].filter(pl.Series(known))], np.concatenate([[0.0], value[known]])
        )
        side, cells = made.setdefault(known.tobytes() + side.y.tobytes(), (side, {}))
        for cosine, layer in [] if cells else [(cosine, layer) for cosine in COSINES for layer in layers]:
            cells[cosine, layer] = _cell(geometry, layer, cosine, side)
        found = [cell for cell in cells.values() if not isinstance(cell, str)]
        differences = iter(_differences(found, draws, (*key.values(), y_name)))
        for cosine in COSINES:
            here = [cells[cosine, layer] for layer in layers]
            tops = largest([cell for cell in here if not isinstance(cell, str)])
            for layer, cell in zip(layers, here, strict=True):
                told = {**key, "layer": layer, "cosine": cosine, "y": y_name, "method": _METHOD}
                if isinstance(cell, str):
                    yield {**told, "n": len(side.names) - 1, "reason": cell, "ci_reason": cell}
                    continue
                told |= ranked(cell, are_related(source, cell.names, related_to))
                told |= {
                    "p_source_max": float(at_least(tops, abs(cell.rho[0])).mean()),
                    "layers_tested": sum(not isinstance(one, str) for one in here),
                }
                yield told | next(differences)


class _Side:
    """A y of one adapter: names, the source first, and values (P,), the source's own 0; its ranks without each candidate,
    made once for each set of personas."""

    def __init__(self, names: list[str], y: np.ndarray) -> None:
        self.names, self.y = names, y
        self._ranks: dict[bytes, np.ndarray] = {}

    def ranks(self, kept: np.ndarray) -> np.ndarray:
        """(P', P') `ranks_without` the source, of the personas `kept` (P,)."""
        if (key := kept.tobytes()) not in self._ranks:
            y = self.y[kept]
            self._ranks[key] = ranks_without(np.broadcast_to(y, (len(y), len(y))), 0)
        return self._ranks[key]


@dataclass(frozen=True)
class Cell:
    """A layer and cosine: candidates by name, the source first; y (P,), ρ (P,), the best candidate beside the source, and
    the cosines (2, P) to the source and to it."""

    names: list[str]
    y: np.ndarray
    rho: np.ndarray
    best: int
    cosines: np.ndarray


def _cell(geometry: _Geometry, layer: int, cosine: str, side: _Side) -> Cell | str:
    """The candidates' ρ at a layer of a cosine, or why there is none."""
    if side.names[0] not in geometry.place:
        return "the source has no centroid"
    if cosine == "centered" and len(geometry.centroids.metadata["centered_on"]) < 2:
        return "no mean to take away"
    near = geometry.cosine(layer, cosine)
    rows = np.array([geometry.place[name] for name in side.names])
    kept = np.isfinite(np.diagonal(near)[rows])
    if not kept[0]:
        return "the source's centroid has no direction"
    if kept.sum() - 1 < MIN_PAIRS + 1:
        return f"{kept.sum() - 1} bystanders with both values; at least {MIN_PAIRS + 1} are needed"
    rows = rows[kept]
    rho = rank_rhos(geometry.ranked(layer, cosine, tuple(rows.tolist())).astype(np.float64), side.ranks(kept))
    if not np.isfinite(rho[0]):
        return "the cosine or the rate is the same for all bystanders"
    best = 1 + int(np.argmax(np.abs(np.nan_to_num(rho[1:]))))
    names = [name for name, one in zip(side.names, kept, strict=True) if one]
    return Cell(names, side.y[kept], rho, best, near[rows[[0, best]]][:, rows])


def largest(cells: list[Cell]) -> np.ndarray:
    """(P,) each candidate's largest |ρ| over the layers."""
    tops: dict[str, float] = {}
    for cell in cells:
        for name, rho in zip(cell.names, np.abs(np.nan_to_num(cell.rho)), strict=True):
            tops[name] = max(tops.get(name, 0.0), rho)
    return np.array(list(tops.values()))


def ranked(cell: Cell, tied: np.ndarray) -> dict[str, Any]:
    """The source's places at one layer. tied: (P,) whether a candidate is related to the source."""
    size, own = np.abs(np.nan_to_num(cell.rho)), abs(cell.rho[0])
    as_large = at_least(size, own)
    signed = at_least(np.nan_to_num(cell.rho, nan=-1.0), cell.rho[0])
    count, free = len(size), ~tied
    best = cell.best
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


def at_least(values: np.ndarray, own: float) -> np.ndarray:
    """Which are no smaller than `own` but for rounding."""
    return values >= own - 1e-12


def are_related(source: str, names: list[str], related_to: Mapping[str, Collection[str]]) -> np.ndarray:
    """(P,) whether each candidate's entry names the source, or the source's names it; False for the source itself."""
    of_source = related_to.get(source, ())
    return np.array(
        [name != source and (name in of_source or source in related_to.get(name, ())) for name in names]
    )


def _differences(cells: list[Cell], draws: Draws, scope: tuple) -> list[dict[str, Any]]:
    """|ρ| of the source less that of the best other candidate, over bystanders that both have: of each cell. Cells of as
    many bystanders see the same resamples."""
    out: list[dict[str, Any]] = [{} for _ in cells]
    sides: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for k, cell in enumerate(cells):
        both = np.ones(len(cell.y), dtype=bool)
        both[[0, cell.best]] = False
        sides.setdefault(int(both.sum()), []).append((k, cell.cosines[:, both], cell.y[both]))
    for members in sides.values():
        x, y = (np.stack([member[i] for member in members]) for i in (1, 2))
        for (k, *_), told in zip(members, differences_of(x, y, draws, scope), strict=True):
            out[k] = told
    return out


def differences_of(x: np.ndarray, y: np.ndarray, draws: Draws, scope: tuple) -> list[dict[str, Any]]:
    """Of each cell |ρ| of y (cells, n) with x[:, 0] less that with x[:, 1], x (cells, 2, n), and its interval over personas."""
    ranks = [resample.ordered(one.reshape(-1, y.shape[1])).rank.reshape(one.shape) for one in (x, y)]
    rho = rank_rhos(ranks[0] / 2, ranks[1][:, None] / 2)
    told = _intervals(x, y, np.where(rho < 0, -1.0, 1.0), draws, scope)
    constant = {"ci_reason": "over the bystanders that both have, a side does not vary"}
    return [
        {"difference": float(abs(own[0]) - abs(own[1])), **interval} if np.isfinite(own).all() else constant
        for own, interval in zip(rho, told, strict=True)
    ]


def _intervals(
    x: np.ndarray, y: np.ndarray, signs: np.ndarray, draws: Draws, scope: tuple
) -> list[dict[str, Any]]:
    """Of the difference of each cell, x (cells, 2, n), y (cells, n), signs (cells, 2): its ends, or why there are none."""
    cells, _, n = x.shape
    if draws.bootstraps < 2 or n < MIN_BOOTSTRAP:
        few = f"{n} bystanders; a bootstrap needs at least {MIN_BOOTSTRAP}"
        return [{"ci_reason": "no bootstrap was asked for" if draws.bootstraps < 2 else few}] * cells
    seed = derive_seed("specificity", draws.seed, *scope)
    drawn = resample.bootstrap_each(x, y[:, None], draws.bootstraps, seed, workers=draws.workers)[:, :, 0]
    apart = drawn[:, :, 0] * signs[:, 0] - drawn[:, :, 1] * signs[:, 1]
    lost = np.isnan(apart).mean(0)
    low, high = intervals.percentiles(apart)
    told = {"bootstraps": draws.bootstraps, "bootstrap_seed": seed, "resampling_unit": "persona"}
    return [
        {"ci_reason": "too many resamples do not vary"}
        if lost[k] > intervals.TOO_FEW_DRAWS
        else {"difference_low": float(low[k]), "difference_high": float(high[k]), **told}
        for k in range(cells)
    ]


def pooled(singles: pl.DataFrame) -> pl.DataFrame:
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
