"""Does ρ stand when there are twice as many personas? ρ over random quarters and halves of the personas beside that over all.
Demands pairs, and the correlations' standard errors; leaves kinds of personas that were never asked to nobody: no split
of the personas at hand can speak for them (`without_category` leaves out one kind at a time).

Each of SPLITS times the personas are dealt into four quarters alike in categories, of which two make a half. Halves are
disjoint, so one half is to the other what a second study with other personas of the same kinds would be to a first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from leakfast.stats import intervals, ties
from leakfast.stats.correlations import COSINES, MIN_PAIRS, POOLED, YS
from leakfast.stats.ranking import ranks_within
from leakfast.stats.subsets import spearman_of_subsets
from leakfast.storage.seeds import derive_seed

SPLITS = 200
SIZES = {"quarter": 4, "half": 2, "all": 1}  # how many such sets the personas make
_Z = 1.959963984540054
_METHOD = "personas dealt into quarters at random, alike in categories; ranges over splits"
_WHOLE = "all personas: there are none left to set beside them"
_SPREAD = ("spearman", "spearman_sd", "spearman_low", "spearman_high")
_BESIDE = (
    "elsewhere change change_low change_high difference difference_low difference_high same_sign agree"
).split()
COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("behavior", "source", "adapter"), pl.String),
    "seed": pl.Int64,
    "cosine": pl.String,
    "y": pl.String,
    "layer": pl.Int32,
    "size": pl.String,
    "n": pl.Int64,
    **dict.fromkeys((*_SPREAD, "picked_share", *_BESIDE), pl.Float64),
    "splits": pl.Int64,
    "split_seed": pl.Int64,
    "reason": pl.String,
    "agree_reason": pl.String,
    "resampling_unit": pl.String,
    "method": pl.String,
}


def table(
    pairs: pl.DataFrame,
    correlations: pl.DataFrame,
    seed: int = 0,
    workers: int | None = None,
    splits: int = SPLITS,
) -> pl.DataFrame:
    """A row per behavior, training seed, source (and pooled), cosine, y, layer and size (quarter, half, all); and a row with
    a null layer for the layer that each set of personas would pick, the one with its largest |ρ|.

    `spearman`, `spearman_sd`, `spearman_low`, `spearman_high`: mean, standard deviation and 95 % range of ρ over all sets of
    that size. Estimand of the standard deviation over halves: the standard error of ρ over all N personas, as personas of
    the same mixture of categories vary (delete-half jackknife: Shao and Wu 1989), and 1/√2 of that of a study with N/2.
    `change`: ρ of the set with its sibling, twice as many personas, less its own; `difference`: mean |ρ − its sibling's|,
    and the 95 % range of ρ − its sibling's. Both orders are counted, so that of a fixed layer the range has 0 in its middle.
    `same_sign`: share of siblings that both have the sign of ρ over all. `agree`: share of siblings whose difference has a
    95 % interval with 0 in it, z ± 1.96·√(2N/n)·spearman_se_z, with n personas in each and the standard error
    of `correlations` (bootstrap over personas); about 0.95 where personas are as good as drawn independently, above it where
    categories differ, since the deal keeps their mixture. `picked_share`: of sets that pick this layer; with a null layer,
    that pick the layer all personas do. There ρ is in its own direction (|ρ|), `elsewhere` is the sibling's ρ at that layer
    and in that direction, and `change` is at that layer too: below 0 by what the pick had added.

    It answers whether ρ and its layer hang on which personas of these kinds were asked, and how far two studies half as
    large would differ. It does not say that ρ holds for other kinds of personas, questions or sources, nor that the
    cosine is the cause. Resampling unit: the persona, with its rates under all sources. Same pairs and seed, same bits,
    whatever the order of rows and the number of threads. Raises ValueError for splits below 1."""
    if splits < 1:
        raise ValueError(f"growth: {splits} splits; at least 1 is needed")
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(adapter=pl.col("source"))
    errors = _errors(correlations)
    rows: list[dict] = []
    for group in pairs.partition_by("behavior", "seed", maintain_order=True):
        behavior, train_seed = group["behavior"][0], group["seed"][0]
        drawn = derive_seed("growth", seed, behavior, train_seed)
        people = group.unique("persona").sort("persona").select("persona", "category")
        deal = quarters(people["category"].to_list(), splits, drawn)
        place = dict(zip(people["persona"], range(people.height), strict=True))
        told = {"splits": splits, "split_seed": drawn, "resampling_unit": "persona", "method": _METHOD}
        for adapter, source, part in _scopes(group):
            key = {"behavior": behavior, "seed": train_seed, "source": source, "adapter": adapter}
            own = {cell[3:]: se for cell, se in errors.items() if cell[:3] == (behavior, train_seed, adapter)}
            for row in _rows(part, (deal, place), own, workers):
                rows.append(told | key | row)
    return pl.DataFrame(rows, schema=COLUMNS)


def quarters(categories: list[str | None], splits: int, seed: int) -> np.ndarray:
    """(splits, P) int8: the quarter, 0 to 3, that each persona falls into; 0 and 1 make a half.

    Personas are put in a random order, category by category, and every four in a row go to four different quarters: sizes
    differ by one at most, and a category of c personas gives each half c/2, or up to one more or fewer. Personas without a
    category are a category together."""
    rng = np.random.Generator(np.random.PCG64(seed))
    names = sorted({c or "" for c in categories})
    code = np.array([names.index(c or "") for c in categories])
    out = np.empty((splits, len(code)), np.int8)
    for row in out:
        order = np.lexsort((rng.random(len(code)), rng.permutation(len(names))[code]))
        fours = -(-len(code) // 4)
        dealt = np.argsort(rng.random((fours, 4)), axis=1).ravel()
        row[order] = dealt[: len(code)]
    return out


def _scopes(group: pl.DataFrame) -> list[tuple[str | None, str, pl.DataFrame]]:
    """Each adapter's pairs, and all together where every source has one adapter."""
    adapters = group.select("adapter", "source").unique(maintain_order=True).rows()
    scopes: list[tuple[str | None, str, pl.DataFrame]] = [
        (adapter, source, group.filter(adapter=adapter)) for adapter, source in adapters
    ]
    if len(scopes) > 1 and group["source"].n_unique() == len(scopes):
        scopes.append((None, POOLED, group))
    return scopes


def _rows(
    part: pl.DataFrame, dealt: tuple[np.ndarray, dict[str, int]], errors: dict, workers: int | None
) -> Iterator[dict[str, Any]]:
    """errors: (layer, cosine, y) → standard error of atanh ρ over all personas."""
    deal, place = dealt
    one_each = part.unique(["adapter", "persona"]).sort("adapter", "persona")
    block = one_each["adapter"].rank("dense").to_numpy().astype(np.int64)
    at = np.array([place[name] for name in one_each["persona"]])
    for cosine in COSINES:
        wide = part.pivot("layer", index=["adapter", "persona"], values=f"cosine_{cosine}")
        wide = wide.sort("adapter", "persona")
        layers = [layer for layer in sorted(part["layer"].unique()) if wide[str(layer)].count()]
        x = np.column_stack([np.empty((wide.height, 0)), *(ties.floats(wide[str(k)]) for k in layers)])
        sides: dict[bytes, list[tuple[str, np.ndarray]]] = {}
        kept_of: dict[str, np.ndarray] = {}
        why_of: dict[str, str] = {}
        for y_name in YS:
            y = ties.floats(one_each[y_name])
            kept = kept_of[y_name] = np.isfinite(x).all(1) & np.isfinite(y)
            if not layers or kept.sum() < MIN_PAIRS:
                n = kept.sum() if layers else 0
                why_of[y_name] = f"{n} pairs with both values; at least {MIN_PAIRS} are needed"
            elif np.ptp(y[kept]) == 0:
                why_of[y_name] = f"{y_name} is {y[kept][0]:g} for all {kept.sum()} bystanders"
            else:
                sides.setdefault(kept.tobytes(), []).append((y_name, y[kept]))
        sets: dict[str, _Sets] = {}
        for several in sides.values():
            kept = kept_of[several[0][0]]
            found = _sets(x[kept], [y for _, y in several], (block[kept], at[kept], deal), workers)
            sets |= {y_name: one for (y_name, _), one in zip(several, found, strict=True)}
        made: dict[tuple, list[dict]] = {}
        for y_name in YS:
            told = {"cosine": cosine, "y": y_name}
            if (why := why_of.get(y_name)) is not None:
                n = int(kept_of[y_name].sum())
                yield told | {"size": "all", "n": n, "reason": why, "agree_reason": why}
                continue
            ses = tuple(errors.get((layer, cosine, y_name)) for layer in layers)
            key = (id(sets[y_name]), ses)
            if key not in made:
                made[key] = list(_told(sets[y_name], layers, ses))
            for row in made[key]:
                yield told | row


@dataclass(frozen=True)
class _Sets:
    """ρ at each layer: of quarters (S, 4, K), of halves (S, 2, K), of all (K,); people: personas of all, and of the smallest
    quarter and half."""

    quarter: np.ndarray
    half: np.ndarray
    all: np.ndarray
    people: dict[str, int]


def _sets(x: np.ndarray, ys: list[np.ndarray], who: tuple, workers: int | None) -> list[_Sets]:
    """Of each of ys (n,), all over the same rows; where one is ranked as another (a baseline of 0) they are the same object."""
    block, at, deal = who
    ranks, _ = ranks_within(np.stack(ys), block)
    first = [next(j for j in range(k + 1) if np.array_equal(ranks[j], ranks[k])) for k in range(len(ys))]
    chosen = sorted(set(first))
    mine = deal[:, at]
    member = np.concatenate(
        [
            (mine[:, None] == np.arange(4)[:, None]).reshape(-1, len(at)),
            (mine[:, None] // 2 == np.arange(2)[:, None]).reshape(-1, len(at)),
            np.ones((1, len(at)), dtype=bool),
        ]
    )
    rho = spearman_of_subsets(x.T, np.stack([ys[k] for k in chosen]), member, block, workers)
    persons = np.unique(at)
    sizes = [np.array([(deal[:, persons] // d == k).sum(1) for k in range(4 // d)]) for d in (1, 2)]
    people = {"quarter": int(sizes[0].min()), "half": int(sizes[1].min()), "all": len(persons)}
    s, k = len(deal), x.shape[1]
    rho = np.where((member.sum(1) >= MIN_PAIRS)[:, None, None], rho, np.nan)
    made = {
        one: _Sets(
            np.ascontiguousarray(rho[: 4 * s, j]).reshape(s, 4, k),
            np.ascontiguousarray(rho[4 * s : 6 * s, j]).reshape(s, 2, k),
            np.ascontiguousarray(rho[-1, j]),
            people,
        )
        for j, one in enumerate(chosen)
    }
    return [made[one] for one in first]


def _told(sets: _Sets, layers: list[int], ses: Sequence[float | None]) -> Iterator[dict[str, Any]]:
    """The rows of one source, cosine and y. ses: standard error of atanh ρ at each layer, over all personas."""
    own = {"quarter": sets.quarter, "half": sets.half, "all": sets.all[None, None]}
    larger = {"quarter": np.repeat(sets.half, 2, axis=1), "half": np.broadcast_to(sets.all, sets.half.shape)}
    best = _pick(sets.all[None])[0]
    for size, rho in own.items():
        whole = size == "all"
        pick = _pick(rho.reshape(-1, len(layers)))
        other = rho if whole else rho.reshape(len(rho), -1, 2, len(layers))[:, :, ::-1].reshape(rho.shape)
        told = {"size": size, "n": sets.people[size]}
        wider = np.sqrt(2 * sets.people["all"] / max(1, sets.people[size]))  # an empty set has no ρ to widen
        flat, beside = rho.reshape(-1, len(layers)), other.reshape(-1, len(layers))
        above = None if whole else larger[size].reshape(-1, len(layers))
        sides = tuple(
            None if side is None else np.ascontiguousarray(side.T) for side in (flat, beside, above)
        )
        values = _values(sides, np.sign(sets.all))
        agreed = [{}] * len(layers) if whole else _agreed(sides, ses, wider)
        for k, layer in enumerate(layers):
            row = told | {"layer": layer, "picked_share": float((pick == k).mean())}
            if np.isnan(sets.all[k]):
                why = "the cosine is the same for all bystanders"
                yield row | {"picked_share": None, "reason": why, "agree_reason": why}
                continue
            row |= values[k]
            yield row | ({} if row.get("reason") else agreed[k])
        if len(layers) > 1 and best >= 0:
            rows = np.arange(len(flat))
            sign = np.sign(flat[rows, pick])
            known = pick >= 0
            sides = tuple(
                None if side is None else np.where(known, sign * side[rows, pick], np.nan)[None]
                for side in (flat, beside, above)
            )
            row = told | {"layer": None, "picked_share": float((pick == best).mean())}
            yield {
                **row,
                "agree_reason": "the layer is picked anew in each set",
                **_values(sides, np.ones(1))[0],
            }


def _pick(rho: np.ndarray) -> np.ndarray:
    """(M,) the column of each row's largest |ρ|, -1 where there is none."""
    size = np.nan_to_num(np.abs(rho), nan=-1.0)
    return np.where(size.max(1) >= 0, size.argmax(1), -1)


def _values(sides: tuple, sign: np.ndarray) -> list[dict[str, Any]]:
    """Of each layer the spread of the sets' own ρ, and what stands beside them: the sibling's, and that of both together.
    sides: (K, M) each, sign: (K,) of ρ over all."""
    own, other, above = sides
    lost = np.isnan(own) | np.isnan(other)
    gone = lost.mean(1)
    out: list[dict[str, Any]] = [{} for _ in own]
    whole = np.nonzero(~lost.any(1))[0]
    groups: list[tuple[Any, Any]] = [
        (whole, slice(None)),
        *(([k], ~lost[k]) for k in np.nonzero(lost.any(1))[0]),
    ]
    for members, kept in groups:
        if not len(members):
            continue
        if gone[members[0]] > intervals.TOO_FEW_DRAWS:
            why = f"{gone[members[0]]:.0%} of the sets are too small or do not vary"
            out[members[0]] = {"reason": why, "agree_reason": why, "picked_share": None}
            continue
        a, b = (side[members][:, kept] for side in (own, other))
        if above is None:
            told = [{"spearman": float(v), "reason": _WHOLE, "agree_reason": _WHOLE} for v in a[:, 0]]
        else:
            told = _spread(a, b, above[members][:, kept], sign[members])
        for k, one in zip(members, told, strict=True):
            out[k] = one
    return out


def _spread(own: np.ndarray, other: np.ndarray, above: np.ndarray, sign: np.ndarray) -> list[dict[str, Any]]:
    """The values of layers in which every set has a ρ, (K, M) each."""
    apart, grown = own - other, above - own
    out = {"spearman": own.mean(1), "spearman_sd": own.std(1, ddof=1), "elsewhere": other.mean(1)}
    out |= {"change": grown.mean(1), "difference": np.abs(apart).mean(1)}
    for name, values in (("spearman", own), ("change", grown), ("difference", apart)):
        ends = np.quantile(values, [0.025, 0.975], axis=1)
        out |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
    of_all = sign[:, None]
    out["same_sign"] = ((np.sign(own) == of_all) & (np.sign(other) == of_all)).mean(1)
    return [
        dict(zip(out, row, strict=True))
        for row in zip(*(values.tolist() for values in out.values()), strict=True)
    ]


def _agreed(sides: tuple, ses: Sequence[float | None], wider: float) -> list[dict[str, Any]]:
    """Of each layer the share of siblings whose difference has an interval with 0 in it. ses: over all personas; wider:
    times that, of the difference of two such sets."""
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.abs(np.arctanh(sides[0]) - np.arctanh(sides[1]))
        known = (~np.isnan(apart)).sum(1)  # both ±1 alike are no difference that has a size
        bar = _Z * np.array([np.nan if se is None else se for se in ses]) * wider
        share = ((apart <= bar[:, None]).sum(1) / known).tolist()
    return [
        {"agree_reason": "no standard error of ρ over personas"} if se is None else {"agree": one}
        for se, one in zip(ses, share, strict=True)
    ]


def _errors(correlations: pl.DataFrame) -> dict[tuple, float]:
    """(behavior, seed, adapter, layer, cosine, y) → standard error of atanh ρ over personas, where there is one."""
    whole = correlations.filter(pl.col("category").is_null() & pl.col("spearman_se_z").is_not_null())
    key = ["behavior", "seed", "adapter", "layer", "cosine", "y"]
    return {tuple(row[:-1]): row[-1] for row in whole.select(*key, "spearman_se_z").rows()}
