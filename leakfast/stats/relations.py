"""Does what a bystander is to the sources (its category) predict leakage, and alike across behaviors? Mean change per
behavior and category, and rank correlations of these means between behaviors. Demands rates; knows no geometry."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations

import numpy as np
import polars as pl

from leakfast.behaviors.registry import get, is_known, sign_of
from leakfast.stats import intervals, resample
from leakfast.storage import schema
from leakfast.storage.seeds import derive_seed

SCOPES = ("all", "related")  # all pairs; those whose bystander's related_to names the source
MIN_CATEGORIES = 4
_ROUNDED = 1e-12  # of the largest mean: far above the rounding of a sum over personas, below one completion
_MEAN = "mean of personas' means over sources; t interval over personas"
_CROSSED = "permutations of categories and of personas; percentile bootstrap of personas within categories"


def categories(
    rates: pl.DataFrame, related_to: Mapping[str, Collection[str]], permutations: int, seed: int = 0
) -> pl.DataFrame:
    """Schema `relations`: one row per behavior, training seed, scope and category of bystanders.

    Estimand of `mean`: the mean Δ (y `delta`; the rate where no baseline was measured) of a further persona of the
    category, averaged over the sources it was met with, each the mean of its adapters; `low` to `high` is its 95 % t
    interval over personas, null for one persona. `direction`: the sign of Δ that is more of the behavior, −1 for accuracy
    and alignment. `explained`: share of the variance between personas that lies between categories (η²), with the p-value
    of shuffling personas over categories. Scope `related` keeps the pairs in which the category describes the bystander's
    relation to this very source; in `all` it describes the bystander, whatever the source."""
    rows = []
    for key, people in _people(rates, related_to):
        values, codes, kinds = _coded(people)
        explained, p = _explained(values, codes, permutations, derive_seed("categories", seed, *key.values()))
        for code, kind in enumerate(kinds):
            mine = values[codes == code]
            mean, low, high, why = intervals.of_mean(mine)
            own = people.filter(category=kind)
            rows.append(
                key
                | {
                    "category": kind,
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "personas": len(mine),
                    "pairs": int(own["n"].sum()),
                    "explained": explained,
                    "explained_p": p,
                    "permutations": permutations or None,
                    "resampling_unit": "persona",
                    "method": _MEAN,
                    "reason": why,
                }
            )
    columns = schema.columns("relations") | {"permutations": pl.Int64()}
    columns |= dict.fromkeys(("resampling_unit", "method", "reason"), pl.String())
    return schema.check(pl.DataFrame(rows, schema=columns), "relations")


def alike(
    rates: pl.DataFrame,
    related_to: Mapping[str, Collection[str]],
    permutations: int,
    bootstraps: int,
    seed: int = 0,
) -> pl.DataFrame:
    """Per scope, training seed and two behaviors: Spearman's ρ between their categories' mean leakage (Δ times
    `direction`), over the categories that both have.

    Two p-values answer two questions. `spearman_p_perm` shuffles one behavior's categories: would unrelated rankings
    of the categories agree this much? `spearman_p_grouping` shuffles the personas over the categories, alike for both
    behaviors: would any other grouping of these personas, who may leak in every behavior, agree this much? Whether
    categories matter at all within a behavior is `explained_p`. Interval: percentiles of a bootstrap of personas within
    categories, the same personas for both. Personas without both values are left out."""
    groups = list(_people(rates, related_to))
    rows = []
    for (key, one), (other_key, other) in combinations(groups, 2):
        if key["seed"] != other_key["seed"] or key["scope"] != other_key["scope"]:
            continue
        both = one.join(other.select("persona", _other=pl.col("mean")), on="persona").sort("persona")
        row = {name: key[name] for name in ("scope", "seed", "behavior")}
        row |= {"other_behavior": other_key["behavior"], "personas": both.height}
        row |= {"resampling_unit": "persona", "method": _CROSSED}
        values, codes, kinds = _coded(both)
        row["n"] = len(kinds)
        if len(kinds) < MIN_CATEGORIES:
            why = f"{len(kinds)} categories with both behaviors; at least {MIN_CATEGORIES} are needed"
            rows.append(row | {"reason": why})
            continue
        sides = np.stack([values * key["direction"], both["_other"].to_numpy() * other_key["direction"]])
        drawn = derive_seed("categories alike", seed, *(str(v) for v in row.values()))
        rows.append(row | _rank_correlation(sides, codes, len(kinds), permutations, bootstraps, drawn))
    columns = {"scope": pl.String, "seed": pl.Int64, "behavior": pl.String, "other_behavior": pl.String}
    values = "spearman spearman_ci_low spearman_ci_high spearman_p_perm spearman_p_grouping"
    columns |= dict.fromkeys(("n", "personas"), pl.Int64) | dict.fromkeys(values.split(), pl.Float64)
    columns |= dict.fromkeys(("permutations", "bootstraps", "resampling_seed"), pl.Int64)
    columns |= dict.fromkeys(("resampling_unit", "method", "reason"), pl.String)
    return pl.DataFrame(rows, schema=columns)


def direction(behavior: str) -> int:
    """The sign of Δ that is more of the behavior: its own, +1 of a control."""
    return (get(behavior).direction or 1) if is_known(behavior) else sign_of(behavior)


def _people(rates: pl.DataFrame, related_to: Mapping[str, Collection[str]]):
    """(behavior, seed, scope, y, direction) and its persons: persona, category, mean over sources, n of sources."""
    links = [(name, other) for name, others in related_to.items() for other in others]
    named = pl.DataFrame(links, schema={"persona": pl.String, "source": pl.String}, orient="row").unique()
    others = rates.filter(pl.col("category").is_not_null(), role="bystander")
    for (behavior, seed), mine in others.group_by("behavior", "seed", maintain_order=True):
        y = "delta" if mine["delta"].is_not_null().any() else "rate"
        for scope in SCOPES:
            kept = mine if scope == "all" else mine.join(named, on=["persona", "source"], how="semi")
            people = (
                kept.filter(pl.col(y).is_not_null())
                .group_by("persona", "category", "source", maintain_order=True)
                .agg(pl.col(y).mean())  # a source with several adapters counts once
                .group_by("persona", "category", maintain_order=True)
                .agg(mean=pl.col(y).mean(), n=pl.len())
                .sort("category", "persona")
            )
            if people.height:
                told = {"behavior": behavior, "seed": seed, "scope": scope, "y": y}
                yield told | {"direction": direction(behavior)}, people


def _coded(people: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """values (n,), codes (n,) of their categories, and the categories' names."""
    kinds = people["category"].unique().sort().to_list()
    place = {kind: i for i, kind in enumerate(kinds)}
    codes = np.array([place[kind] for kind in people["category"]], dtype=np.int64)
    return people["mean"].to_numpy().astype(float), codes, kinds


def _means(values: np.ndarray, codes: np.ndarray, k: int) -> np.ndarray:
    """(R, k) means per category of values (R, n)."""
    one_hot = np.eye(k)[codes]
    return values @ one_hot / one_hot.sum(0)


def _explained(values: np.ndarray, codes: np.ndarray, permutations: int, seed: int):
    """(η², its permutation p), None where nothing varies or there is one category, or as many as personas."""
    k, n = int(codes.max()) + 1, len(values)
    whole = float(np.square(values - values.mean()).sum())
    if not 1 < k < n or whole <= 0 or np.ptp(values) == 0:
        return None, None
    sizes = np.bincount(codes)

    def share(v: np.ndarray) -> np.ndarray:
        return (np.square(_means(v, codes, k) - values.mean()) * sizes).sum(-1) / whole

    found = float(share(values[None])[0])
    if not permutations:
        return found, None
    rng = np.random.Generator(np.random.PCG64(seed))
    shuffled = rng.permuted(np.broadcast_to(values, (permutations, n)), axis=1)
    more = (share(shuffled) >= found - 1e-12).sum()
    return found, float((1 + more) / (1 + permutations))


def _rank_correlation(
    sides: np.ndarray, codes: np.ndarray, k: int, permutations: int, bootstraps: int, seed: int
) -> dict:
    """ρ between the two rows' category means, its p-values and interval. sides (2, n)."""
    n = sides.shape[1]
    one, other = (_means(side[None], codes, k) for side in sides)
    observed = _rho(one, other)[0]
    if np.isnan(observed):
        return {"reason": "one behavior's means are the same in all categories"}
    rng = np.random.Generator(np.random.PCG64(seed))
    out = {"spearman": float(observed), "resampling_seed": seed}
    if permutations:
        shuffled = rng.permuted(np.broadcast_to(other, (permutations, k)), axis=1)
        order = rng.permuted(np.broadcast_to(np.arange(n), (permutations, n)), axis=1)
        grouped = _rho(*(_means(side[order], codes, k) for side in sides))
        tries = {"perm": _rho(np.broadcast_to(one, shuffled.shape), shuffled), "grouping": grouped}
        for name, drawn in tries.items():
            more = (np.abs(drawn) >= abs(observed) - 1e-12).sum()
            out[f"spearman_p_{name}"] = float((1 + more) / (1 + permutations))
        out["permutations"] = permutations
    if bootstraps > 1:
        picked = np.empty((bootstraps, n), np.int64)
        for code in range(k):
            own = np.flatnonzero(codes == code)
            picked[:, own] = own[rng.integers(0, len(own), (bootstraps, len(own)))]
        drawn = _rho(*(_means(side[picked], codes, k) for side in sides))[:, None]
        out |= intervals.of_spearman(drawn)
    return out


def _rho(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's ρ of each row of a with the same row of b, NaN where one does not vary. Means that are equal but for
    the rounding of their sums (1e-12 of the largest) tie."""
    a, b = (resample.ordered(v, _ROUNDED * np.abs(v).max(initial=0.0)).rank for v in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
