"""How far each variant of a behavior reaches when all are equally strong on the source: mean bystander, leakage radius, and the
difference from the plain behavior. Demands rates, pairs, and, where arms are to be matched, points of their trainings that were
measured under the same personas; loads no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from leakfast import behaviors
from leakfast.stats import baselines, intervals, matching, radius
from leakfast.storage import layout

TOLERANCE = 0.05  # of the source's rate: what counts as equally strong
_METHOD = (
    "t interval of a mean over bystanders, of differences over the same bystanders, Wilson's of the source's replies; radius "
    "as in the table radius, one layer for all variants"
)
_OF_RADIUS = "radius radius_low radius_high share_inside share_inside_low share_inside_high".split()
_DIFFERENCE = "difference difference_ci_low difference_ci_high".split()
SCHEMA: dict[str, Any] = {
    "behavior": pl.String,
    "seed": pl.Int64,
    **dict.fromkeys(("source", "variant", "adapter"), pl.String),
    "share": pl.Float64,
    "wanted_rate": pl.Float64,
    "matched": pl.Boolean,
    "match": pl.String,
    **dict.fromkeys(("source_rate", "source_rate_low", "source_rate_high"), pl.Float64),
    "source_n": pl.Int64,
    "n": pl.Int64,
    **dict.fromkeys(("mean_bystander", "mean_bystander_low", "mean_bystander_high"), pl.Float64),
    "cosine": pl.String,
    "layer": pl.Int32,
    "status": pl.String,
    **dict.fromkeys((*_OF_RADIUS, *_DIFFERENCE), pl.Float64),
    **dict.fromkeys(("reason", "ci_reason", "difference_reason"), pl.String),
    **dict.fromkeys(("bootstraps", "bootstrap_seed"), pl.Int64),
    **dict.fromkeys(("resampling_unit", "method"), pl.String),
}


@dataclass(frozen=True)
class Point:
    """An adapter at a share of its training: persona, role, hits, total, baseline of all personas counted there. side: whose
    shards they are of, as baselines.told_of names it."""

    share: float
    rows: pl.DataFrame
    side: baselines.Side = ("", "")

    @property
    def source(self) -> tuple[int, int] | None:
        """(hits, replies) of the source, None where it was not measured."""
        own = self.rows.filter(pl.col("role") == "source", pl.col("total") > 0)
        return (int(own["hits"][0]), int(own["total"][0])) if own.height else None

    @property
    def source_rate(self) -> float | None:
        return None if self.source is None else self.source[0] / self.source[1]

    def with_source(self, anew: tuple[int, int] | None) -> Point:
        """The same with the source counted on other replies, (hits, replies)."""
        if anew is None:
            return self
        own = pl.col("role") == "source"
        counts = [
            pl.when(own).then(n).otherwise(pl.col(name)).cast(pl.Int64).alias(name)
            for name, n in zip(("hits", "total"), anew, strict=True)
        ]
        return replace(self, rows=self.rows.with_columns(counts))

    @property
    def bystanders(self) -> pl.DataFrame:
        """persona, rate."""
        kept = self.rows.filter(pl.col("role") == "bystander", pl.col("total") > 0)
        return kept.select("persona", rate=pl.col("hits") / pl.col("total"))


@dataclass(frozen=True)
class Arm:
    """A variant ("" is the plain behavior), its adapter, the end of its training, and points on the way, shares rising. looked:
    (share, hits, replies) of the source alone, by which a point was chosen (none: none was)."""

    variant: str
    adapter: str
    final: Point
    earlier: tuple[Point, ...] = ()
    looked: tuple[tuple[float, int, int], ...] = ()

    def chosen(self, match: float | None) -> Point | None:
        """The point that the study chose for this rate, where everybody was asked there."""
        share = None if match is None else matching.nearest(self.looked, match)
        return next((p for p in (*self.earlier, self.final) if p.share == share), None)

    def standing(self, wanted: float | None, match: float | None) -> tuple[Point, str]:
        """Where the arm stands, and how near: `at_chosen` where it is compared at the rate that a point was chosen for, else
        `at`. match: that rate."""
        if wanted is None:
            return self.final, "unknown"
        found = self.chosen(match) if wanted == match else None
        return self.at(wanted) if found is None else self.at_chosen(found, wanted)

    def at_chosen(self, point: Point, wanted: float) -> tuple[Point, str]:
        """The chosen point and, by replies that did not choose it, "matched" where its source rate is within TOLERANCE. Else, by
        all rates that are known, "weaker" or "stronger" where all are, "missed" where the point looked near enough when it was
        chosen, "passed over" where none did."""
        rate = point.source_rate
        if rate is None:
            return point, "unknown"
        if abs(rate - wanted) <= TOLERANCE + 1e-9:
            return point, "matched"
        seen = [hits / total for _, hits, total in self.looked if total > 0]
        sides = {one < wanted for one in (*seen, rate)}
        if len(sides) == 1:
            return point, "weaker" if True in sides else "stronger"
        near = min(abs(one - wanted) for one in seen) <= TOLERANCE + 1e-9
        return point, "missed" if near else "passed over"

    def at(self, wanted: float) -> tuple[Point, str]:
        """The point whose source rate is nearest to `wanted`, the later of equals, if that is within TOLERANCE (with 1e-9 for
        rounding): "matched". Else the final one, and "weaker" or "stronger" where all points that were measured are, "passed
        over" where some are and others not, "unknown" where the source was not measured."""
        known = [
            (abs(p.source_rate - wanted), -p.share, p)
            for p in (*self.earlier, self.final)
            if p.source_rate is not None
        ]
        if not known:
            return self.final, "unknown"
        apart, _, found = min(known, key=lambda one: one[:2])
        if apart <= TOLERANCE + 1e-9:
            return found, "matched"
        sides = {(p.source_rate or 0.0) < wanted for _, _, p in known}
        return self.final, "passed over" if len(sides) == 2 else "weaker" if True in sides else "stronger"


def table(
    pairs: pl.DataFrame,
    rates: pl.DataFrame,
    trajectory: pl.DataFrame,
    best: Mapping[str, tuple[str, int | None]],
    draws: tuple[int, int, int | None],
    wanted: float | None = None,
    match: float | None = None,
    told: baselines.Told | None = None,
) -> pl.DataFrame:
    """Table `mitigations`: a row a variant, source and seed of a behavior that has several; the plain one is the variant "".

    wanted: the source's rate at which arms are compared (0–1; None: `match`, the rate that the study chose points for, else the
    lowest final one among the arms of that source and seed). Each arm stands at `Arm.standing`: matched = false says that no
    point that was measured is that strong, so that the row compares different strengths; the column `match` says on which
    side they are. trajectory: the table of that name, of which points with the arm's bystanders are used. The source's rate is
    of the replies that were drawn anew at a chosen point, else of those that it gave beside everybody.
    draws: (bootstraps, seed, workers) of the radius. told: of baselines.told_of; a variant that was asked or drawn otherwise
    where it stands than the plain one where that stands has a reason in place of the difference, and a point that was asked
    or drawn otherwise than its adapter's end has no baseline.

    Estimands: mean_bystander, the mean rate over further personas of these kinds, of this adapter and these questions;
    difference: that less the plain variant's, over the same bystanders. Resampling unit: the persona (t intervals).
    Questions are taken as given. The radius is `radius.table`'s, all variants at the cosine and layer of the plain behavior
    (of the first variant where there is none), because radii at different layers are no lengths of one space. Behaviors that
    a judge scores have no counts and no rows."""
    rows = []
    if {"hits", "total"} <= set(rates.columns):
        for key, arms in _arms(rates, trajectory, told or {}):
            rates_at_end = [arm.final.source_rate for arm in arms]
            known = [rate for rate in rates_at_end if rate is not None]
            level = next((one for one in (wanted, match, min(known, default=None)) if one is not None), None)
            named = [behaviors.parts(name)[0] == key["behavior"] for name in best]
            chosen = best.get(key["behavior"]) or next(
                (its for its, mine in zip(best.values(), named, strict=True) if mine), ("centered", None)
            )
            rows += _rows(key, arms, (level, match), pairs, chosen, draws, told or {})
    return pl.DataFrame(rows, schema=SCHEMA)


def has_arms(rates: pl.DataFrame) -> bool:
    """Whether a behavior has variants that can be compared, so that the table has rows."""
    return {"hits", "total"} <= set(rates.columns) and any(True for _ in _arms(rates, pl.DataFrame(), {}))


def _arms(
    rates: pl.DataFrame, trajectory: pl.DataFrame, told: baselines.Told
) -> Iterator[tuple[dict[str, Any], list[Arm]]]:
    """Behavior, source, seed, and the arms there, the plain one first."""
    mine = rates.filter(pl.col("role").is_in(["source", "bystander"]), pl.col("total") > 0)
    if "taught" in mine.columns:  # not what was measured on the adapters of another behavior
        mine = mine.filter((pl.col("taught") == pl.col("behavior")).fill_null(True))
    found: dict[tuple, list[Arm]] = {}
    keys = ["behavior", "source", "seed", "adapter"]
    for (name, source, seed, adapter), part in mine.group_by(keys, maintain_order=True):
        behavior, variant = behaviors.parts(str(name))
        rows = part.select("persona", "role", "hits", "total", "baseline")
        looked, anew = _of_source(trajectory, behavior, str(adapter))
        end = Point(1.0, rows, (str(name), str(adapter)))
        earlier = [p.with_source(anew.get(p.share)) for p in _points(trajectory, behavior, end, told)]
        final = end.with_source(anew.get(1.0))
        arm = Arm(variant, str(adapter), final, tuple(earlier), looked)
        found.setdefault((behavior, source, seed), []).append(arm)
    for (behavior, source, seed), arms in found.items():
        if len({arm.variant for arm in arms}) > 1:
            yield (
                {"behavior": behavior, "source": source, "seed": seed},
                sorted(arms, key=lambda arm: arm.variant != ""),
            )


def _of(trajectory: pl.DataFrame, behavior: str, adapter: str) -> pl.DataFrame:
    """What was counted of a behavior, or a variant of it, on an adapter."""
    kinds = pl.col("behavior").str.split("+").list.first() == behavior
    return trajectory.filter(kinds, pl.col("total") > 0, adapter=adapter)


def _of_source(
    trajectory: pl.DataFrame, behavior: str, adapter: str
) -> tuple[tuple[tuple[float, int, int], ...], dict[float, tuple[int, int]]]:
    """Of the source alone: (share, hits, replies) by which a point was chosen, and share → (hits, replies) drawn anew."""
    if trajectory.is_empty():
        return (), {}
    told = ["share", "hits", "total"]
    counted = _of(trajectory, behavior, adapter)
    counted = counted.filter(
        pl.col("behavior") == pl.col("behavior").min()
    )  # of several variants asked the first
    looked = counted.filter(scoring=matching.TO_CHOOSE).select(told).rows()
    anew = counted.filter(scoring=matching.ANEW).select(told).rows()
    return tuple(looked), {share: (hits, total) for share, hits, total in anew}


def _points(trajectory: pl.DataFrame, behavior: str, end: Point, told: baselines.Told) -> tuple[Point, ...]:
    """The points of an adapter's training at which everybody of its end was counted."""
    if trajectory.is_empty():
        return ()
    alone = pl.col("scoring").is_in([matching.TO_CHOOSE, matching.ANEW])
    adapter = end.side[1]
    between = _of(trajectory, behavior, adapter).filter(
        pl.col("share") > 0, pl.col("share") < 1, ~pl.col("scoring").str.starts_with("probability"), ~alone
    )
    people = end.rows.select("persona", "role", "baseline")
    points: list[Point] = []
    for (share, name, *_), part in sorted(
        between.group_by("share", "behavior", "items", "scoring", maintain_order=True), key=lambda one: one[0]
    ):
        rows = people.join(part.select("persona", "hits", "total"), on="persona", maintain_order="left")
        if rows.height == people.height and share not in [point.share for point in points]:
            share = float(share)  # type: ignore[arg-type]
            side = str(name), layout.point_name(adapter, share)
            if baselines.apart(told, [side], [end.side], "its end") is not None:
                rows = rows.with_columns(baseline=pl.lit(None, rows.schema["baseline"]))
            points.append(Point(share, rows, side))
    return tuple(points)


def _rows(
    key: dict[str, Any],
    arms: list[Arm],
    level: tuple[float | None, float | None],
    pairs: pl.DataFrame,
    chosen: tuple[str, int | None],
    draws: tuple[int, int, int | None],
    told: baselines.Told,
) -> Iterator[dict[str, Any]]:
    """level: the source's rate at which arms are compared, and the one that points were chosen for."""
    standing = [arm.standing(*level) for arm in arms]
    plain = standing[0][0].bystanders if arms[0].variant == "" else None
    for arm, (point, match) in zip(arms, standing, strict=True):
        others = point.bystanders
        row = {**key, "variant": arm.variant, "adapter": arm.adapter, "share": point.share}
        row |= {
            "wanted_rate": level[0],
            "matched": match == "matched",
            "match": match,
            "source_rate": point.source_rate,
            "n": others.height,
        }
        if point.source is not None:
            low, high = intervals.wilson_share(point.source_rate, point.source[1])
            row |= {"source_rate_low": float(low), "source_rate_high": float(high)}
            row["source_n"] = point.source[1]
        row |= {"cosine": chosen[0], "layer": chosen[1], "resampling_unit": "persona", "method": _METHOD}
        if others.height:
            mean, low, high, _ = intervals.of_mean(others["rate"].to_numpy())
            row |= {"mean_bystander": mean, "mean_bystander_low": low, "mean_bystander_high": high}
        why = baselines.apart(told, [point.side], [standing[0][0].side], "the plain behavior")
        yield row | _radius(arm, point, pairs, chosen, draws) | _difference(arm, others, plain, why)


def _radius(
    arm: Arm,
    point: Point,
    pairs: pl.DataFrame,
    chosen: tuple[str, int | None],
    draws: tuple[int, int, int | None],
) -> dict[str, Any]:
    """status, radius, share_inside and their ends, or why there are none."""
    cosine, layer = chosen
    if layer is None or pairs.is_empty():
        return {"reason": "no cosine is known at a layer"}
    here = pairs.filter(adapter=arm.adapter, layer=layer).unique("persona", maintain_order=True)
    counted = point.rows.select("persona", "hits", "total", "baseline")
    group = here.drop("hits", "total", "baseline", strict=False).join(
        counted, on="persona", how="left", maintain_order="left"
    )
    if group.is_empty():
        return {"reason": "no bystander has a cosine at that layer"}
    found = radius.of_adapter(group, point.rows.filter(role="source"), cosine, draws)
    told = ("status", *_OF_RADIUS, "reason", "ci_reason", "bootstraps", "bootstrap_seed")
    return {name: found.get(name) for name in told}


def _difference(
    arm: Arm, others: pl.DataFrame, plain: pl.DataFrame | None, apart: str | None
) -> dict[str, Any]:
    """The mean bystander less the plain variant's, pair by pair. apart: how it was asked otherwise."""
    if plain is None:
        return {"difference_reason": "the plain behavior was not measured"}
    if arm.variant == "":
        return {"difference_reason": "the plain behavior itself"}
    if apart is not None:
        return {"difference_reason": f"it {apart}"}
    both = others.join(plain.rename({"rate": "plain"}), on="persona", maintain_order="left")
    if both.is_empty():
        return {"difference_reason": "no bystander was measured under both"}
    mean, low, high, why = intervals.of_mean((both["rate"] - both["plain"]).to_numpy())
    return dict(zip(_DIFFERENCE, (mean, low, high), strict=True)) | {"difference_reason": why}
