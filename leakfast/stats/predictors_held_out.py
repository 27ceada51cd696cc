"""How well each predictor does on a source that nothing was learned from: each source in turn is left out, layer and fit come
from the others. Demands what `predictors.compared` lays out; leaves ρ at every layer to `predictors_skill`.

The fit is a binomial logistic curve of the rate on value × orientation, one intercept and one slope over the other sources'
bystanders: two parameters, sure of itself nowhere (no 0 or 1), and defined beyond the values it has seen. An isotonic step
curve says 0 or 1 at its ends, where one reply the other way makes the deviance infinite, and nothing beyond them; it stands in
the table `isotonic`, for display."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from scipy.special import expit, xlogy

from leakfast.stats import intervals, means, resample
from leakfast.stats.association import spearman_and_pearson
from leakfast.stats.correlations import MIN_BOOTSTRAP, MIN_PAIRS, POOLED
from leakfast.stats.paired import rho_difference
from leakfast.stats.predictors import HEAD, REFERENCE, Compared, told_of
from leakfast.storage.seeds import derive_seed

METHOD = "leave one source out; layer by mean ρ of the others; logistic fit; t over sources and personas"
_STEPS, _TOLERANCE = 50, 1e-10
_FLOATS = (
    "picked_by spearman spearman_low spearman_high difference difference_low difference_high deviance deviance_mean gain "
    "gain_low gain_high deviance_difference deviance_difference_low deviance_difference_high"
).split()
COLUMNS: dict[str, Any] = {
    **HEAD,
    "layers_tested": pl.Int64,
    "y": pl.String,
    "direction": pl.Int64,
    "n": pl.Int64,
    "sources": pl.Int64,
    **dict.fromkeys(_FLOATS, pl.Float64),
    **dict.fromkeys(("reason", "difference_reason", "deviance_reason"), pl.String),
    "bootstraps": pl.Int64,
    **dict.fromkeys(("resampling_unit", "method"), pl.String),
}


def table(
    parts: Iterable[Compared], bootstraps: int, seed: int = 0, workers: int | None = None
) -> pl.DataFrame:
    """A row per behavior, training seed, source left out (and `pooled`) and predictor, where two sources or more were trained.

    layer: of the predictor's layers the one with the largest |mean ρ| over the other sources (`picked_by`). spearman: ρ of
    the fit's prediction with the measured `y` of the source left out, negative where the others taught the wrong direction;
    95 % bootstrap over personas. deviance: of the prediction per completion, −2 log-likelihood above that of the measured
    rates; deviance_mean: of one rate for all, the other sources' mean; gain: deviance_mean − deviance, above 0 where the
    predictor helps. difference, deviance_difference: less those of the centered cosine, whose layer is picked the same way,
    over the bystanders that both have.

    pooled: means over the sources, with 95 % t intervals over other sources, personas and (for ρ) questions; estimand: the
    mean over sources like these. Variance S²/k + c as in `means`, c from leaving out each persona and question; of ρ on
    Fisher's z scale, of differences in ρ by the delta method. Fits are held as they are when personas are left out."""
    rows: list[dict] = []
    for made in parts:
        if made.one_each():
            rows += _rows(made, (bootstraps, seed, workers))
    return pl.DataFrame(rows, schema=COLUMNS)


@dataclass(frozen=True)
class _Left:
    """One source left out and one predictor: its column, the mean ρ it was picked by, the prediction of the rate (n,) of
    the adapter's rows (or any line that goes its way, where nothing was counted), NaN where the value is not known, and the
    other sources' mean rate."""

    column: int
    picked_by: float
    predicted: np.ndarray
    mean: float


def logistic(x: np.ndarray, hits: np.ndarray, total: np.ndarray) -> tuple[float, float] | None:
    """(intercept, slope) of the binomial logistic regression of hits among total on x, all (n,): the maximum of the
    likelihood by Newton's method. None where there is none: all or no hits, x that does not vary, or x that parts them."""
    share = hits.sum() / total.sum() if total.sum() > 0 else 0.0
    if not 0 < share < 1 or np.ptp(x) == 0:
        return None
    middle, scale = float(x.mean()), float(x.std())
    design = np.column_stack([np.ones(len(x)), (x - middle) / scale])
    beta = np.array([np.log(share / (1 - share)), 0.0])
    for _ in range(_STEPS):
        p = expit(design @ beta)
        weight = total * p * (1 - p)
        step = np.linalg.lstsq((design.T * weight) @ design, design.T @ (hits - total * p), rcond=None)[0]
        beta += step * min(1.0, 4.0 / max(1e-300, float(np.abs(step).max())))
        if np.abs(step).max() < _TOLERANCE:
            break
    else:
        return None
    return float(beta[0] - beta[1] * middle / scale), float(beta[1] / scale)


_NEAREST = float(np.finfo(np.float64).epsneg)  # 1.1e-16


def deviance(hits: np.ndarray, total: np.ndarray, p: np.ndarray | float) -> np.ndarray:
    """(n,) binomial deviance of each row: 2·[h·log(h / np) + (n − h)·log((n − h) / (n(1 − p)))], 0 < p < 1; a logistic curve
    that rounds to 0 or 1 is taken at the nearest number that float64 tells from 1, so that one reply the other way costs 73."""
    miss, p = total - hits, np.clip(p, _NEAREST, 1 - _NEAREST)
    fitted = xlogy(hits, total * p) + xlogy(miss, total * (1 - p))
    return 2 * (xlogy(hits, hits) + xlogy(miss, miss) - fitted)


def _rows(made: Compared, draws: tuple) -> Iterator[dict]:
    rho = np.array(
        [[_rho(made, s, column) for column in range(len(made.columns))] for s in range(len(made.adapters))]
    )
    left = {
        name: [_leave_out(made, s, own, rho) for s in range(len(made.adapters))] for name, own in _own(made)
    }
    bootstraps, seed, workers = draws
    each: dict[str, list[dict]] = {name: [] for name in left}
    for s in range(len(made.adapters)):
        drawn = derive_seed("predictors held out", seed, made.behavior, made.seed, made.adapters[s][0])
        for name, found in left.items():
            reference = left[REFERENCE][s] if REFERENCE in left else None
            each[name].append(_one(made, s, name, (found[s], reference), (bootstraps, drawn, workers)))
    pooled = _pooled(made, left, each, seed)
    for s in range(len(made.adapters)):
        yield from (each[name][s] for name in left)
    yield from pooled


def _own(made: Compared) -> list[tuple[str, list[int]]]:
    """Each predictor with its columns."""
    found: dict[str, list[int]] = {}
    for k, column in enumerate(made.columns):
        found.setdefault(column.predictor, []).append(k)
    return list(found.items())


def _leave_out(made: Compared, s: int, own: list[int], rho: np.ndarray) -> _Left | str:
    """What the other sources say of adapter s by the columns `own` of a predictor. rho: (adapters, columns)."""
    others = [k for k in range(len(made.adapters)) if k != s]
    rho = rho[np.ix_(others, own)]
    known = np.isfinite(rho).all(0)
    if not known.any():
        return "it does not vary over the bystanders of one of the other sources"
    mean = np.where(known, np.nan_to_num(rho).mean(0), 0.0)
    at = int(np.argmax(np.where(known, np.abs(mean), -1.0)))
    column, mine = own[at], made.adapter == s
    x, here = made.x[:, column], np.isfinite(made.x[:, column])
    rest, y = ~mine & here, made.direction * made.leak
    if np.isfinite(made.total[rest]).all():
        found = logistic(x[rest], made.hits[rest], made.total[rest])
        if found is None:
            return "no logistic curve fits the other sources: they show the behavior never, always, or parted by it"
        share = made.hits[rest].sum() / made.total[rest].sum()
        return _Left(column, float(mean[at]), expit(found[0] + found[1] * x[mine]), float(share))
    slope = np.polyfit(x[rest], y[rest], 1)
    return _Left(column, float(mean[at]), np.polyval(slope, x[mine]), float("nan"))


def _rho(made: Compared, s: int, column: int) -> float:
    mine = made.adapter == s
    x, y = made.x[mine, column], made.leak[mine]
    known = np.isfinite(x)
    rho = _of(x[known], y[known])
    return float("nan") if rho is None else rho


def _one(made: Compared, s: int, name: str, sides: tuple, draws: tuple) -> dict[str, Any]:
    """The row of a predictor and a source left out. sides: its own and the reference's."""
    (own, reference), (bootstraps, drawn, workers) = sides, draws
    adapter, source = made.adapters[s]
    row: dict[str, Any] = {**told_of(made), "source": source, "adapter": adapter, "predictor": name}
    row |= {"method": METHOD, "resampling_unit": "persona", "sources": len(made.adapters) - 1}
    columns = dict(_own(made))[name]
    row |= {"family": made.columns[columns[0]].family, "layers_tested": len(columns)}
    if isinstance(own, str):
        return row | {"reason": own, "difference_reason": own, "deviance_reason": own}
    mine = made.adapter == s
    y, known = made.direction * made.leak[mine], np.isfinite(own.predicted)
    row |= {"layer": made.columns[own.column].layer, "picked_by": own.picked_by, "n": int(known.sum())}
    rho = _of(own.predicted[known], y[known])
    if rho is None:
        row |= dict.fromkeys(
            ("reason", "difference_reason"), "the predictor or the leakage is the same for all"
        )
    else:
        row["spearman"] = rho
        if bootstraps > 1 and known.sum() >= MIN_BOOTSTRAP:
            found = resample.bootstrap_spearman(
                own.predicted[known][None], y[known], bootstraps, drawn, workers=workers
            )
            ends = intervals.of_spearman(found)
            row |= {
                "spearman_low": ends.get("spearman_ci_low"),
                "spearman_high": ends.get("spearman_ci_high"),
            }
            row["bootstraps"] = ends.get("bootstraps")
        row |= _apart(name, own, reference, y, made.persona[mine], draws)
    return row | _deviances(name, own, reference, made.hits[mine], made.total[mine])


def _of(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(y) < MIN_PAIRS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearman_and_pearson(x[:, None], y)[0][0])


_SELF = "it is what the others are compared with"


def _apart(name: str, own: _Left, reference, y: np.ndarray, people: np.ndarray, draws: tuple) -> dict:
    """ρ less that of the reference."""
    if name == REFERENCE or not isinstance(reference, _Left):
        return {"difference_reason": _SELF if name == REFERENCE else f"{REFERENCE} has no prediction"}
    both = np.isfinite(own.predicted) & np.isfinite(reference.predicted)
    sides = [(one.predicted[both], y[both]) for one in (own, reference)]
    names = pl.Series(people[both])
    bootstraps, drawn, workers = draws
    return rho_difference(sides, names, pl.Series(["one"] * len(names)), bootstraps, drawn, workers)


def _deviances(name: str, own: _Left, reference, hits: np.ndarray, total: np.ndarray) -> dict:
    """Deviances per completion, with t intervals over personas of their differences."""
    known = np.isfinite(own.predicted) & np.isfinite(total)
    if not known.any() or not 0 < own.mean < 1:
        return {"deviance_reason": "nothing was counted: the measured values are no shares"}
    h, n = hits[known], total[known]
    mine, plain = deviance(h, n, own.predicted[known]), deviance(h, n, own.mean)
    found = {"deviance": mine.sum() / n.sum(), "deviance_mean": plain.sum() / n.sum()}
    found |= dict(zip(("gain", "gain_low", "gain_high"), _ratio(plain - mine, n), strict=True))
    if name == REFERENCE or not isinstance(reference, _Left):
        return found | {"deviance_reason": _SELF if name == REFERENCE else None}
    both = known & np.isfinite(reference.predicted)
    part = deviance(hits[both], total[both], own.predicted[both])
    part = part - deviance(hits[both], total[both], reference.predicted[both])
    names = ("deviance_difference", "deviance_difference_low", "deviance_difference_high")
    return found | dict(zip(names, _ratio(part, total[both]), strict=True))


def _ratio(part: np.ndarray, total: np.ndarray) -> tuple[float, float | None, float | None]:
    """Σ part / Σ total and its t interval over the rows."""
    value = float(part.sum() / total.sum())
    if len(part) < 2:
        return value, None, None
    error = (part - value * total) * len(part) / total.sum()
    half = float(intervals.t_half(error.std(ddof=1) / np.sqrt(len(part)), len(part) - 1))
    return value, value - half, value + half


def _pooled(made: Compared, left: dict, each: dict[str, list[dict]], seed: int) -> Iterator[dict]:
    """A row a predictor: means over the sources left out."""
    people = sorted(set(made.persona))
    predicted, own, other = _side_by_side(made, left)
    parts = {
        adapter: means.Part(replace(made.asked[s], x=predicted[s]), people)
        for s, (adapter, _) in enumerate(made.adapters)
    }
    drawn = derive_seed("signs of cells", seed, made.behavior, made.seed)
    moved = means.errors_of(parts, {made.seed: list(parts)}, made.y, drawn)
    rho = np.array([_rhos(made, s, columns) for s, columns in enumerate(predicted)]).T
    apart = None if other is None else _less(moved, rho, (own, other), list(parts))
    for k, name in enumerate(left):
        row = {**each[name][0], "source": POOLED, "adapter": None, "layer": None, "sources": len(parts)}
        row |= dict.fromkeys(_FLOATS) | dict.fromkeys(("reason", "difference_reason", "deviance_reason"))
        row |= {"n": sum(one.get("n") or 0 for one in each[name]), "bootstraps": None}
        shared = moved.among(list(parts), k)
        row["resampling_unit"] = "source, persona" if shared.asked is None else "source, persona and question"
        with np.errstate(divide="ignore"):
            value = _over(np.arctanh(rho[k]), shared)
        row |= dict(zip(("spearman", "spearman_low", "spearman_high"), np.tanh(value), strict=True))
        if name == REFERENCE:
            row["difference_reason"] = _SELF
        elif apart is not None and other is not None:
            value = _over(rho[own[k]] - rho[other[k]], apart.among(list(parts), k))
            possible = np.clip(value, -2, 2)  # two sources alone give t quantiles of one degree of freedom
            row |= dict(zip(("difference", "difference_low", "difference_high"), possible, strict=True))
        row |= _pooled_deviances(made, each[name], left[name], left.get(REFERENCE), people)
        yield _told(row)


def _side_by_side(made: Compared, left: dict) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """(of each adapter its K predictors' predictions (n, K + E), NaN where not known; K columns that differences are of; K
    that they are less, None without a reference). Where a predictor and the reference are not known of the same bystanders,
    two of the E columns hold both over those that both have."""
    predicted = [
        np.column_stack(
            [
                one.predicted if isinstance(one, _Left) else np.full(int((made.adapter == s).sum()), np.nan)
                for one in some
            ]
        )
        for s, some in enumerate(zip(*left.values(), strict=True))
    ]
    names = list(left)
    own = np.arange(len(names))
    if REFERENCE not in names:
        return predicted, own, None
    at = names.index(REFERENCE)
    other = np.full(len(names), at)
    for k in range(len(names)):
        pairs = [columns[:, [k, at]] for columns in predicted]
        both = [np.isfinite(pair).all(1, keepdims=True) for pair in pairs]
        if any((np.isfinite(pair) != seen).any() for pair, seen in zip(pairs, both, strict=True)):
            own[k], other[k] = predicted[0].shape[1] + np.arange(2)
            for s, (pair, seen) in enumerate(zip(pairs, both, strict=True)):
                predicted[s] = np.column_stack([predicted[s], np.where(seen, pair, np.nan)])
    return predicted, own, other


def _rhos(made: Compared, s: int, predicted: np.ndarray) -> list[float]:
    """ρ of each column with what was measured of adapter s, NaN where there is none."""
    y, found = made.direction * made.leak[made.adapter == s], []
    for column in predicted.T:
        rho = _of(column[np.isfinite(column)], y[np.isfinite(column)])
        found.append(float("nan") if rho is None else rho)
    return found


def _told(row: dict) -> dict:
    """NaN as null, with a reason."""
    row = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
    why = "ρ of one of the sources is not defined, ±1, or without a difference"
    for value, reason in (("spearman", "reason"), ("difference", "difference_reason")):
        if row[value] is None and row[reason] is None:
            row[reason] = why
    if row["deviance"] is None:
        row["deviance_reason"] = "one of the sources has no deviance"
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()}


def _less(
    moved: means.Errors, rho: np.ndarray, columns: tuple[np.ndarray, np.ndarray], names: list[str]
) -> means.Errors:
    """How far ρ of the first columns less that of the second moves, to first order: dρ = (1 − ρ²) dz."""
    own, other = columns

    def apart(side: dict | None) -> dict | None:
        if side is None:
            return None
        steps = {name: (1 - rho[:, [s]] ** 2) * side[name] for s, name in enumerate(names)}
        with np.errstate(invalid="ignore"):  # errors of both may be infinite: their difference is not known
            return {name: step[own] - step[other] for name, step in steps.items()}

    personas = apart(moved.personas)
    assert personas is not None
    return means.Errors(personas, apart(moved.questions), apart(moved.cells), moved.asked)


def _over(values: np.ndarray, shared: Any) -> tuple[float, float, float]:
    """Mean over sources and its 95 % interval: S²/k + c, as `means` has it. NaN where a value or error is not known."""
    k = len(values)
    mean = float(values.mean())
    sides = (shared.personas, shared.questions, shared.cells)
    if k < 2 or not np.isfinite(mean) or not all(np.isfinite(side).all() for side in sides):
        return mean, float("nan"), float("nan")
    a, b, ab = (means.split(side)[1] for side in sides)
    c = max(a + b - ab, a, b, 0.0)
    df = (k - 1, min(shared.people, shared.asked or shared.people) - 1)
    half = means.half_width((float(values.var(ddof=1)) / k, c), df)
    return mean, mean - half, mean + half


def _pooled_deviances(
    made: Compared, rows: list[dict], own: list, reference: list | None, people: list[str]
) -> dict[str, Any]:
    """Means over sources of deviances per completion; of gain and difference with intervals over sources and personas."""
    if any(row.get("deviance") is None for row in rows):
        return {}
    found: dict[str, Any] = {
        name: float(np.mean([row[name] for row in rows])) for name in ("deviance", "deviance_mean")
    }
    place = {name: i for i, name in enumerate(people)}
    for key in ("gain", "deviance_difference"):
        values = np.array([row.get(key) for row in rows], dtype=float)
        if not np.isfinite(values).all():
            continue
        away = {}
        for s, (adapter, _) in enumerate(made.adapters):
            mine = made.adapter == s
            h, n, p = made.hits[mine], made.total[mine], own[s].predicted
            other = own[s].mean if key == "gain" or reference is None else reference[s].predicted
            part = (deviance(h, n, other) - deviance(h, n, p)) * (1 if key == "gain" else -1)
            known = np.isfinite(part)
            moved = np.zeros((1, len(people)))
            error = (part[known] - values[s] * n[known]) / n[known].sum()
            moved[0, [place[name] for name in made.persona[mine][known]]] = error
            away[adapter] = moved
        value = _over(values, means.Errors(away, None, None, None).among(list(away), 0))
        found |= dict(zip((key, f"{key}_low", f"{key}_high"), value, strict=True))
    return found | {"deviance_reason": _SELF if rows[0]["predictor"] == REFERENCE else None}
