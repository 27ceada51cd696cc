"""ρ at a layer that was picked because its |ρ| is the largest: an interval that pays for the pick, and ρ of questions that
the pick has not seen. Demands pairs and counts per question; p that pays for it stands in `correlations` (p_max)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from leakfast.stats import intervals, resample, ties
from leakfast.stats.association import unit, within
from leakfast.stats.correlations import COSINES, MIN_BOOTSTRAP, POOLED, YS
from leakfast.stats.ranking import average_ranks
from leakfast.stats.rates import BASE
from leakfast.stats.two_way import counts_table
from leakfast.storage.seeds import derive_seed

SPLITS = 20
_METHOD = "optimism of the pick from a bootstrap over personas; layer picked on half of the questions, ρ on the other"
COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("behavior", "source", "adapter"), pl.String),
    "seed": pl.Int64,
    "cosine": pl.String,
    "y": pl.String,
    "layer": pl.Int32,
    "layers_tested": pl.Int64,
    "n": pl.Int64,
    "spearman": pl.Float64,
    "optimism": pl.Float64,
    "picked_low": pl.Float64,
    "picked_high": pl.Float64,
    "cross_fitted": pl.Float64,
    "cross_fitted_layer": pl.Int32,
    "cross_fitted_share": pl.Float64,
    "questions": pl.Int64,
    "reason": pl.String,
    "cross_fitted_reason": pl.String,
    "bootstraps": pl.Int64,
    "bootstrap_seed": pl.Int64,
    "resampling_unit": pl.String,
    "method": pl.String,
}


def table(
    pairs: pl.DataFrame, questions: pl.DataFrame, bootstraps: int, seed: int = 0, workers: int | None = None
) -> pl.DataFrame:
    """A row per behavior, training seed, source (and pooled), cosine and y, where there are several layers.

    `layer`: the one with the largest |ρ| of this row. Interval: with L* the layer that a resample of personas would pick,
    the spread of atanh ρ*(L*) − atanh ρ(L*) is taken off atanh ρ, so that what a pick adds is paid for; `optimism` is its
    mean, in ρ. Estimand: ρ over personas of this kind at the layer that was picked. `cross_fitted`: the layer is picked on
    a random half of the questions and ρ taken on the other, both ways, the mean over SPLITS halvings; `cross_fitted_layer`
    the one picked most, in `cross_fitted_share` of them. It rests on half of the questions and is smaller for that too."""
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(adapter=pl.col("source"))
    rows: list[dict] = []
    for group in pairs.partition_by("behavior", "seed", maintain_order=True):
        if group["layer"].n_unique() < 2:
            continue
        scopes = [
            (adapter, source, group.filter(adapter=adapter))
            for adapter, source in group.select("adapter", "source").unique(maintain_order=True).rows()
        ]
        if len(scopes) > 1 and group["source"].n_unique() == len(scopes):
            scopes.append((None, POOLED, group))
        for adapter, source, part in scopes:
            told = {
                "behavior": group["behavior"][0],
                "seed": group["seed"][0],
                "source": source,
                "adapter": adapter,
            }
            rows += [
                told | row
                for row in _rows(part, questions, (bootstraps, seed, workers), tuple(told.values()))
            ]
    return pl.DataFrame(rows, schema=COLUMNS)


def _rows(part: pl.DataFrame, questions: pl.DataFrame, draws: tuple, scope: tuple) -> Iterator[dict]:
    bootstraps, seed, workers = draws
    layers = sorted(part["layer"].unique())
    one_each = part.unique(["adapter", "persona"]).sort("adapter", "persona")
    block = one_each["adapter"].rank("dense").to_numpy().astype(np.int64)
    asked: dict[tuple[bytes, str], list[tuple[np.ndarray, np.ndarray]] | str] = {}
    for cosine in COSINES:
        wide = part.pivot("layer", index=["adapter", "persona"], values=f"cosine_{cosine}").sort(
            "adapter", "persona"
        )
        x = np.column_stack([ties.floats(wide[str(layer)]) for layer in layers])
        for y_name in YS:
            y = ties.floats(one_each[y_name])
            told = {"cosine": cosine, "y": y_name, "layers_tested": len(layers), "method": _METHOD}
            rows = np.isfinite(x).all(1) & np.isfinite(y)
            if rows.sum() < MIN_BOOTSTRAP or np.ptp(y[rows]) == 0:
                why = f"{rows.sum()} pairs with all values, or all of one value; {MIN_BOOTSTRAP} are needed"
                yield told | {"n": int(rows.sum()), "reason": why, "cross_fitted_reason": why}
                continue
            inside, people = block[rows], one_each["persona"].to_numpy()[rows]
            xs, ys = _ranked(x[rows], inside), _ranked(y[rows][:, None], inside)
            rho = _rho(xs, ys)[:, 0]
            if np.isnan(rho).all():
                why = "no cosine varies"
                yield told | {"n": int(rows.sum()), "reason": why, "cross_fitted_reason": why}
                continue
            best = int(np.nanargmax(np.abs(rho)))
            told |= {"n": int(rows.sum()), "layer": layers[best], "spearman": float(rho[best])}
            drawn = derive_seed("picked", seed, *scope, cosine, y_name)
            told |= _paid(xs, ys[:, 0], rho, best, (people, bootstraps, drawn, workers))
            key = (rows.tobytes(), y_name)  # the same for both cosines
            if key not in asked:
                asked[key] = _counted(one_each.filter(pl.Series(rows)), questions, y_name)
            told |= _cross_fitted(xs, asked[key], (inside, layers, drawn))
            yield told


def _ranked(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    return average_ranks(within(values, block).T).T


def _rho(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(K, Q) correlations of the columns of x (n, K) and y (n, Q); NaN where one does not vary."""
    return _product(unit(x), unit(y))


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(x.T @ y, -1, 1)


def _paid(x: np.ndarray, y: np.ndarray, rho: np.ndarray, best: int, draws: tuple) -> dict[str, Any]:
    """The interval that has paid for picking `best`."""
    people, bootstraps, seed, workers = draws
    if bootstraps < 2:
        return {"reason": "no bootstrap was asked for"}
    drawn = resample.bootstrap_spearman(x.T, y, bootstraps, seed, person=people, workers=workers)
    known = ~np.isnan(drawn).all(1)
    if known.mean() < 1 - intervals.TOO_FEW_DRAWS or abs(rho[best]) >= 1:
        return {"reason": "too many resamples do not vary, or ρ is ±1"}
    drawn = drawn[known]
    again = np.nanargmax(np.abs(drawn), axis=1)
    found = drawn[np.arange(len(drawn)), again]
    sign = np.sign(rho[best])
    with np.errstate(divide="ignore"):
        apart = np.arctanh(sign * found) - np.arctanh(np.clip(sign * rho[again], -1, 1))
    apart = apart[np.isfinite(apart)]
    if len(apart) < (1 - intervals.TOO_FEW_DRAWS) * bootstraps:
        return {"reason": "too many resamples do not vary, or ρ is ±1"}
    z = np.arctanh(abs(rho[best]))
    low, high = np.quantile(apart, [0.025, 0.975])
    ends = sorted(float(sign * np.tanh(z - d)) for d in (low, high))
    return {
        "optimism": float(abs(rho[best]) - np.tanh(z - apart.mean())),
        "picked_low": ends[0],
        "picked_high": ends[1],
        "bootstraps": bootstraps,
        "bootstrap_seed": seed,
        "resampling_unit": "persona",
    }


def _counted(
    who: pl.DataFrame, questions: pl.DataFrame, y_name: str
) -> list[tuple[np.ndarray, np.ndarray]] | str:
    """Hits and totals (n, Q) of the rows `who` (adapter, persona), and of `delta` the base's too; or why there are none."""
    counts = questions.filter(behavior=who["behavior"][0]) if questions.height else questions
    numbers = sorted(counts["question"].unique()) if counts.height else []
    if len(numbers) < 4:
        return f"{len(numbers)} questions with counts; at least 4 are needed"
    tables = [counts_table(counts, who["adapter"], who["persona"], numbers)]
    if y_name == "delta":
        tables.append(counts_table(counts, [BASE] * who.height, who["persona"], numbers))
    return tables


def _cross_fitted(
    ranked: np.ndarray, tables: list[tuple[np.ndarray, np.ndarray]] | str, how: tuple
) -> dict[str, Any]:
    """ρ on the half of the questions that did not pick the layer. ranked (n, K): `_ranked` cosines."""
    if isinstance(tables, str):
        return {"cross_fitted_reason": tables}
    block, layers, seed = how
    rng, asked = np.random.Generator(np.random.PCG64(seed)), tables[0][0].shape[1]
    halves = []
    for _ in range(SPLITS):
        order = rng.permutation(asked)
        for half in (order[: len(order) // 2], order[len(order) // 2 :]):
            sums = [side[:, half].sum(1) for pair in tables for side in pair]
            with np.errstate(divide="ignore", invalid="ignore"):
                y = sums[0] / sums[1] if len(sums) == 2 else ties.difference(*sums)
            halves.append(y)
    if not np.isfinite(halves).all():
        return {"cross_fitted_reason": "some persona has no sample on half of the questions"}
    x, ys, values, picks = unit(ranked), _ranked(np.column_stack(halves), block), [], []
    for split in range(0, 2 * SPLITS, 2):
        rho = _product(x, unit(ys[:, split : split + 2]))
        for one, other in ((0, 1), (1, 0)):
            if not np.isnan(rho[:, one]).all():
                pick = int(np.nanargmax(np.abs(rho[:, one])))
                values.append(rho[pick, other])
                picks.append(pick)
    values = [value for value in values if np.isfinite(value)]
    if len(values) < SPLITS:
        return {"cross_fitted_reason": "the rate on half of the questions is the same for all"}
    (pick, times), *_ = Counter(picks).most_common(1)
    return {
        "cross_fitted": float(np.mean(values)),
        "cross_fitted_layer": layers[pick],
        "cross_fitted_share": times / len(picks),
        "questions": asked,
    }
