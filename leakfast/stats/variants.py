"""One behavior trained in several ways (`misalignment-advice+few`, `+many`): how far they differ in what bystanders
show, persona by persona. Demands rates of a run with variants, and how each was asked; knows no geometry."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import polars as pl

from leakfast import behaviors
from leakfast.stats import baselines, intervals
from leakfast.stats.correlations import POOLED
from leakfast.stats.relations import direction

_METHOD = "paired differences over the same bystanders; t interval over personas"
_EFFECTS = "source_effect other_source_effect effect other_effect breadth other_breadth"
_DIFFERENCE = "difference difference_ci_low difference_ci_high"
_COLUMNS = dict.fromkeys(("behavior", "source"), pl.String) | {"seed": pl.Int64}
_COLUMNS |= {"variant": pl.String, "other": pl.String, "n": pl.Int64}
_COLUMNS |= dict.fromkeys(f"{_EFFECTS} {_DIFFERENCE}".split(), pl.Float64)
_COLUMNS |= dict.fromkeys(("resampling_unit", "method", "reason"), pl.String)


class _Arm(NamedTuple):
    """A variant under a source: effect on the source, bystanders (persona, effect), the (behavior, adapter) that they are
    of, and what stands for a rate where nothing but probability was measured."""

    own: float | None
    others: pl.DataFrame
    sides: list[baselines.Side]
    estimators: set[str | None]


def compare(rates: pl.DataFrame, told: baselines.Told) -> pl.DataFrame:
    """Per behavior with several variants, source (and `pooled`: personas' means over the sources that all variants have)
    and seed, every two variants; the plain behavior is the variant "".

    Effects are Δ against the unadapted model (rates, where that was not measured for every variant), signed so that more of the
    behavior is more, in the behavior's unit: of the source, and their mean over the n bystanders both variants have.
    breadth: mean effect on bystanders over that on the source, null where the source's is not above 0. difference:
    effect − other_effect, estimand the mean over further personas; its 95 % t interval is null for one persona. A source of
    which a variant has more than one adapter (seeds that no card tells apart, say) has a reason in place of values; there is no
    pool then. Variants that were asked other questions or items, or drawn otherwise, have a reason in place of the difference;
    how many samples each has may differ. told: of baselines.told_of."""
    rows = []
    for key, found in _grouped(rates):
        for one, other in combinations(found, 2):
            mine, theirs = found[one], found[other]
            name = behaviors.joined(key["behavior"], other)
            why = baselines.apart(told, mine.sides, theirs.sides, name)
            if why is None and mine.estimators != theirs.estimators:
                why = f"was measured by another estimator than {name}"
            rows.append(key | {"variant": one, "other": other} | _pair(mine, theirs, why))
    return pl.DataFrame(rows, schema=_COLUMNS)


def _grouped(rates: pl.DataFrame) -> Iterator[tuple[dict, dict[str, _Arm]]]:
    """(behavior, source, seed) and its variants."""
    named = {name: behaviors.parts(name) for name in rates["behavior"].unique(maintain_order=True)}
    several = {b for b, _ in named.values() if sum(b == other for other, _ in named.values()) > 1}
    whole = []
    others = rates.filter(role="bystander")
    based = {name: others.filter(behavior=name)["delta"].is_not_null().any() for name in named}
    for name, (behavior, variant) in named.items():
        if behavior not in several:
            continue
        # a change and a rate are never set against each other
        y = "delta" if all(based[n] for n, (b, _) in named.items() if b == behavior) else "rate"
        mine = rates.filter(pl.col("role").is_in(["source", "bystander"]), behavior=name)
        whole.append(
            mine.select(
                pl.lit(behavior).alias("behavior"),
                pl.lit(variant).alias("variant"),
                "source",
                "seed",
                "role",
                "persona",
                effect=(pl.col(y) * direction(name)),
            )
        )
    if not whole:
        return
    table = pl.concat(whole)
    met = table.group_by("behavior", "seed", "source", maintain_order=True).agg(
        _n=pl.col("variant").n_unique()
    )
    most = pl.col("variant").n_unique().over("behavior", "seed")
    shared = table.with_columns(_all=most).join(met, on=["behavior", "seed", "source"], nulls_equal=True)
    shared = shared.filter(_n=pl.col("_all")).select(table.columns)  # sources that every variant has
    pooled = shared.group_by(["behavior", "variant", "seed", "role", "persona"], maintain_order=True).agg(
        pl.col("effect").mean(), source=pl.lit(POOLED)
    )
    one_each = ["behavior", "variant", "seed", "source", "role", "persona"]
    if shared["source"].n_unique() > 1 and not shared.select(one_each).is_duplicated().any():
        # a persona that is a source elsewhere is a bystander of the others; sources' own effects are averaged
        table = pl.concat([table, pooled.select(table.columns)])
    for (behavior, source, seed), mine in table.group_by("behavior", "source", "seed", maintain_order=True):
        found, every = {}, shared.filter(behavior=behavior)["source"].unique().to_list()
        for (variant,), part in mine.group_by("variant", maintain_order=True):
            own = part.filter(role="source")["effect"].mean()
            others = part.filter(role="bystander").drop_nulls("effect").select("persona", "effect")
            name = behaviors.joined(str(behavior), variant)
            found[variant] = _Arm(
                own, others, *_asked(rates, name, every if source == POOLED else [source], seed)
            )
        if len(found) > 1:
            yield {"behavior": behavior, "source": source, "seed": seed}, found


def _asked(
    rates: pl.DataFrame, name: str, sources: list[str], seed: int | None
) -> tuple[list[baselines.Side], set[str | None]]:
    """Whose the rates of a behavior, some sources and a seed are, and their estimators."""
    mine = rates.filter(pl.col("source").is_in(sources), pl.col("seed").eq_missing(seed), behavior=name)
    estimators = set(mine["estimator"]) if "estimator" in mine.columns else set()
    return [(name, adapter) for adapter in mine["adapter"].unique()], estimators


def _pair(arm: _Arm, against: _Arm, why_not: str | None) -> dict:
    own, one, other_own, other = arm.own, arm.others, against.own, against.others
    both = one.join(other.rename({"effect": "other"}), on="persona", maintain_order="left")
    row = {"n": both.height, "source_effect": own, "other_source_effect": other_own}
    row |= {"resampling_unit": "persona", "method": _METHOD}
    if both.is_empty():
        return row | {"reason": "no bystander was measured under both"}
    if any(side["persona"].is_duplicated().any() for side in (one, other)):
        return row | {
            "n": 0,
            "reason": "a variant has more than one adapter of this source: a pair takes one of each",
        }
    a, b = (both[name].to_numpy() for name in ("effect", "other"))
    mean, low, high, why = intervals.of_mean(a - b)
    if why_not is not None:
        mean = low = high = None
    return row | {
        "effect": float(a.mean()),
        "other_effect": float(b.mean()),
        "difference": mean,
        "breadth": float(a.mean()) / own if own and own > 0 else None,
        "other_breadth": float(b.mean()) / other_own if other_own and other_own > 0 else None,
        "difference_ci_low": low,
        "difference_ci_high": high,
        "reason": why_not or why,
    }
