"""Means of ρ over sources and over training seeds, and what one more would show. Demands pairs, their correlations and
counts per question; draws random signs alone, for the noise of cells.

The estimates of one mean share their personas and questions, and a persona that leaks under one source leaks under the
others, so their errors go together. With z = atanh ρ of k estimates, S² their variance and c the covariance of two
estimates' errors,

    Var(z̄) = S²/k + c        (S² holds what differs between estimates alone: E S² = τ² + v − c, v the error variance of one)

c and v come from leaving out each persona and each question from all estimates at once: personas + questions − cells, as in
`two_way`. S² has k − 1 degrees of freedom and c those of the personas or questions; the t quantile is the geometric mean of
theirs, weighted by the squares of the variances, as Satterthwaite (1946) weighs degrees of freedom. For normal z, three
estimates and 20 questions that covers 94.8 to 96.1 %, whatever the two sizes are; weighted by the variances themselves 94.8 to
97.0, by Cochran and Cox's arithmetic mean (1950, Experimental Designs, 4.14) 95.0 to 97.4, with Satterthwaite's degrees of
freedom 92.4 to 95.2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import chdtrc

from leakfast.stats import intervals
from leakfast.stats.compiled import leave_one_out
from leakfast.stats.correlations import COSINES, POOLED, YS
from leakfast.stats.ranking import alike, average_ranks
from leakfast.stats.two_way import Asked, asked_of
from leakfast.storage.seeds import derive_seed

MIN_PAIRS = 5
_SIGNS = 200  # tables of random signs that cells are turned by
_ENDS = ("mean", "predict", "predict_new")
_FLOATS = (
    "mean low high tau2 i2 q q_p predict_low predict_high predict_new_low predict_new_high own_se_z shared_se_z"
).split()
_METHOD = "Fisher z; plain mean, spread between estimates and jackknifed covariance, t weighted by variances"
_NO_VARIANCE = f"a ρ of ±1 or fewer than {MIN_PAIRS} pairs has no variance on Fisher's scale"
_SEVERAL = "has more than one adapter: a mean over sources takes one for each"
_KEY = ["behavior", "layer", "cosine", "y"]


def table(
    correlations: pl.DataFrame, pairs: pl.DataFrame, questions: pl.DataFrame, seed: int = 0
) -> pl.DataFrame:
    """A row per behavior, layer, cosine, y and what is averaged (`over`): sources of one training seed (source null), or
    seeds of one source or of the pool (seed null).

    mean, low, high: ρ of the mean of z over sources (or seeds) like these, with a 95 % interval over other sources, personas
    and questions. predict_*: 95 % interval for the ρ that one more source would show over the same personas and questions,
    z̄ ± t(k − 1)·S·√(1 + 1/k), exact where z is normal; predict_new_*: over as many other personas and questions,
    variance S²(1 + 1/k) + 2c. tau2 = S² − (v − c), no less than 0; q = (k − 1)·S² / (v − c). own_se_z = √(v − c),
    shared_se_z = √c. Assumes estimates exchangeable; without counts per question c and v are over personas alone, said in
    `resampling_unit`. `reason` says why something is null."""
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(adapter=pl.col("source"))
    whole = correlations.filter(pl.col("category").is_null() & pl.col("spearman").is_not_null())
    rows: list[dict] = []
    for group in whole.partition_by("behavior", maintain_order=True):
        rows += _behavior(group, pairs.filter(behavior=group["behavior"][0]), questions, seed)
    columns = {name: correlations.schema[name] for name in [*_KEY, "seed", "source"]}
    columns |= {"over": pl.String, "k": pl.Int64, **dict.fromkeys(_FLOATS, pl.Float64)}
    columns |= {"personas": pl.Int64, "questions": pl.Int64}
    columns |= dict.fromkeys(("resampling_unit", "reason", "method"), pl.String)
    return pl.DataFrame(rows, schema=columns)


def _behavior(group: pl.DataFrame, pairs: pl.DataFrame, questions: pl.DataFrame, seed: int) -> Iterator[dict]:
    wanted = list(_groups(group))
    if not wanted:
        return
    layers = sorted(pairs["layer"].unique())
    counts = questions.filter(behavior=group["behavior"][0]) if questions.height else questions
    people = sorted(pairs["persona"].unique())
    parts, of_seed = {}, {}
    for (adapter, train_seed), part in pairs.sort("adapter").group_by("adapter", "seed", maintain_order=True):
        parts[adapter] = Part(asked_of(part, counts, layers), people)
        of_seed.setdefault(train_seed, []).append(adapter)
    drawn = derive_seed("signs of cells", seed, group["behavior"][0])
    errors = {YS[0]: errors_of(parts, of_seed, YS[0], drawn)}
    same = all(part.asked.same(*YS) for part in parts.values())
    errors[YS[1]] = errors[YS[0]] if same else errors_of(parts, of_seed, YS[1], drawn)
    cells = [(layer, cosine) for layer in layers for cosine in COSINES]
    for told, members in wanted:
        if told["over"] == "sources" and (twins := _twins(members)):
            yield told | {"k": len(members), "method": _METHOD, "reason": f"{', '.join(twins)} {_SEVERAL}"}
            continue
        names = [row["adapter"] or (POOLED, row["seed"]) for row in members]
        column = cells.index((told["layer"], told["cosine"]))
        yield told | {"method": _METHOD} | _mean(members, errors[told["y"]].among(names, column))


def _twins(members: list[dict]) -> list[str]:
    """Sources with more than one adapter among the estimates, such as seeds that no card tells apart."""
    sources = [row["source"] for row in members]
    return sorted({source for source in sources if sources.count(source) > 1})


def _groups(group: pl.DataFrame) -> Iterator[tuple[dict, list[dict]]]:
    singles = group.filter(pl.col("source") != POOLED)
    for over, frame, more in (("sources", singles, "seed"), ("seeds", group, "source")):
        key = [*_KEY, more]
        if over == "seeds":
            frame = frame.filter(pl.col("seed").n_unique().over(key) > 1)
        members: dict[tuple, list[dict]] = {
            names: [] for names in frame.select(key).unique(maintain_order=True).rows()
        }
        needed = list(dict.fromkeys([*key, "source", "seed", "adapter", "spearman", "n"]))
        for row in frame.select(needed).sort("source", "seed", "adapter").rows(named=True):
            members[tuple(row[name] for name in key)].append(row)
        for names, rows in members.items():
            yield dict(zip(key, names, strict=True)) | {"over": over}, rows


@dataclass(frozen=True)
class _Shared:
    """Covariance (k, k) of the errors of z that personas, questions and cells give, and the number of personas and
    questions; `asked` None: the covariance is over personas alone."""

    personas: np.ndarray
    questions: np.ndarray
    cells: np.ndarray
    people: int
    asked: int | None


def _mean(members: list[dict], shared: _Shared) -> dict:
    rho, n = (np.array([row[name] for row in members]) for name in ("spearman", "n"))
    kept = {"k": len(rho), **dict.fromkeys(_FLOATS), "personas": shared.people, "questions": shared.asked}
    kept["resampling_unit"] = "persona" if shared.asked is None else "persona and question"
    if (np.abs(rho) >= 1 - 1e-12).any() or (n < MIN_PAIRS).any():
        return kept | {"reason": _NO_VARIANCE}
    z, k = np.arctanh(rho), len(rho)
    kept["mean"] = float(np.tanh(z.mean()))
    if k == 1:
        return kept | {"reason": "one estimate: no spread to judge by"}
    own, common = zip(
        *(split(side) for side in (shared.personas, shared.questions, shared.cells)), strict=True
    )
    if not np.isfinite([own, common]).all():
        return kept | {"reason": "ρ is not defined without one of the personas or questions"}
    v, c = (max(a + b - ab, a, b, 0.0) for a, b, ab in (own, common))
    apart = max(0.0, v - c)
    spread = float(z.var(ddof=1))
    q = (k - 1) * spread / apart if apart > 0 else None
    df = (k - 1, min(shared.people, shared.asked or shared.people) - 1)
    halves = (spread / k, c), (spread * (1 + 1 / k), 0.0), (spread * (1 + 1 / k), 2 * c)
    ends = dict(zip(_ENDS, (half_width(sizes, df) for sizes in halves), strict=True))
    kept |= {
        f"{name}_{end}" if name != "mean" else end: float(np.tanh(z.mean() + sign * half))
        for name, half in ends.items()
        for end, sign in (("low", -1), ("high", 1))
    }
    return kept | {
        "tau2": max(0.0, spread - apart),
        "q": q,
        "q_p": None if q is None else float(chdtrc(k - 1, q)),
        "i2": None if q is None else (max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0),
        "own_se_z": float(np.sqrt(apart)),
        "shared_se_z": float(np.sqrt(c)),
        "reason": None,
    }


def split(covariance: np.ndarray) -> tuple[float, float]:
    """Mean of the diagonal, mean beside it."""
    k = len(covariance)
    own = float(np.trace(covariance)) / k
    return own, (float(covariance.sum()) / k - own) / (k - 1)


def half_width(variances: Sequence[float], df: Sequence[int]) -> float:
    """Half the width of a 95 % interval whose variance is a sum of independent estimates V_i with df f_i:

    √ΣV_i · exp(Σ V_i² ln t(f_i) / Σ V_i²), t the 97.5 % quantile."""
    whole = sum(variances)
    if whole <= 0:
        return 0.0
    shares = [(part / whole) ** 2 for part in variances]
    log_t = sum(
        share * float(np.log(intervals.t_half(1.0, free))) for share, free in zip(shares, df, strict=True)
    )
    return float(np.exp(log_t / sum(shares)) * np.sqrt(whole))


class Part:
    """One adapter among all personas of its behavior: sums of products of ranks, whole and without each."""

    def __init__(self, asked: Asked, people: list[str]):
        self.asked, self.people = asked, people
        place = {name: i for i, name in enumerate(people)}
        self.place = np.array([place[name] for name in asked.people])

    def sums(self, y: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Σ of products of ranks of x with each column of values (P, M), of squares of x and of values: (K, M) each; ranks
        are centered and over their number. NaN in values: not known."""
        x = self.asked.x
        usable = np.isfinite(x) & (np.isfinite(self.asked.whole[y]) & np.isfinite(values).all(1))[:, None]
        shape = (x.shape[1], values.shape[1])
        xy, xx, yy = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
        for rows, members in _patterns(usable):
            a, b = (_ranks(side) for side in (x[np.ix_(rows, members)], values[rows]))
            xy[members], xx[members], yy[members] = a.T @ b, (a * a).sum(0)[:, None], (b * b).sum(0)
        return xy, xx, yy

    def without_each(self, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same sums of the values themselves without each persona of `people`: (K, people) each; those without a persona
        that is not there are the whole ones."""
        x, whole = self.asked.x, self.asked.whole[y]
        out = [np.repeat(side, len(self.people), axis=1) for side in self.sums(y, whole[:, None])]
        for rows, members in _patterns(np.isfinite(x) & np.isfinite(whole)[:, None]):
            a = np.ascontiguousarray(x[np.ix_(rows, members)].T)
            found = np.empty((3, len(members), rows.sum()))
            leave_one_out(a, whole[rows], average_ranks(a), average_ranks(whole[None, rows])[0], found)
            for side, filled in zip(found, out, strict=True):
                filled[np.ix_(members, self.place[rows])] = side
        return out[0], out[1], out[2]


def _patterns(usable: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, columns) of each set of columns that are usable in the same rows, at least four."""
    for rows, columns in alike(usable):
        if rows.sum() >= 4:
            yield rows, columns


def _ranks(values: np.ndarray) -> np.ndarray:
    n = len(values)
    return (average_ranks(values.T).T - (n + 1) / 2) / n


@dataclass(frozen=True)
class Errors:
    """Distances of z from its mean under each removal: name of an estimate → (K, people), (K, Q), (K, _SIGNS); the
    latter two None where there are no questions that all adapters share."""

    personas: dict
    questions: dict | None
    cells: dict | None
    asked: int | None

    def among(self, names: list, column: int) -> _Shared:
        k = len(names)
        away = np.array([self.personas[name][column] for name in names])
        n = int(np.any(away != 0, axis=0).sum())
        of_people = (n - 1) / max(1, n) * _products(away)
        nothing = np.zeros((k, k))
        if self.questions is None or self.cells is None or self.asked is None:
            return _Shared(of_people, nothing, nothing, n, None)
        away, noise = (
            np.array([side[name][column] for name in names]) for side in (self.questions, self.cells)
        )
        of_questions = (self.asked - 1) / self.asked * _products(away)
        return _Shared(of_people, of_questions, _products(noise) / (_SIGNS - 1), n, self.asked)


def _products(away: np.ndarray) -> np.ndarray:
    """Of each two rows; NaN where a ρ of ±1 lies infinitely far on this scale, which gets a reason."""
    with np.errstate(invalid="ignore"):
        return away @ away.T


def errors_of(parts: dict[str, Part], of_seed: dict, y: str, seed: int) -> Errors:
    groups: dict = {name: [name] for name in parts} | {(POOLED, s): names for s, names in of_seed.items()}
    personas = _moved(groups, {name: part.without_each(y) for name, part in parts.items()})
    for name, members in groups.items():
        there = np.zeros(personas[name].shape[1], bool)
        for member in members:
            there[parts[member].place[np.isfinite(parts[member].asked.whole[y])]] = True
        _center(personas[name], there)
    numbers = next(iter(parts.values())).asked.questions
    sides = {name: part.asked.values[y] for name, part in parts.items()}
    if any(isinstance(side, str) for side in sides.values()) or any(
        part.asked.questions != numbers for part in parts.values()
    ):
        return Errors(personas, None, None, None)
    signs = np.random.Generator(np.random.PCG64(seed)).integers(
        0, 2, (_SIGNS, len(next(iter(parts.values())).people), len(numbers)), dtype=np.int8
    )
    without, noisy = {}, {}
    for name, part in parts.items():
        left, noise, rest = sides[name]
        size = np.sqrt(np.nansum(rest**2, axis=1)) / len(numbers)
        turned = np.einsum("rpq,pq->pr", 2.0 * signs[:, part.place] - 1, np.nan_to_num(rest)) / len(numbers)
        scale = np.divide(noise, size, out=np.zeros_like(noise), where=size > 0)
        without[name] = part.sums(y, left)
        noisy[name] = part.sums(y, left.mean(1, keepdims=True) + turned * scale[:, None])
    return Errors(personas, *(_about_mean(_moved(groups, side)) for side in (without, noisy)), len(numbers))


def _moved(groups: dict, sums: dict) -> dict:
    """z of each estimate from the sums of its adapters: (K, M)."""
    out = {}
    for name, members in groups.items():
        xy, xx, yy = (sum(sums[member][k] for member in members) for k in range(3))
        with np.errstate(divide="ignore", invalid="ignore"):
            out[name] = np.arctanh(np.clip(xy / np.sqrt(xx * yy), -1, 1))
    return out


def _about_mean(moved: dict) -> dict:
    with np.errstate(invalid="ignore"):
        return {name: z - z.mean(axis=1, keepdims=True) for name, z in moved.items()}


def _center(z: np.ndarray, there: np.ndarray) -> None:
    """Less its mean over the columns that are there, in place; 0 in the others."""
    if there.any():
        with np.errstate(invalid="ignore"):  # ρ = ±1: no variance, which `_mean` says
            z -= z[:, there].mean(axis=1, keepdims=True)
    z[:, ~there] = 0.0
