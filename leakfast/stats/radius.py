"""Leakage radius: how similar to the source a persona must be for the behavior to be at half of the source's. Demands pairs at
one layer a behavior, and rates with counts; loads no model.

    leakage(s) = b + (r − b) · σ(α + β s),  β ≥ 0;  radius = −α/β, where leakage is b + (r − b)/2

s: cosine to the source; r: the source's own rate; b: the bystanders' mean rate in the unadapted model (0 where that was not
measured; then the level is half of r). A logistic curve and not isotonic steps, because bootstrap intervals of an isotonic fit
are not consistent (Kosorok 2008, "Bootstrapping the Grenander estimator"; Sen, Banerjee, Woodroofe 2010, Annals of Statistics
38), and because a curve whose ends are known asks two numbers of some hundred personas. The steps' own crossing stands beside
it, `radius_isotonic`, as the check of the curve's form. Where there is leakage however far, the curve is too flat: a large gap
between the two says so, and the table `gradients` fits the far end too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import scipy  # loads its parts when they are used

from leakfast.stats import resample
from leakfast.storage.seeds import derive_seed

LEAST_RATE = 0.1  # a source that shows less of the behavior has no half worth finding
LEAST_PERSONAS = 10
REACHED, ABOVE, BELOW, SOURCE, FEW = "reached", "all above", "all below", "source below", "too few"
_KEYS = ["behavior", "seed", "source", "adapter", "layer"]
_VALUES = (
    "source_rate",
    "mean_baseline",
    "level",
    "radius",
    "radius_low",
    "radius_high",
    "share_inside",
    "share_inside_low",
    "share_inside_high",
    "radius_isotonic",
    "slope",
)
_METHOD = (
    "logistic curve between the bystanders' mean baseline and the source's rate, binomial quasi-likelihood; percentiles of "
    "a bootstrap over personas, and over the source's replies"
)
_UNIT = "persona, and reply of the source"


def table(
    pairs: pl.DataFrame,
    rates: pl.DataFrame,
    best: Mapping[str, tuple[str, int | None]],
    bootstraps: int,
    seed: int,
    workers: int | None = None,
) -> pl.DataFrame:
    """Table `radius`: a row an adapter, at its behavior's cosine and layer (`best`: behavior → (cosine, layer)).

    Estimand: the cosine at which the mean leakage over further personas of these kinds is half way from the baseline to the
    source's rate, this adapter and these questions being given. Resampling units: the persona, and the source's replies
    (taken as independent). Assumes that leakage rises with the cosine, and falls to the baseline far away. share_inside: of
    the bystanders, at the radius or nearer. status: reached; all above or all below (the curve crosses half outside the
    bystanders' cosines: radius null, everybody or nobody inside); source below (the source's rate is less than LEAST_RATE
    above the baseline); too few (fewer than LEAST_PERSONAS bystanders with a cosine). An end of the interval is null where
    2.5 % of the resamples or more have their radius beyond any cosine, said in ci_reason."""
    schema: dict[str, Any] = {
        **{name: pairs.schema.get(name, pl.String) for name in _KEYS},
        "cosine": pl.String,
        "n": pl.Int64,
        "status": pl.String,
        **dict.fromkeys(_VALUES, pl.Float64),
        **dict.fromkeys(("reason", "ci_reason"), pl.String),
        **dict.fromkeys(("bootstraps", "bootstrap_seed"), pl.Int64),
        **dict.fromkeys(("resampling_unit", "method"), pl.String),
    }
    if pairs.is_empty() or not {"hits", "total"} <= set(rates.columns):
        return pl.DataFrame(schema=schema)
    counted = rates.select("behavior", "adapter", "persona", "hits", "total", "baseline")
    joined = pairs.drop("hits", "total", "baseline", strict=False).join(
        counted, on=["behavior", "adapter", "persona"], how="left", maintain_order="left"
    )
    rows = []
    for group in joined.partition_by(_KEYS, maintain_order=True):
        key = {name: group[name][0] for name in _KEYS}
        cosine, layer = best.get(key["behavior"], ("centered", None))
        if layer is None or key["layer"] != layer:
            continue
        own = rates.filter(behavior=key["behavior"], adapter=key["adapter"], role="source")
        about = {"cosine": cosine, "resampling_unit": _UNIT, "method": _METHOD}
        rows.append({**key, **about, **of_adapter(group, own, cosine, (bootstraps, seed, workers))})
    return pl.DataFrame(rows, schema=schema)


def of_adapter(
    group: pl.DataFrame, own: pl.DataFrame, cosine: str, draws: tuple[int, int, int | None]
) -> dict[str, Any]:
    """A row of `table` without its key. group: pairs of one adapter and layer with hits, total, baseline; own: the source's."""
    kept = group.filter(pl.col(f"cosine_{cosine}").is_not_null() & (pl.col("total") > 0))
    if own.is_empty() or own["total"][0] in (None, 0):
        return {"n": kept.height, "reason": "the source's own rate was not counted"}
    source = float(own["hits"][0] / own["total"][0])
    before = kept["baseline"].mean()
    floor = 0.0 if before is None else float(before)  # type: ignore[arg-type]
    told: dict[str, Any] = {"n": kept.height, "source_rate": source, "mean_baseline": before}
    if source < floor + LEAST_RATE:
        said = f"the source's rate is less than {LEAST_RATE:g} above the bystanders' baseline"
        return {**told, "status": SOURCE, "reason": said}
    told["level"] = (floor + source) / 2
    if kept.height < LEAST_PERSONAS:
        return {**told, "status": FEW, "reason": f"fewer than {LEAST_PERSONAS} bystanders with a cosine"}
    data = [kept[name].to_numpy().astype(np.float64) for name in (f"cosine_{cosine}", "hits", "total")]
    bootstraps, seed, workers = draws
    its = derive_seed("radius", seed, *(group[name][0] for name in _KEYS))
    replies = (int(own["hits"][0]), int(own["total"][0]))
    found = radius(*data, floor, replies, bootstraps, its, workers)
    return {**told, **found, "bootstraps": bootstraps, "bootstrap_seed": seed}


def radius(
    similarity: np.ndarray,
    hits: np.ndarray,
    total: np.ndarray,
    floor: float,
    source: tuple[int, int],
    bootstraps: int,
    seed: int,
    workers: int | None = None,
) -> dict[str, Any]:
    """status, radius, share_inside, their ends, radius_isotonic, slope (β), reason, ci_reason of one adapter.

    similarity, hits, total: (n,) of the bystanders; floor: the curve's far end; source: (hits, replies) of the source, whose
    rate, above the floor, is its near end. The same seed gives the same bits, whatever the threads. See `table`."""
    from leakfast.stats import radius_fits

    ends = floor, source[0] / source[1]
    if not ends[0] < ends[1]:
        raise ValueError(f"the curve's ends must rise, not {ends}")
    middle, spread = float(similarity.mean()), float(similarity.std()) if np.ptp(similarity) else 1.0
    s, y, weight = (similarity - middle) / spread, hits / total, total / total.mean()
    both = np.array(ends, np.float64)
    _, beta = radius_fits.fit(s, y, weight, both)
    at = float(radius_fits.midpoint(s, y, weight, both)) * spread + middle
    drawn = np.empty((bootstraps, 2))

    def part(first: int, count: int) -> None:
        its = drawn[first : first + count]
        radius_fits.resampled(s, y, weight, both, source, resample.word(seed), first, its)

    if bootstraps:
        resample.spread(part, bootstraps, workers, 20 * len(s))
    status = ABOVE if at <= similarity.min() else BELOW if at > similarity.max() else REACHED
    drew = bootstraps >= 2
    low, high = _ends(drawn[:, 0] * spread + middle) if drew else (None, None)
    share_low, share_high = _ends(drawn[:, 1]) if drew else (None, None)
    open_ends = [name for name, end in (("low", low), ("high", high)) if end is None or not -1 <= end <= 1]
    unknown = (
        f"2.5 % of the resamples or more have no radius: {', '.join(open_ends)}"
        if drew
        else "no bootstrap was asked for"
    )
    return {
        "status": status,
        "radius": at if status == REACHED else None,
        "radius_low": None if "low" in open_ends else low,
        "radius_high": None if "high" in open_ends else high,
        "share_inside": float((similarity >= at).mean()),
        "share_inside_low": share_low,
        "share_inside_high": share_high,
        "radius_isotonic": _crossing(similarity, y, total, (ends[0] + ends[1]) / 2),
        "slope": float(beta) / spread if beta > 0 else 0.0,
        "reason": None if status == REACHED else f"the curve is {status[4:]} half at the bystanders' cosines",
        "ci_reason": unknown if open_ends else None,
    }


def _ends(values: np.ndarray) -> tuple[float, float]:
    """2.5 % and 97.5 %, each a value that was drawn, the outer one of two: infinities have no middle."""
    order = np.sort(values)
    last = len(order) - 1
    return float(order[int(np.floor(0.025 * last))]), float(order[int(np.ceil(0.975 * last))])


def _crossing(similarity: np.ndarray, y: np.ndarray, weight: np.ndarray, level: float) -> float | None:
    """The smallest similarity at which rising isotonic steps are at the level or above; None where that is the first of
    all, or none."""
    order = np.argsort(similarity, kind="stable")
    steps = scipy.optimize.isotonic_regression(y[order], weights=weight[order], increasing=True).x
    first = int(np.argmax(steps >= level))
    return float(similarity[order][first]) if steps[first] >= level and first else None
