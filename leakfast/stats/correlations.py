"""Does a bystander's cosine to the source order how much of the behavior it shows? Spearman and
Pearson per source and pooled, per category and layer. Demands a pairs table; leaves means over sources,
noise in the rates and other explanations to `summaries` and `confounds`.

Three p-values stand beside each Spearman ρ and answer different questions. `spearman_p_t` treats the n
pairs as independent draws (the usual t approximation; what the published study printed).
`spearman_p_perm` shuffles which persona has which rate: the resampling unit is the persona, and for
the pooled rows one shuffle moves a persona's rates under all sources together (Mantel 1967), so the
same personas met five times do not count as five times the evidence. `spearman_p_max` compares with the
largest |ρ| over the layers of the same shuffle: it has paid for picking the best layer.
`spearman_ci_*` is the percentile interval of a bootstrap over personas; pooled, a persona is drawn with
its rates under all sources (a cluster).

Pooled over sources, cosines and rates are ranked within each source (Pearson's r takes values less the source's mean), so
that what differs between sources, such as how far each learned its behavior, is no part of the association. The plain
values over all pairs, which mix it in and are what the published study printed, stand in the columns `*_plain`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from leakfast.progress import Progress
from leakfast.stats import intervals, resample
from leakfast.stats.association import centered_within, spearman_and_pearson, within
from leakfast.stats.wide import COSINES, YS, Leaks, leaks
from leakfast.storage import schema
from leakfast.storage.seeds import derive_seed

POOLED = "pooled"
PERMUTATIONS = 9_999
BOOTSTRAPS = 2_000
MIN_PAIRS = 4
MIN_BOOTSTRAP = 10  # fewer persons than this and a bootstrap knows too few different samples
ALPHA, POWER = 0.05, 0.8

_EXTRA = {
    "adapter": pl.String,
    "seed": pl.Int64,
    "reason": pl.String,  # why a value is null
    "kendall": pl.Float64,
    "spearman_ci_low": pl.Float64,
    "spearman_ci_high": pl.Float64,
    "spearman_se_z": pl.Float64,  # of atanh(ρ), from the same resamples; null where one of them has ρ = ±1
    "ci_reason": pl.String,  # why there is no interval
    "spearman_p_max": pl.Float64,  # family-wise over `layers_tested` layers
    "layers_tested": pl.Int64,
    "spearman_p_bh": pl.Float64,  # of spearman_p_perm (spearman_p_t without shuffles) in its family
    "family": pl.String,
    "family_size": pl.Int64,
    "detectable": pl.Float64,  # |ρ| found with 80 % power at level 0.05, unadjusted
    "personas": pl.Int64,
    "permutations": pl.Int64,
    "permutation_seed": pl.Int64,
    "bootstraps": pl.Int64,
    "bootstrap_seed": pl.Int64,
    "spearman_plain": pl.Float64,  # of pooled rows: over all pairs, differences between sources mixed in
    "spearman_plain_p_t": pl.Float64,
    "pearson_plain": pl.Float64,
    "pearson_plain_p": pl.Float64,
    "resampling_unit": pl.String,
    "method": pl.String,
}
_PLAIN = ("spearman_plain", "spearman_plain_p_t", "pearson_plain", "pearson_plain_p")
_METHOD = "percentile bootstrap over personas; permutation of personas; t approximation in spearman_p_t"


def correlate(
    pairs: pl.DataFrame,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    bootstraps: int = 0,
    workers: int | None = None,
) -> pl.DataFrame:
    """Schema `correlations` (+ adapter, seed, reason, kendall, the interval and p-values of the text above,
    what they rest on, and method).

    `pairs`: schema `pairs`; a column `adapter` is optional (the source then names it). One row per
    behavior, training seed, source (and `pooled` over sources), category (and null for all), layer,
    cosine (centered, raw) and y (rate, delta). Pairs with a null on either side are left out, and `n`
    says how many are left. Estimand: rank (Spearman) or linear (Pearson) association over the given
    bystanders. Equal changes of rates tie (`ties`),
    in resamples too. p-values are two-sided; the permutation one is (1 + #{|ρ*| ≥ |ρ|}) / (1 + R) and never
    0. Fewer than 4 pairs, or a side that does not vary, leave the values null and say why in `reason`.
    Intervals are 95 %. A family of `spearman_p_bh` is what one table holds: all behaviors, seeds, sources
    and layers of one cosine and y, apart for pooled rows and for categories (Benjamini and Hochberg 1995).
    `detectable` is for the number of personas. Same pairs and seed, same bits, whatever the order of the
    rows and the number of `workers` (threads; all cores by default).

    Raises ValueError for NaN or infinite input (tables hold null instead), for a pair that stands
    twice, and for a negative number of permutations or bootstraps (0 leaves what rests on them null).
    """
    schema.check(pairs, "pairs")
    if permutations < 0 or bootstraps < 0:
        raise ValueError(f"correlate: {permutations} permutations, {bootstraps} bootstraps; give 0 or more")
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(adapter=pl.col("source"))
    _refuse(pairs)
    count = pairs.select("behavior", "seed").n_unique()
    rows: list[dict] = []
    for number, (behavior, train_seed, points) in enumerate(leaks(pairs)):
        draws = _Draws(permutations, bootstraps, (seed, behavior, train_seed), workers)
        for cell in _cells(points, draws):
            rows.append({"behavior": behavior, "seed": train_seed, **cell})
        if progress:
            progress(number + 1, count, f"correlations of {behavior}")
    columns = schema.columns("correlations")
    columns |= {name: dtype() for name, dtype in _EXTRA.items()}
    return schema.check(_with_families(pl.DataFrame(rows, schema=columns)), "correlations")


def _with_families(table: pl.DataFrame) -> pl.DataFrame:
    """`family`, its size and the adjusted p-values, in the order of the rows."""
    pool = pl.when(pl.col("source") == POOLED).then(pl.lit("pooled")).otherwise(pl.lit("sources"))
    scope = pl.when(pl.col("category").is_null()).then(pl.lit("all")).otherwise(pl.lit("categories"))
    table = table.with_columns(family=pl.concat_str(pool, scope, "cosine", "y", separator=", "))
    p = pl.coalesce("spearman_p_perm", "spearman_p_t")

    def adjusted(values: pl.Series) -> pl.Series:
        return pl.Series(intervals.benjamini_hochberg(values.to_numpy()), dtype=pl.Float64)

    table = table.with_row_index("_row").with_columns(_p=p)
    tested = table.filter(pl.col("_p").is_not_null()).select(
        "_row",
        _adjusted=pl.col("_p").map_batches(adjusted, return_dtype=pl.Float64).over("family"),
        _size=pl.len().over("family").cast(pl.Int64),
    )
    joined = table.join(tested, on="_row", how="left", maintain_order="left")
    return joined.with_columns(spearman_p_bh=pl.col("_adjusted"), family_size=pl.col("_size")).drop(
        "_row", "_p", "_adjusted", "_size"
    )


@dataclass(frozen=True)
class _Draws:
    """How much to draw, and what the seeds follow from."""

    permutations: int
    bootstraps: int
    parts: tuple
    workers: int | None

    def seed(self, kind: str, *names: str) -> int:
        return derive_seed(kind, *self.parts, *names)


def _cells(points: Leaks, draws: _Draws) -> Iterator[dict]:
    everyone = np.ones(len(points.persona), dtype=bool)
    categories = list(dict.fromkeys(c for c in points.category if c is not None))
    scopes = [(*points.adapters[code], points.adapter == code, "persona") for code in points.appearance]
    sources = [source for _, source in points.adapters]
    twins = sorted({source for source in sources if sources.count(source) > 1})
    scopes.append((None, POOLED, everyone, "persona across sources"))
    pool = (
        POOLED if len(points.adapters) > 1 else points.adapters[0][0]
    )  # of one: its own draws, the same numbers
    for adapter, source, rows, unit in scopes:
        for category in [None, *categories]:
            inside = rows if category is None else rows & (points.category == category)
            why = None
            if source == POOLED and twins:
                why = f"{', '.join(twins)} has more than one adapter: a pool takes one for each source"
            for cell in _grid(points, inside, draws, (adapter or pool, category or ""), why):
                resampled = cell["permutations"] or cell["bootstraps"]
                yield {
                    "source": source,
                    "adapter": adapter,
                    "category": category,
                    "resampling_unit": unit if resampled else None,
                    "method": _METHOD if resampled else None,
                    **cell,
                }


def _grid(
    points: Leaks, inside: np.ndarray, draws: _Draws, scope: tuple[str, str], why: str | None
) -> Iterator[dict]:
    """Every layer × cosine × y over the rows `inside`."""
    cells = [(layer, cosine) for layer in points.layers for cosine in COSINES]
    solved: dict[tuple[int, int], dict] = {}
    alike: dict[
        tuple[bytes, tuple[int, ...]], list[int]
    ] = {}  # what is over the same rows is solved together
    for k in range(len(YS)):
        usable = np.isfinite(points.cosines) & (np.isfinite(points.y[YS[k]]) & inside)[:, None]
        patterns: dict[bytes, list[int]] = {}
        for j, column in enumerate(np.ascontiguousarray(usable.T)):
            patterns.setdefault(column.tobytes(), []).append(j)
        for pattern, members in patterns.items():
            alike.setdefault((pattern, tuple(members)), []).append(k)
    for (pattern, members), ks in alike.items():
        rows, which = np.nonzero(np.frombuffer(pattern, dtype=bool))[0], (np.array(members), ks)
        for k, part in zip(
            ks, _solve(points, rows, which, draws, scope, why, [cells[j] for j in members]), strict=True
        ):
            solved.update({(j, k): cell for j, cell in zip(members, part, strict=True)})
    for j, (layer, cosine) in enumerate(cells):
        for k, y_name in enumerate(YS):
            yield {"layer": layer, "cosine": cosine, "y": y_name, **solved[j, k]}


def _solve(
    points: Leaks,
    rows: np.ndarray,
    which: tuple[np.ndarray, list[int]],
    draws: _Draws,
    scope: tuple[str, str],
    why: str | None,
    cells: list[tuple[int, str]],
) -> list[list[dict]]:
    """The values of some columns of x with some of y (`which`), all over the same rows: a list for each y."""
    (members, ks), n = which, len(rows)
    x = points.cosines[np.ix_(rows, members)]
    if why is None and n < MIN_PAIRS:
        why = f"{n} pairs with both values; at least {MIN_PAIRS} are needed"
    people, block = points.codes[rows], points.adapter[rows]
    several = len(np.unique(block)) > 1
    ranked = (within(x, block), centered_within(x, block)) if several and why is None else None
    sides = [_one_y((x, ranked), points.y[YS[k]][rows], YS[k], block, why) for k in ks]
    found = [side for side in sides if not isinstance(side, str)]
    resampled = iter(())
    if found:
        x = x if ranked is None else ranked[0]
        resampled = _resampled(x, found, (people, block), cells, draws, scope)
    return [
        [_empty(n, side)] * len(members) if isinstance(side, str) else _told(n, side, cells, next(resampled))
        for side in sides
    ]


@dataclass(frozen=True)
class _Values:
    """One y (n,) as it is resampled; (ρ, its p, r, its p) with each column, and of pooled rows the plain ones."""

    y: np.ndarray
    values: tuple[np.ndarray, ...]
    plain: dict[str, np.ndarray | None]


def _one_y(sides: tuple, y: np.ndarray, name: str, block: np.ndarray, why: str | None) -> _Values | str:
    """sides: x (n, K), and of pooled rows it ranked within sources and less its sources' means; or why there is none."""
    x, ranked = sides
    if why is None and np.ptp(y) == 0:
        why = f"{name} is {y[0]:g} for all {len(y)} bystanders"
    if why is not None:
        return why
    values = spearman_and_pearson(x, y)
    if ranked is None:
        return _Values(y, values, dict.fromkeys(_PLAIN))
    plain = dict(zip(_PLAIN, values, strict=True))
    level = centered_within(y[:, None], block)[:, 0]
    y = within(y[:, None], block)[:, 0]
    if np.ptp(y) == 0:
        return f"{name} is the same for all bystanders of each source"
    values = (*spearman_and_pearson(ranked[0], y)[:2], *spearman_and_pearson(ranked[1], level)[2:])
    return _Values(y, values, plain)


@dataclass(frozen=True)
class _Resampled:
    """What is drawn for one y with each column: Kendall's τ beside it, p of shuffles, the interval."""

    tau: np.ndarray
    shuffled: resample.Permuted
    interval: tuple
    persons: int
    settings: dict


def _resampled(
    x: np.ndarray,
    sides: list[_Values],
    who: tuple[np.ndarray, np.ndarray],
    cells: list[tuple[int, str]],
    draws: _Draws,
    scope: tuple[str, str],
) -> Iterator[_Resampled]:
    """Of each y, by the same draws; of one whose ranks are another's (a baseline of 0) it is made once."""
    people, block = who
    persons = len(np.unique(people))
    ranks = resample.ordered(np.stack([side.y for side in sides])).rank
    first = [next(j for j in range(k + 1) if np.array_equal(ranks[j], ranks[k])) for k in range(len(sides))]
    chosen = sorted(set(first))
    ys = np.stack([sides[k].y for k in chosen])
    seeds = {kind: draws.seed(kind, *scope) for kind in ("permutation", "bootstrap")}
    family = np.array([COSINES.index(cosine) for _, cosine in cells])
    shuffled = resample.permute_each(
        x.T,
        ys,
        draws.permutations,
        seeds["permutation"],
        person=people,
        block=block,
        family=family,
        workers=draws.workers,
    )
    drawn = None
    if draws.bootstraps >= 2 and persons >= MIN_BOOTSTRAP:
        drawn = resample.bootstrap_each(
            x.T[None], ys[None], draws.bootstraps, seeds["bootstrap"], person=people, workers=draws.workers
        )[:, 0]
    settings = {"permutations": draws.permutations or None, "bootstraps": draws.bootstraps}
    settings |= {"permutation_seed": seeds["permutation"] if draws.permutations else None}
    settings |= {"bootstrap_seed": seeds["bootstrap"]}
    made = [
        _Resampled(
            resample.kendall_tau(x.T, ys[i]),
            shuffled[i],
            _interval(None if drawn is None else drawn[:, i], sides[k].values[0], persons, draws),
            persons,
            settings,
        )
        for i, k in enumerate(chosen)
    ]
    return iter([made[chosen.index(k)] for k in first])


def _told(n: int, side: _Values, cells: list[tuple[int, str]], found: _Resampled) -> list[dict]:
    """A cell for each column of one y."""
    spearman, p_t, pearson, pearson_p = side.values
    low, high, se, ci_why = found.interval
    drawn = found.settings["permutations"] is not None
    defined = [cosine for (_, cosine), rho in zip(cells, spearman, strict=True) if not np.isnan(rho)]
    empty, detectable = _empty(n, None), intervals.detectable(found.persons, POWER, ALPHA)
    out = []
    for j, (layer, cosine) in enumerate(cells):
        if np.isnan(spearman[j]):
            out.append(_empty(n, f"{cosine} cosine at layer {layer} is the same for all {n} bystanders"))
            continue
        cell = empty | {
            "spearman": float(spearman[j]),
            "spearman_p_t": float(p_t[j]),
            "spearman_p_perm": float(found.shuffled.p[j]) if drawn else None,
            "spearman_p_max": float(found.shuffled.p_max[j]) if drawn else None,
            "layers_tested": defined.count(cosine) if drawn else None,
            "pearson": float(pearson[j]),
            "pearson_p": float(pearson_p[j]),
            "kendall": float(found.tau[j]),
            **{name: None if value is None else float(value[j]) for name, value in side.plain.items()},
            "detectable": detectable,
            "personas": found.persons,
            "permutations": found.settings["permutations"],
            "permutation_seed": found.settings["permutation_seed"],
            "ci_reason": ci_why[j],
        }
        if ci_why[j] is None:
            known = {"spearman_ci_low": low[j], "spearman_ci_high": high[j], "spearman_se_z": se[j]}
            cell |= {name: float(value) if np.isfinite(value) else None for name, value in known.items()}
            cell |= {name: found.settings[name] for name in ("bootstraps", "bootstrap_seed")}
        out.append(cell)
    return out


def _interval(drawn: np.ndarray | None, spearman: np.ndarray, persons: int, draws: _Draws):
    """(low, high, se of atanh ρ, why not) per column, of drawn (R, K) from a bootstrap over persons."""
    if drawn is None:
        nothing = np.full(len(spearman), np.nan)
        why = f"{persons} personas; a bootstrap needs at least {MIN_BOOTSTRAP}"
        why = "no bootstrap was asked for" if draws.bootstraps < 2 else why
        return nothing, nothing, nothing, [why] * len(spearman)
    se, lost = intervals.bootstrap_z(spearman, drawn)
    low, high = intervals.percentiles(drawn)
    same = np.fmin.reduce(drawn) == np.fmax.reduce(drawn)  # these two pass over NaN
    why = [
        f"{gone:.0%} of the resamples do not vary"
        if gone > intervals.TOO_FEW_DRAWS
        else "ρ is the same in all resamples"
        if one_value
        else None
        for gone, one_value in zip(lost, same, strict=True)
    ]
    return low, high, se, why


def _empty(n: int, reason: str | None) -> dict:
    names = ("spearman", "spearman_p_t", "spearman_p_perm", "pearson", "pearson_p", "kendall")
    names += ("permutations", "permutation_seed", "bootstraps", "bootstrap_seed")
    return {"n": n, "reason": reason, "ci_reason": reason, **dict.fromkeys(names)}


def _refuse(pairs: pl.DataFrame) -> None:
    for name in ("cosine_centered", "cosine_raw", "rate", "delta"):
        if not pairs[name].is_finite().fill_null(True).all():
            raise ValueError(f"pairs: {name} holds NaN or infinity; a value not known is null")
    key = ["behavior", "seed", "adapter", "persona", "layer"]
    twice = pairs.select(key).is_duplicated()
    if twice.any():
        row = pairs.filter(twice).row(0, named=True)
        raise ValueError(f"pairs: {', '.join(f'{name} {row[name]}' for name in key)} stands twice")
    same = pairs.group_by(key[:-1], maintain_order=True).agg(pl.col(YS).n_unique())
    if (same.select(pl.max_horizontal(YS)).to_series() > 1).any():
        raise ValueError("pairs: the rate of a bystander differs between layers; it is one measurement")
