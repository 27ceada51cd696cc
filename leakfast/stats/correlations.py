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
from leakfast.stats import intervals, resample, ties
from leakfast.stats.association import centered_within, spearman_and_pearson, within
from leakfast.storage import schema
from leakfast.storage.seeds import derive_seed

COSINES = ("centered", "raw")
YS = ("rate", "delta")
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


@dataclass(frozen=True)
class _Points:
    """The pairs of one behavior and training seed, wide: row = (adapter, persona)."""

    adapter: np.ndarray  # (n,) int codes, in order of appearance
    persona: np.ndarray  # (n,) int codes
    category: np.ndarray  # (n,) object, None where a persona has none
    x: np.ndarray  # (n, layers × cosines) float64, NaN where null
    y: np.ndarray  # (n, 2) float64, NaN where null
    adapters: list[tuple[str, str]]  # code → (adapter, source)
    layers: list[int]


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
    groups = pairs.partition_by("behavior", "seed", maintain_order=True, include_key=True)
    rows: list[dict] = []
    for number, group in enumerate(groups):
        behavior, train_seed = group["behavior"][0], group["seed"][0]
        points = _widen(group)
        draws = _Draws(permutations, bootstraps, (seed, behavior, train_seed), workers)
        for cell in _cells(points, draws):
            rows.append({"behavior": behavior, "seed": train_seed, **cell})
        if progress:
            progress(number + 1, len(groups), f"correlations of {behavior}")
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


def _cells(points: _Points, draws: _Draws) -> Iterator[dict]:
    everyone = np.ones(len(points.persona), dtype=bool)
    categories = list(dict.fromkeys(c for c in points.category if c is not None))
    scopes = [
        (adapter, source, points.adapter == code, "persona")
        for code, (adapter, source) in enumerate(points.adapters)
    ]
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
    points: _Points, inside: np.ndarray, draws: _Draws, scope: tuple[str, str], why: str | None
) -> Iterator[dict]:
    """Every layer × cosine × y over the rows `inside`."""
    cells = [(layer, cosine) for layer in points.layers for cosine in COSINES]
    solved: dict[tuple[int, int], dict] = {}
    for k in range(len(YS)):
        usable = np.isfinite(points.x) & (np.isfinite(points.y[:, k]) & inside)[:, None]
        patterns: dict[bytes, list[int]] = {}  # columns over the same rows are solved together
        for j, column in enumerate(np.ascontiguousarray(usable.T)):
            patterns.setdefault(column.tobytes(), []).append(j)
        for members in patterns.values():
            rows = np.nonzero(usable[:, members[0]])[0]
            part = _solve(points, rows, np.array(members), k, draws, scope, why, [cells[j] for j in members])
            solved.update({(j, k): cell for j, cell in zip(members, part, strict=True)})
    for j, (layer, cosine) in enumerate(cells):
        for k, y_name in enumerate(YS):
            yield {"layer": layer, "cosine": cosine, "y": y_name, **solved[j, k]}


def _solve(
    points: _Points,
    rows: np.ndarray,
    members: np.ndarray,
    k: int,
    draws: _Draws,
    scope: tuple[str, str],
    why: str | None,
    cells: list[tuple[int, str]],
) -> list[dict]:
    """The values of some columns of x, all over the same rows."""
    n = len(rows)
    x, y = points.x[np.ix_(rows, members)], points.y[rows, k]
    if why is None and n < MIN_PAIRS:
        why = f"{n} pairs with both values; at least {MIN_PAIRS} are needed"
    if why is None and np.ptp(y) == 0:
        why = f"{YS[k]} is {y[0]:g} for all {n} bystanders"
    if why is not None:
        return [_empty(n, why) for _ in members]
    people, block = points.persona[rows], points.adapter[rows]
    plain = dict.fromkeys(_PLAIN)
    values = spearman_and_pearson(x, y)
    if len(np.unique(block)) > 1:
        plain = dict(zip(_PLAIN, values, strict=True))
        x, y, values = _within_sources(x, y, block)
        if np.ptp(y) == 0:
            return [_empty(n, f"{YS[k]} is the same for all bystanders of each source") for _ in members]
    spearman, p_t, pearson, pearson_p = values
    tau = resample.kendall_tau(x.T, y)
    persons = len(np.unique(people))
    shuffled = resample.permute_spearman(
        x.T,
        y,
        draws.permutations,
        seed := draws.seed("permutation", *scope),
        person=people,
        block=block,
        family=np.array([COSINES.index(cosine) for _, cosine in cells]),
        workers=draws.workers,
    )
    low, high, se, ci_why = _interval(x.T, y, people, persons, spearman, draws, scope)
    defined = [cosine for (_, cosine), rho in zip(cells, spearman, strict=True) if not np.isnan(rho)]
    out = []
    for j, (layer, cosine) in enumerate(cells):
        if np.isnan(spearman[j]):
            out.append(_empty(n, f"{cosine} cosine at layer {layer} is the same for all {n} bystanders"))
            continue
        drawn = draws.permutations > 0
        cell = _empty(n, None) | {
            "spearman": float(spearman[j]),
            "spearman_p_t": float(p_t[j]),
            "spearman_p_perm": float(shuffled.p[j]) if drawn else None,
            "spearman_p_max": float(shuffled.p_max[j]) if drawn else None,
            "layers_tested": defined.count(cosine) if drawn else None,
            "pearson": float(pearson[j]),
            "pearson_p": float(pearson_p[j]),
            "kendall": float(tau[j]),
            **{name: None if value is None else float(value[j]) for name, value in plain.items()},
            "detectable": intervals.detectable(persons, POWER, ALPHA),
            "personas": persons,
            "permutations": draws.permutations or None,
            "permutation_seed": seed if drawn else None,
            "ci_reason": ci_why[j],
        }
        if ci_why[j] is None:
            known = {"spearman_ci_low": low[j], "spearman_ci_high": high[j], "spearman_se_z": se[j]}
            cell |= {name: float(value) if np.isfinite(value) else None for name, value in known.items()}
            cell |= {"bootstraps": draws.bootstraps, "bootstrap_seed": draws.seed("bootstrap", *scope)}
        out.append(cell)
    return out


def _within_sources(x: np.ndarray, y: np.ndarray, block: np.ndarray):
    """x, y ranked within each source, and (ρ of these, its p, r of values less their source's mean, its p)."""
    level = [centered_within(side, block) for side in (x, y[:, None])]
    x, y = within(x, block), within(y[:, None], block)[:, 0]
    return x, y, (*spearman_and_pearson(x, y)[:2], *spearman_and_pearson(level[0], level[1][:, 0])[2:])


def _interval(x, y, people, persons: int, spearman: np.ndarray, draws: _Draws, scope: tuple[str, str]):
    """(low, high, se of atanh ρ, why not) per column, from a bootstrap over persons."""
    nothing = np.full(len(x), np.nan)
    if draws.bootstraps < 2:
        return nothing, nothing, nothing, ["no bootstrap was asked for"] * len(x)
    if persons < MIN_BOOTSTRAP:
        why = f"{persons} personas; a bootstrap needs at least {MIN_BOOTSTRAP}"
        return nothing, nothing, nothing, [why] * len(x)
    drawn = resample.bootstrap_spearman(
        x, y, draws.bootstraps, draws.seed("bootstrap", *scope), person=people, workers=draws.workers
    )
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
    same = pairs.group_by(key[:-1]).agg(pl.col(YS).n_unique())
    if (same.select(pl.max_horizontal(YS)).to_series() > 1).any():
        raise ValueError("pairs: the rate of a bystander differs between layers; it is one measurement")


def _widen(group: pl.DataFrame) -> _Points:
    """Long pairs of one behavior and seed → one row per (adapter, persona), all layers beside each other."""
    layers = sorted(group["layer"].unique().to_list())
    adapters = group.select("adapter", "source").unique(maintain_order=True).rows()
    base = group.unique(["adapter", "persona"], keep="first").sort("adapter", "persona")
    columns = []
    for layer in layers:
        at = base.select("adapter", "persona").join(
            group.filter(layer=layer), on=["adapter", "persona"], how="left", maintain_order="left"
        )
        columns += [ties.floats(at[f"cosine_{cosine}"]) for cosine in COSINES]
    code = {adapter: i for i, (adapter, _) in enumerate(adapters)}
    people = {name: i for i, name in enumerate(sorted(base["persona"].unique()))}
    return _Points(
        adapter=np.array([code[name] for name in base["adapter"]], dtype=np.int64),
        persona=np.array([people[name] for name in base["persona"]], dtype=np.int64),
        category=np.array(base["category"].to_list(), dtype=object),
        x=np.column_stack(columns),
        y=_settled(ties.floats(base["rate"]), ties.floats(base["delta"])),
        adapters=adapters,
        layers=layers,
    )


def _settled(rate: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """(n, 2) of YS. A table of another maker may hold deltas as differences of floats: their ties are made whole."""
    sizes = np.abs(np.concatenate([rate, rate - delta, delta]))
    scale = np.nanmax(sizes, initial=0.0) if np.isfinite(sizes).any() else 0.0
    return np.column_stack([rate, ties.merged(delta, scale)])
