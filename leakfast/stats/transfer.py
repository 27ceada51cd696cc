"""Between sources and between behaviors: do the same bystanders leak, and can a source not seen be
predicted from geometry alone? Demands rates and pairs; the resampling unit is the persona."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import polars as pl

from leakfast.stats import intervals, resample, ties
from leakfast.stats.association import spearman_and_pearson
from leakfast.stats.correlations import MIN_BOOTSTRAP, MIN_PAIRS
from leakfast.stats.rates import BASE
from leakfast.storage.seeds import derive_seed

NEIGHBOURS = 10
_TOGETHER = 256  # correlations that are resampled at once
_PREDICTED = "least squares on the other sources' bystanders; cosine_nearest: mean of the 10 nearest"
_CROSSED = "percentile bootstrap over personas; permutation of personas; t for Pearson"
_SPLIT = "changes against different halves of the baseline's questions"
_SHARED = "both changes against the same baseline, whose noise correlates them"
_OF_MEANS = "mean score of n; ci: t (or Wilson) over samples; bb: t over questions; delta: square-and-add"
_OF_SHARES = "share of n; ci: Wilson over samples; bb: beta-binomial over questions; delta: square-and-add"
MODELS = ("mean", "words", "cosine", "cosine_nearest", "cosine_and_words")


def leakage_matrix(rates: pl.DataFrame) -> pl.DataFrame:
    """persona × source × behavior (× seed) in one long table: role, category, rate and delta with their
    intervals; what was not measured has no row."""
    trained = rates.filter(pl.col("role") != "base")
    names = "behavior seed source adapter persona category role rate ci_low ci_high".split()
    names += ["bb_low", "bb_high", "baseline", "delta", "delta_low", "delta_high"]
    trained = trained.with_columns(
        n=pl.coalesce("total", *(["n_judged"] if "n_judged" in trained.columns else [])),
        method=pl.when(pl.col("total").is_null() & pl.col("ci_low").is_not_null())
        .then(pl.lit(_OF_MEANS))
        .when(pl.col("ci_low").is_not_null())
        .then(pl.lit(_OF_SHARES))
        .otherwise(pl.lit("a mean or a share as stored, n not known")),
    )
    return trained.select(*names, "n", "method").sort(
        "behavior", "seed", "source", "persona", maintain_order=True
    )


def crossed(
    rates: pl.DataFrame,
    questions: pl.DataFrame,
    permutations: int,
    bootstraps: int,
    seed: int = 0,
    workers: int | None = None,
) -> pl.DataFrame:
    """Correlation over bystanders of two adapters' values (`y`: delta, else rate where no baseline is).

    Two changes of one behavior against the same baseline share its noise, which alone would correlate them: one is taken
    against the baseline over the questions with even numbers, the other over those with odd ones. Where there are no
    counts per question both are taken against the whole one, and `method` says so. questions: schema
    `question_counts`.

    `between`: sources (one behavior, two sources) or behaviors (one source, two behaviors), same training
    seed. Personas that are the source of either are left out. Spearman with permutation p and percentile
    bootstrap interval over personas, Pearson with its t p-value."""
    trained = rates.filter(pl.col("role").is_in(["source", "bystander"]))
    adapters = trained.select("behavior", "seed", "source", "adapter").unique(maintain_order=True).rows()
    side, rows = _Sides(trained, questions), []
    alike: dict[int, list[tuple[dict, np.ndarray, np.ndarray]]] = {}  # those over as many personas
    for a, b in combinations(adapters, 2):
        if a[1] != b[1] or (a[0] == b[0]) == (a[2] == b[2]):
            continue
        y = "delta" if all(side.has_delta(x[0], x[3]) for x in (a, b)) else "rate"
        method = _CROSSED
        halves: tuple[int | None, int | None] = (None, None)
        if y == "delta" and a[0] == b[0]:
            split = side.halves(a[0]) is not None
            method = f"{_CROSSED}; {_SPLIT if split else _SHARED}"
            halves = (0, 1) if split else halves
        (people, x), (others, values) = (
            side.of(one[0], one[3], y, half) for one, half in zip((a, b), halves, strict=True)
        )
        names, at, there = np.intersect1d(people, others, assume_unique=True, return_indices=True)
        kept = ~np.isin(names, [a[2], b[2]])
        x, values = x[at[kept]], values[there[kept]]
        key = {"between": "sources" if a[0] == b[0] else "behaviors", "seed": a[1], "y": y, "n": len(x)}
        key |= {"behavior": a[0], "source": a[2], "other_behavior": b[0], "other_source": b[2]}
        key |= {"resampling_unit": "persona", "method": method}
        rows.append(key)
        if len(x) < MIN_PAIRS:
            key["reason"] = f"{len(x)} personas with both values; at least {MIN_PAIRS} are needed"
        elif np.ptp(x) == 0 or np.ptp(values) == 0:
            key["reason"] = "one of the two is the same for all personas"
        else:
            alike.setdefault(len(x), []).append((key, x, values))
    for n, members in alike.items():
        drawn = derive_seed("crossed", seed, n)
        for first in range(0, len(members), _TOGETHER):
            some = members[first : first + _TOGETHER]
            xs, ys = (np.stack([member[i] for member in some]) for i in (1, 2))
            told = _correlated(xs, ys, permutations, bootstraps, drawn, workers)
            for (key, *_), found in zip(some, told, strict=True):
                key |= found
    columns = {"between": pl.String, "behavior": pl.String, "source": pl.String, "other_behavior": pl.String}
    columns |= {"other_source": pl.String, "seed": pl.Int64, "y": pl.String, "n": pl.Int64}
    floats = "spearman spearman_ci_low spearman_ci_high spearman_p_perm pearson pearson_p"
    columns |= dict.fromkeys(floats.split(), pl.Float64)
    columns |= dict.fromkeys(("reason", "resampling_unit", "method"), pl.String)
    columns |= dict.fromkeys(("permutations", "bootstraps", "resampling_seed"), pl.Int64)
    return pl.DataFrame(rows, schema=columns)


class _Sides:
    """What is crossed, each made once: of every adapter the personas by name and their values, and each behavior's baselines
    over half of the questions."""

    def __init__(self, trained: pl.DataFrame, questions: pl.DataFrame) -> None:
        self.frames = dict(trained.group_by("behavior", "adapter", maintain_order=True))
        self.halves = cache(lambda behavior: _half_baselines(questions, behavior))
        self.of, self.has_delta = cache(self._of), cache(self._has_delta)

    def _has_delta(self, behavior: str, adapter: str) -> bool:
        return bool(self.frames[behavior, adapter]["delta"].is_not_null().any())

    def _of(self, behavior: str, adapter: str, y: str, half: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(names (n,) in order, values (n,)) where they are known; half: of the baseline."""
        frame = self.frames[behavior, adapter]
        if half is not None:
            halves = self.halves(behavior)
            assert halves is not None, "asked for where there are some"
            frame = _against(frame, halves[half])
        frame = frame.select("persona", y).drop_nulls().sort("persona")
        return frame["persona"].to_numpy().astype(str), frame[y].to_numpy()


def _half_baselines(questions: pl.DataFrame, behavior: str) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """persona and base rate over the even questions, and over the odd ones; None where a half was not counted."""
    if questions.is_empty():
        return None
    base = questions.filter(behavior=behavior, adapter=BASE)
    even, odd = (
        base.filter(pl.col("question") % 2 == rest)
        .group_by("persona", maintain_order=True)
        .agg(_hits=pl.col("hits").sum(), _total=pl.col("total").sum())
        .filter(pl.col("_total") > 0)
        .with_columns(_rate=pl.col("_hits") / pl.col("_total"))
        for rest in (0, 1)
    )
    return (even, odd) if min(even.height, odd.height) == base["persona"].n_unique() > 0 else None


def _against(rates: pl.DataFrame, half: pl.DataFrame) -> pl.DataFrame:
    """The rates with their change against another baseline, where they had one."""
    joined = rates.join(half, on="persona", how="left", maintain_order="left")
    change = ties.deltas(joined, ("_hits", "_total", "_rate"), ["behavior", "adapter"])
    return joined.with_columns(delta=pl.when(pl.col("delta").is_not_null()).then(change))


def _correlated(
    xs: np.ndarray, ys: np.ndarray, permutations: int, bootstraps: int, seed: int, workers: int | None
) -> list[dict]:
    """Of each row of xs (C, n) with its own of ys (C, n), which vary; all by the same draws."""
    p = resample.permute_alone(xs, ys, permutations, seed, workers=workers) if permutations else None
    drawn = None
    if bootstraps > 1 and xs.shape[1] >= MIN_BOOTSTRAP:
        sides = (xs[:, None], ys[:, None])
        drawn = resample.bootstrap_each(*sides, bootstraps, seed, workers=workers)[:, :, 0]
    out = []
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        rho, _, r, p_of_r = (float(v[0]) for v in spearman_and_pearson(x[:, None], y))
        told: dict = {"spearman": rho, "pearson": r, "pearson_p": p_of_r, "resampling_seed": seed}
        told |= {"permutations": permutations or None}
        told |= {} if p is None else {"spearman_p_perm": float(p[k])}
        out.append(told | ({} if drawn is None else intervals.of_spearman(drawn[:, k])))
    return out


def predicted(table: pl.DataFrame, cosine: str = "centered") -> pl.DataFrame:
    """Leave one source out: each model learns from the other sources' bystanders and predicts this one's.

    `table`: pairs with `jaccard` (from `confounds.covariates`). Models: `mean` of the others; `words`, a
    line on the overlap of words; `cosine`, a line on the cosine; `cosine_nearest`, the mean of the 10
    bystanders with the nearest cosines; `cosine_and_words`, a plane. r2 = 1 − Σ(y − ŷ)² / Σ(y − ȳ)² with ȳ
    of the source left out: negative where its own mean would have done better. `gain` is over `mean`:
    1 − Σ(y − ŷ)² / Σ(y − mean of the others)². `source` pooled sums both over all sources left out."""
    rows = []
    keys = ["behavior", "seed", "layer"]
    for group in table.partition_by(keys, maintain_order=True) if table.height else []:
        y_name = "delta" if group["delta"].is_not_null().all() else "rate"
        names = ["source", "persona", f"cosine_{cosine}", "jaccard", y_name]
        whole = group.filter(pl.col(f"cosine_{cosine}").is_not_null() & pl.col(y_name).is_not_null()).select(
            names
        )
        sources = whole["source"].unique(maintain_order=True).to_list()
        told = {**{k: group[k][0] for k in keys}, "cosine": cosine, "y": y_name, "method": _PREDICTED}
        if len(sources) < 2:
            rows.append({**told, "reason": f"{len(sources)} source with cosines; at least 2 are needed"})
            continue
        sums = {model: np.zeros(3) for model in MODELS}
        who = whole["source"].to_numpy()
        near, target = whole[f"cosine_{cosine}"].to_numpy(), whole[y_name].to_numpy()
        words = None if whole["jaccard"].null_count() else whole["jaccard"].to_numpy()
        for source in sources:
            y, fitted = target[who == source], _predictions(who == source, near, words, target)
            for model in MODELS:
                row = {**told, "source": source, "model": model, "n": len(y)}
                if fitted[model] is None:
                    rows.append(row | {"reason": "the overlap of words is not known"})
                    continue
                parts = np.array([((y - at) ** 2).sum() for at in (fitted[model], y.mean(), fitted["mean"])])
                sums[model] += parts
                rows.append(row | _explained(parts))
        for model in MODELS:
            if sums[model][2] > 0:
                row = {**told, "source": "pooled", "model": model, "n": whole.height}
                rows.append(row | _explained(sums[model]))
    columns = {name: table.schema[name] for name in keys}
    columns |= {"cosine": pl.String, "y": pl.String, "source": pl.String, "model": pl.String, "n": pl.Int64}
    columns |= dict.fromkeys(("r2", "gain", "rmse"), pl.Float64)
    columns |= {"reason": pl.String, "method": pl.String}
    mean = pl.col("rmse") / pl.col("n").cast(pl.Float64)
    return pl.DataFrame(rows, schema=columns).with_columns(rmse=mean.sqrt())


def _explained(parts: np.ndarray) -> dict:
    left, spread, plain = (float(v) for v in parts)
    out = {"rmse": left, "reason": None}  # a sum until all are in one table
    if spread == 0 or plain == 0:
        return out | {"reason": "the values of the source left out do not vary"}
    return out | {"r2": 1 - left / spread, "gain": 1 - left / plain}


def _predictions(
    left: np.ndarray, cosine: np.ndarray, words: np.ndarray | None, y: np.ndarray
) -> dict[str, np.ndarray | None]:
    """Each model's prediction for the rows `left` out (n,) of cosine, words and y (n,), None where it needs words that are
    not known."""
    target = y[~left]

    def linear(*columns: np.ndarray) -> np.ndarray:
        a, b = (
            np.column_stack([np.ones(rows.sum()), *(column[rows] for column in columns)])
            for rows in (~left, left)
        )
        return b @ np.linalg.lstsq(a, target, rcond=None)[0]

    order = np.argsort(cosine[~left], kind="stable")
    at, value = cosine[~left][order], target[order]
    closest = np.argsort(np.abs(cosine[left][:, None] - at[None, :]), axis=1, kind="stable")[:, :NEIGHBOURS]
    return {
        "mean": np.full(left.sum(), target.mean()),
        "words": None if words is None else linear(words),
        "cosine": linear(cosine),
        "cosine_nearest": value[closest].mean(axis=1),
        "cosine_and_words": None if words is None else linear(cosine, words),
    }
