"""Does a bystander's cosine to the source order how much of the behavior it shows? Spearman and
Pearson per source and pooled, per category and layer. Demands a pairs table; leaves intervals to others.

Two p-values stand beside each Spearman ρ and answer different questions. `spearman_p_t` treats the n
pairs as independent draws (the usual t approximation; what the published study printed).
`spearman_p_perm` shuffles which persona has which rate: the resampling unit is the persona, and for
the pooled rows one shuffle moves a persona's rates under all sources together (Mantel 1967), so the
same personas met five times do not count as five times the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import stdtr
from scipy.stats import rankdata

from leakfast import schema
from leakfast.config import derive_seed

COSINES = ("centered", "raw")
YS = ("rate", "delta")
POOLED = "pooled"
PERMUTATIONS = 9_999
MIN_PAIRS = 4
_CHUNK = 2_000  # permutations at once: 2,000 × 550 pairs × 8 bytes = 9 MB
_TIE = 1e-12  # two ρ closer than this are one: keeps p the same bits for any summation order

_EXTRA = {
    "adapter": pl.String,
    "seed": pl.Int64,
    "reason": pl.String,  # why a value is null
    "permutations": pl.Int64,
    "permutation_seed": pl.Int64,
    "resampling_unit": pl.String,
}


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
    progress: Callable[[int, int, str], None] | None = None,
) -> pl.DataFrame:
    """Schema `correlations` (+ adapter, seed, reason, permutations, permutation_seed, resampling_unit).

    `pairs`: schema `pairs`; a column `adapter` is optional (the source then names it). One row per
    behavior, training seed, source (and `pooled` over sources), category (and null for all), layer,
    cosine (centered, raw) and y (rate, delta). Pairs with a null on either side are left out, and `n`
    says how many are left. Estimand: rank (Spearman) or linear (Pearson) association over the given
    bystanders. p-values are two-sided; the permutation one is (1 + #{|ρ*| ≥ |ρ|}) / (1 + R) and never
    0. Fewer than 4 pairs, or a side that does not vary, leave the values null and say why in `reason`.
    Same pairs and seed, same bits, whatever the order of the rows.

    Raises ValueError for NaN or infinite input (tables hold null instead), for a pair that stands
    twice, and for a negative number of permutations (0 leaves `spearman_p_perm` null).
    """
    schema.check(pairs, "pairs")
    if permutations < 0:
        raise ValueError(f"correlate: {permutations} permutations; give 0 or more")
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(pl.col("source").alias("adapter"))
    _refuse(pairs)
    groups = pairs.partition_by("behavior", "seed", maintain_order=True, include_key=True)
    rows: list[dict] = []
    for number, group in enumerate(groups):
        behavior, train_seed = group["behavior"][0], group["seed"][0]
        points = _widen(group)
        for cell in _cells(points, permutations, (seed, behavior, train_seed)):
            rows.append({"behavior": behavior, "seed": train_seed, **cell})
        if progress:
            progress(number + 1, len(groups), f"correlations of {behavior}")
    columns = schema.columns("correlations")
    columns |= {name: dtype() for name, dtype in _EXTRA.items()}
    return schema.check(pl.DataFrame(rows, schema=columns), "correlations")


def spearman_and_pearson(x, y) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Correlations of every column of x with y, and their two-sided p by the t distribution.

    x (n, K), y (n,) float64, finite. Returns (spearman, spearman_p, pearson, pearson_p), each (K,),
    NaN where a side does not vary. Equal to `scipy.stats.spearmanr` and `pearsonr` per column; ties
    get average ranks. Raises ValueError for fewer than 3 rows, or values that are not finite.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x must be (n, K) and y (n,), got {x.shape} and {y.shape}")
    if len(y) < 3:
        raise ValueError(f"a correlation needs at least 3 pairs, got {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a correlation needs finite values")
    spearman = np.clip(_unit(rankdata(x, axis=0)).T @ _unit(rankdata(y)[:, None])[:, 0], -1, 1)
    pearson = np.clip(_unit(x).T @ _unit(y[:, None])[:, 0], -1, 1)
    return spearman, p_by_t(spearman, len(y)), pearson, p_by_t(pearson, len(y))


def p_by_t(r, n: int) -> np.ndarray:
    """Two-sided p of a correlation r over n pairs: t = r·sqrt((n−2)/(1−r²)) with n−2 degrees of freedom.

    Exact for Pearson under a bivariate normal, an approximation for Spearman."""
    r = np.asarray(r, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(r) * np.sqrt((n - 2) / ((1 + r) * (1 - r)))
    return 2 * stdtr(n - 2, -t)


def joint_permutations(
    rng: np.random.Generator, persona: np.ndarray, block: np.ndarray, count: int
) -> np.ndarray:
    """`count` shuffles of persona identity, the same one in every block: (count, n) row indices.

    `persona`, `block`: (n,) integer codes; a persona stands at most once in a block (a block is one
    source's bystanders). Row j of the result maps position i to the position, in i's own block, of the
    persona that i's persona is sent to. Where that persona is absent from the block (a source is not
    its own bystander) the shuffle is followed on to the next one present, which keeps the map a
    bijection and, for any single block, uniform over all of them.
    """
    people, who = np.unique(persona, return_inverse=True)
    blocks, where = np.unique(block, return_inverse=True)
    position = np.full((len(blocks), len(people)), -1)
    position[where, who] = np.arange(len(persona))
    if (position >= 0).sum() != len(persona):
        raise ValueError("a persona stands twice in one block")
    shuffled = rng.permuted(np.tile(np.arange(len(people)), (count, 1)), axis=1)
    sent = shuffled[:, who]
    out = position[where, sent]
    while (absent := out < 0).any():
        row, column = np.nonzero(absent)
        sent[row, column] = shuffled[row, sent[row, column]]
        out[row, column] = position[where[column], sent[row, column]]
    return out


def _cells(points: _Points, permutations: int, seed_parts: tuple) -> Iterator[dict]:
    everyone = np.ones(len(points.persona), dtype=bool)
    categories = list(dict.fromkeys(c for c in points.category if c is not None))
    scopes = [
        (adapter, source, points.adapter == code, "persona")
        for code, (adapter, source) in enumerate(points.adapters)
    ]
    sources = [source for _, source in points.adapters]
    twins = sorted({source for source in sources if sources.count(source) > 1})
    scopes.append((None, POOLED, everyone, "persona across sources"))
    for adapter, source, rows, unit in scopes:
        for category in [None, *categories]:
            inside = rows if category is None else rows & (points.category == category)
            seed = derive_seed("permutation", *seed_parts, adapter or POOLED, category or "")
            why = None
            if source == POOLED and twins:
                why = f"{', '.join(twins)} has more than one adapter: a pool takes one for each source"
            for cell in _grid(points, inside, permutations, seed, why):
                yield {
                    "source": source,
                    "adapter": adapter,
                    "category": category,
                    "resampling_unit": unit if cell["permutations"] else None,
                    **cell,
                }


def _grid(
    points: _Points, inside: np.ndarray, permutations: int, seed: int, why: str | None
) -> Iterator[dict]:
    """Every layer × cosine × y over the rows `inside`."""
    cells = [(layer, cosine) for layer in points.layers for cosine in COSINES]
    solved: dict[tuple[int, int], dict] = {}
    for k, y_name in enumerate(YS):
        usable = np.isfinite(points.x) & (np.isfinite(points.y[:, k]) & inside)[:, None]
        patterns, which = np.unique(usable, axis=1, return_inverse=True)
        for pattern in range(patterns.shape[1]):
            rows = np.nonzero(patterns[:, pattern])[0]
            members = np.nonzero(which.ravel() == pattern)[0]
            for j, cell in zip(
                members,
                _solve(points, rows, members, k, permutations, seed, why, y_name, cells),
                strict=True,
            ):
                solved[int(j), k] = cell
    for j, (layer, cosine) in enumerate(cells):
        for k, y_name in enumerate(YS):
            yield {"layer": layer, "cosine": cosine, "y": y_name, **solved[j, k]}


def _solve(
    points: _Points,
    rows: np.ndarray,
    members: np.ndarray,
    k: int,
    permutations: int,
    seed: int,
    why: str | None,
    y_name: str,
    cells: list[tuple[int, str]],
) -> list[dict]:
    n = len(rows)
    x, y = points.x[np.ix_(rows, members)], points.y[rows, k]
    if why is None and n < MIN_PAIRS:
        why = f"{n} pairs with both values; at least {MIN_PAIRS} are needed"
    if why is None and np.ptp(y) == 0:
        why = f"{y_name} is {y[0]:g} for all {n} bystanders"
    if why is not None:
        return [_empty(n, why) for _ in members]
    spearman, p_t, pearson, pearson_p = spearman_and_pearson(x, y)
    p_perm = _permutation_p(x, y, spearman, points.persona[rows], points.adapter[rows], permutations, seed)
    out = []
    for j, member in enumerate(members):
        if np.isnan(spearman[j]):
            layer, cosine = cells[member]
            out.append(_empty(n, f"{cosine} cosine at layer {layer} is the same for all {n} bystanders"))
            continue
        out.append(
            {
                "n": n,
                "spearman": float(spearman[j]),
                "spearman_p_t": float(p_t[j]),
                "spearman_p_perm": float(p_perm[j]) if permutations else None,
                "pearson": float(pearson[j]),
                "pearson_p": float(pearson_p[j]),
                "reason": None,
                "permutations": permutations or None,
                "permutation_seed": seed if permutations else None,
            }
        )
    return out


def _permutation_p(
    x: np.ndarray,
    y: np.ndarray,
    observed: np.ndarray,
    persona: np.ndarray,
    block: np.ndarray,
    permutations: int,
    seed: int,
) -> np.ndarray:
    """Ranks once, shuffles y's ranks, one matrix product for all columns of x."""
    rng = np.random.Generator(np.random.PCG64(seed))
    ranks_x, ranks_y = _unit(rankdata(x, axis=0)), _unit(rankdata(y)[:, None])[:, 0]
    at_least = np.ones(x.shape[1], dtype=np.int64)
    for start in range(0, permutations, _CHUNK):
        shuffles = joint_permutations(rng, persona, block, min(_CHUNK, permutations - start))
        drawn = ranks_y[shuffles] @ ranks_x
        at_least += (np.abs(drawn) >= np.abs(observed) - _TIE).sum(axis=0)
    return at_least / (permutations + 1)


def _unit(columns: np.ndarray) -> np.ndarray:
    """Each column centered and of length 1; NaN for a column that does not vary."""
    low, spread = columns.min(axis=0), np.ptp(columns, axis=0)
    with np.errstate(invalid="ignore"):
        scaled = (columns - low) / spread  # 0/0 is NaN: what does not vary has no correlation
    scaled -= scaled.mean(axis=0)
    return scaled / np.linalg.norm(scaled, axis=0)


def _empty(n: int, reason: str) -> dict:
    names = ("spearman", "spearman_p_t", "spearman_p_perm", "pearson", "pearson_p")
    names += ("permutations", "permutation_seed")
    return {"n": n, "reason": reason, **dict.fromkeys(names)}


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
            group.filter(pl.col("layer") == layer),
            on=["adapter", "persona"],
            how="left",
            maintain_order="left",
        )
        columns += [_floats(at[f"cosine_{cosine}"]) for cosine in COSINES]
    code = {adapter: i for i, (adapter, _) in enumerate(adapters)}
    people = {name: i for i, name in enumerate(sorted(base["persona"].unique()))}
    return _Points(
        adapter=np.array([code[name] for name in base["adapter"]], dtype=np.int64),
        persona=np.array([people[name] for name in base["persona"]], dtype=np.int64),
        category=np.array(base["category"].to_list(), dtype=object),
        x=np.column_stack(columns),
        y=np.column_stack([_floats(base[name]) for name in YS]),
        adapters=adapters,
        layers=layers,
    )


def _floats(series: pl.Series) -> np.ndarray:
    return series.cast(pl.Float64).fill_null(float("nan")).to_numpy()
