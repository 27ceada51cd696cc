"""From many estimates to few, with their uncertainty: rates over questions, ρ freed of the rates' noise, all layers in
one table. Demands the tables of `rates` and `correlations`; leaves means over sources and seeds to `means`."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.stats import intervals, resample, ties
from leakfast.stats.correlations import ALPHA, COSINES, MIN_BOOTSTRAP, POWER, YS
from leakfast.stats.rates import BASE
from leakfast.stats.two_way import counts_table
from leakfast.storage.seeds import derive_seed

_RATES = (
    "ci: Wilson over samples; bb: Wilson over the samples that a beta-binomial over questions finds worth"
)
_SPLIT = "ρ / √reliability within ±1; split halves of questions, Spearman-Brown; percentile bootstrap over personas"
MIN_EVENTS = 1  # hits, or misses where they are fewer, of a bystander on average
MIN_RELIABILITY = 0.1  # that the lower end of the reliability's interval must reach
SPLITS = 20  # random halvings of the questions whose correlations are averaged
_ONE = ["behavior", "adapter"]


def with_intervals(
    rates: pl.DataFrame, questions: pl.DataFrame, judged: pl.DataFrame | None = None
) -> pl.DataFrame:
    """`rates` + questions, icc, effective_total, bb_low, bb_high, bb_reason, delta_low, delta_high,
    delta_reason, delta_method, method.

    bb_*: 95 % interval for the probability that one more sample, of one more question, shows the
    behavior. Samples of one question are not independent: a beta-binomial with one intraclass
    correlation for all personas of an adapter (`intervals.question_icc`) says how many independent
    samples they are worth, and Wilson's interval is taken over these. delta_*: 95 % interval of
    rate − baseline that adds the variances of both (square-and-add), over questions where they are known, less what
    both share because they answer the same questions: the correlation of the two over questions, one value for all
    personas of an adapter (`intervals.paired_r`). Judged means
    come with intervals of their own (`stats.judged`), over samples and over questions; judged: their means per question
    (`Judged.questions`), without which their changes are not paired."""
    worth = _effective(questions)
    table = rates.join(worth, on=[*_ONE, "persona"], how="left", maintain_order="left", suffix="_q")
    n, share = table["effective_total"].to_numpy().astype(float), table["rate"].to_numpy().astype(float)
    low, high = np.full(len(n), np.nan), np.full(len(n), np.nan)
    some = np.isfinite(n) & np.isfinite(share)
    low[some], high[some] = intervals.wilson_share(share[some], n[some])
    table = table.with_columns(intervals.columns("bb", low, high))
    if "q_low" in table.columns:
        table = table.with_columns(
            bb_low=pl.coalesce("bb_low", "q_low"),
            bb_high=pl.coalesce("bb_high", "q_high"),
            questions=pl.coalesce("questions", "n_questions"),
        ).drop("q_low", "q_high", "n_questions")
    why = (
        pl.when(pl.col("bb_low").is_not_null())
        .then(None)
        .when(pl.col("total").is_null())
        .then(pl.lit("no counts, only a mean"))
        .when(pl.col("rate").is_null())
        .then(pl.lit("no sample was counted"))
        .when(pl.col("questions").is_null())
        .then(pl.lit("no counts per question"))
        .otherwise(pl.lit("no question has two samples, or no persona two questions"))
    )
    return _with_delta(table.with_columns(bb_reason=why), _paired(questions, judged))


def _paired(questions: pl.DataFrame, judged: pl.DataFrame | None) -> pl.DataFrame:
    """behavior, adapter, _r: how the rates (or mean scores) of an adapter and of the base correlate over the questions both
    were asked, within personas."""
    columns = {"behavior": pl.String, "adapter": pl.String, "_r": pl.Float64}
    one, parts = ["behavior", "adapter", "persona", "question"], []
    if not questions.is_empty():
        share = pl.when(pl.col("total") > 0).then(pl.col("hits") / pl.col("total"))
        parts.append(questions.select(*one, share.alias("x")))
    if judged is not None and not judged.is_empty():
        parts.append(judged.select(*one, x="mean_aligned"))
    if not parts:
        return pl.DataFrame(schema=columns)
    asked = pl.concat(parts, how="vertical_relaxed").drop_nulls("x")
    base = asked.filter(adapter=BASE).select("behavior", "persona", "question", y="x")
    both = asked.filter(pl.col("adapter") != BASE).join(base, on=["behavior", "persona", "question"])
    rows = [
        (*key, intervals.paired_r(group["x"], group["y"], group["persona"]))
        for key, group in both.group_by(_ONE, maintain_order=True)
    ]
    return pl.DataFrame(rows, schema=columns, orient="row")


def _effective(questions: pl.DataFrame) -> pl.DataFrame:
    """behavior, adapter, persona, questions, icc, effective_total."""
    parts = []
    for group in questions.partition_by(_ONE, maintain_order=True) if questions.height else []:
        icc = intervals.question_icc(group["hits"], group["total"], group["persona"].to_numpy())
        summed = (
            group.filter(pl.col("total") > 0)
            .group_by(*_ONE, "persona", maintain_order=True)
            .agg(
                questions=pl.len().cast(pl.Int64),
                _total=pl.col("total").sum(),
                _squares=(pl.col("total") ** 2).sum(),
            )
        )
        worth = None
        if icc is not None:
            worth = intervals.effective_total(summed["_total"], summed["_squares"], icc)
        parts.append(
            summed.with_columns(
                pl.lit(icc, pl.Float64).alias("icc"),
                pl.Series(
                    "effective_total", worth if icc is not None else [None] * summed.height, pl.Float64
                ),
            ).drop("_total", "_squares")
        )
    columns = dict.fromkeys([*_ONE, "persona"], pl.String)
    columns |= {"questions": pl.Int64, "icc": pl.Float64, "effective_total": pl.Float64}
    return pl.concat(parts) if parts else pl.DataFrame(schema=columns)


def _with_delta(table: pl.DataFrame, paired: pl.DataFrame) -> pl.DataFrame:
    whole = table.with_columns(_low=pl.coalesce("bb_low", "ci_low"), _high=pl.coalesce("bb_high", "ci_high"))
    base = whole.filter(adapter=BASE).select(
        "behavior",
        "persona",
        _base_low=pl.col("_low"),
        _base_high=pl.col("_high"),
        _base_over=pl.col("bb_low").is_not_null(),
    )
    whole = whole.join(base, on=["behavior", "persona"], how="left", maintain_order="left")
    names = ("rate", "_low", "_high", "baseline", "_base_low", "_base_high")
    # means whose interval is over samples on a side share no question's noise in it
    over_both = pl.col("total").is_not_null() | (pl.col("bb_low").is_not_null() & pl.col("_base_over"))
    whole = whole.join(paired, on=_ONE, how="left", maintain_order="left")
    whole = whole.with_columns(_r=pl.when(over_both).then("_r"))
    r = whole["_r"].fill_null(0.0).to_numpy()
    low, high = intervals.difference(*(whole[name].to_numpy().astype(float) for name in names), r)
    ours = pl.col("adapter") != BASE
    whole = whole.with_columns(intervals.columns("delta", low, high))
    whole = whole.with_columns(pl.when(ours).then(pl.col("delta_low", "delta_high")))
    over = pl.when(pl.col("bb_low").is_not_null()).then(pl.lit("questions")).otherwise(pl.lit("samples"))
    kind = pl.when(pl.col("total").is_null()).then(pl.lit("the means'")).otherwise(pl.lit("Wilson"))
    method = pl.when(pl.col("total").is_not_null() & pl.col("ci_low").is_not_null()).then(pl.lit(_RATES))
    if "value_method" in whole.columns:
        method = pl.coalesce(method, "value_method")
    return whole.with_columns(
        delta_reason=pl.when(pl.col("delta_low").is_not_null())
        .then(None)
        .when(~ours)
        .then(pl.lit("the unadapted model itself"))
        .when(pl.col("baseline").is_null())
        .then(pl.lit("the unadapted model was not measured on the same prompts"))
        .otherwise(pl.lit("no interval of the rate or of its baseline")),
        delta_method=pl.when(pl.col("delta_low").is_not_null()).then(
            pl.concat_str(
                pl.lit("square-and-add of "),
                kind,
                pl.lit(" intervals over "),
                over,
                pl.when(pl.col("_r").is_null()).then(pl.lit("")).otherwise(pl.lit(", paired by question")),
            )
        ),
        method=method,
    ).drop("_low", "_high", "_base_low", "_base_high", "_base_over", "_r", "value_method", strict=False)


def layers(correlations: pl.DataFrame) -> pl.DataFrame:
    """All layers of each source (and pooled) in one table: ρ with its interval, p at that layer alone, and
    `spearman_p_max`, which has paid for looking at `layers_tested` layers; `best` marks the largest |ρ|."""
    names = ["behavior", "seed", "source", "adapter", "cosine", "y"]
    whole = correlations.filter(pl.col("category").is_null())
    size = pl.col("spearman").abs()
    return whole.select(
        *names,
        *"layer n spearman spearman_ci_low spearman_ci_high spearman_p_perm spearman_p_max layers_tested".split(),
        (size == size.max().over(names)).alias("best"),
        *"reason ci_reason resampling_unit permutations permutation_seed bootstraps bootstrap_seed method".split(),
    ).sort(["behavior", "seed", "source", "cosine", "y", "layer"], maintain_order=True)


def disattenuated(
    pairs: pl.DataFrame, questions: pl.DataFrame, bootstraps: int, seed: int = 0, workers: int | None = None
) -> pl.DataFrame:
    """What ρ would be were the rates free of noise: ρ / √reliability, per adapter, layer, cosine and y.

    reliability: questions are split in halves at random (SPLITS times), Spearman's correlation of the
    bystanders' rates between halves is averaged and stepped up to the full number of questions (Spearman
    1910, Brown 1910: 2r/(1+r)). The cosine is taken as exact. Interval: percentile bootstrap over
    personas of the whole ratio, halvings fixed; where halves disagree the ratio has no bound and is put at the end that ρ
    points to, so that an interval over rates that tell little reaches 1. The estimate itself is null, with a reason, below
    MIN_EVENTS and MIN_RELIABILITY. `delta` splits the base model's rates alike. Estimand:
    the rank correlation with each bystander's expected rate over questions of this kind. `detectable`: the
    true |ρ| that is found with 80 % power at level 0.05 over rates as noisy as these, `intervals.detectable` / √reliability;
    null, with a reason, where that is 1 or more."""
    rows: list[dict] = []
    if questions.height and pairs.height:
        for group in pairs.partition_by("behavior", "adapter", maintain_order=True):
            rows += _one_adapter(group, questions, bootstraps, seed, workers)
    values = dict.fromkeys(
        (
            "spearman reliability reliability_low reliability_high disattenuated disattenuated_low "
            "disattenuated_high detectable"
        ).split(),
        pl.Float64,
    )
    columns = {name: pairs.schema.get(name, pl.String) for name in ("behavior", "source", "adapter", "seed")}
    columns |= {"layer": pl.Int32, "cosine": pl.String, "y": pl.String, "n": pl.Int64, "questions": pl.Int64}
    columns |= {**values, "reason": pl.String, "bootstraps": pl.Int64, "bootstrap_seed": pl.Int64}
    columns |= {"resampling_unit": pl.String, "method": pl.String}
    return pl.DataFrame(rows, schema=columns)


def _halves(counts: pl.DataFrame, people: list[str], seed: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """(hits, total) of each persona over each half, (SPLITS, people) arrays; None for fewer than two questions."""
    asked = sorted(counts["question"].unique())
    if len(asked) < 2:
        return None
    hits, total = counts_table(counts, [counts["adapter"][0]] * len(people), people, asked)
    rng = np.random.Generator(np.random.PCG64(seed))
    first, second = [], []
    for _ in range(SPLITS):
        order = rng.permutation(len(asked))
        for part, out in ((order[: len(asked) // 2], first), (order[len(asked) // 2 :], second)):
            out.append((hits[:, part].sum(1), total[:, part].sum(1)))
    return [(np.array([h for h, _ in half]), np.array([t for _, t in half])) for half in (first, second)]


def _over_halves(own: list, theirs: list | None) -> tuple[np.ndarray, np.ndarray]:
    """Rates (or changes against `theirs`) of each persona over each half, two (SPLITS, people) arrays."""
    with np.errstate(invalid="ignore", divide="ignore"):
        first, second = (
            hits / total if theirs is None else ties.difference(hits, total, *theirs[k])
            for k, (hits, total) in enumerate(own)
        )
    return first, second


def _one_adapter(
    group: pl.DataFrame, questions: pl.DataFrame, bootstraps: int, seed: int, workers: int | None
) -> list[dict]:
    behavior, adapter = group["behavior"][0], group["adapter"][0]
    mine = questions.filter(behavior=behavior, adapter=adapter)
    base = questions.filter(behavior=behavior, adapter=BASE)
    people = sorted(group["persona"].unique())
    drawn_seed = derive_seed("split halves", seed, behavior, adapter)
    own = _halves(mine, people, drawn_seed) if mine.height else None
    layers_here = sorted(group["layer"].unique())
    by_layer = group.sort("persona").partition_by("layer", as_dict=True)
    wide = {layer: by_layer[(layer,)] for layer in layers_here}
    made: dict[bytes, list[dict]] = {}  # a delta over a baseline of 0 is the rate
    key = {name: group[name][0] for name in ("behavior", "source", "adapter", "seed")}
    rows = []
    for y in YS:
        halves = None if own is None or y == "delta" else _over_halves(own, None)
        if y == "delta" and own is not None:
            theirs = _halves(base, people, drawn_seed) if base.height else None
            halves = None if theirs is None else _over_halves(own, theirs)
        cells = [(layer, cosine) for layer in layers_here for cosine in COSINES]
        told = {
            "y": y,
            "bootstraps": bootstraps,
            "bootstrap_seed": drawn_seed,
            "n": 0,
            "resampling_unit": "persona",
            "method": _SPLIT,
        }
        if halves is None:
            why = {"reason": "no counts per question, or fewer than two questions"}
            rows += [{**key, **told, "layer": a, "cosine": c, **why} for a, c in cells]
            continue
        first, second = halves
        told["questions"] = mine["question"].n_unique()
        hits, total = (mine.filter(pl.col("persona").is_in(people))[name].sum() for name in ("hits", "total"))
        events = min(hits, total - hits) / len(people)
        x, value = (
            np.stack([wide[layer][name].to_numpy().astype(float) for layer, name in columns])
            for columns in ([(a, f"cosine_{c}") for a, c in cells], [(a, y) for a, _ in cells])
        )
        kept = np.isfinite(x) & np.isfinite(value) & np.isfinite(first).all(0) & np.isfinite(second).all(0)
        draws = (bootstraps, drawn_seed, workers)
        found: list[dict] = [{} for _ in cells]
        groups: dict[bytes, list[int]] = {}  # cells over the same persons with the same rates
        for at in range(len(cells)):
            groups.setdefault(kept[at].tobytes() + value[at].tobytes(), []).append(at)
        for members in groups.values():
            who = kept[members[0]]
            sides = (x[members][:, who], value[members[0], who], first[:, who], second[:, who])
            sizes = repr([side.shape for side in sides]).encode()
            if (same := b"".join([sizes, *(side.tobytes() for side in sides)])) not in made:
                made[same] = _ratios(*sides, draws)
            for at, one in zip(members, made[same], strict=True):
                found[at] = _spoken(one, events)
        rows += [
            {**key, **told, "layer": a, "cosine": c, "n": int(kept[at].sum()), **found[at]}
            for at, (a, c) in enumerate(cells)
        ]
    return rows


def _ratios(x, y, first, second, draws: tuple[int, int, int | None]) -> list[dict]:
    """The values of cells (K, n) with one y (n,), and of its halves (SPLITS, n): halves are ranked and resampled once."""
    n, (bootstraps, seed, workers) = len(y), draws
    if n < MIN_BOOTSTRAP:
        return [
            {"reason": f"{n} bystanders with halves and cosine; at least {MIN_BOOTSTRAP} are needed"}
        ] * len(x)
    same = np.ptp(y) == 0
    constant = [bool(same or np.ptp(one) == 0) for one in x]
    if all(constant):
        return [{"reason": "the cosine or the rate is the same for all"}] * len(x)
    ranks = [resample.ordered(side).rank for side in (x, y, first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = [r / np.linalg.norm(r, axis=1, keepdims=True) for r in ranks]
    # a half that does not vary agrees with nothing
    reliability = _stepped(float(np.mean(np.nan_to_num((unit[2] * unit[3]).sum(1)))))
    drawn = stepped = None
    if bootstraps >= 2:
        drawn = resample.bootstrap_spearman(x, y, bootstraps, seed, workers=workers)
        halves = resample.bootstrap_each(first[:, None], second[:, None], bootstraps, seed, workers=workers)
        stepped = _stepped(np.mean(np.nan_to_num(halves[:, :, 0, 0]), axis=1))
    return [
        {"reason": "the cosine or the rate is the same for all"}
        if constant[k]
        else _ratio(
            float(unit[0][k] @ unit[1][0]), reliability, n, None if drawn is None else drawn[:, k], stepped
        )
        for k in range(len(x))
    ]


def _ratio(rho: float, reliability: float, n: int, drawn, stepped) -> dict:
    """The values of one cell. drawn, stepped: (R,) its ρ and the reliability in each resample, None where none was drawn."""
    out: dict = {"spearman": rho, "reliability": reliability, "reason": None}
    if reliability > 0:
        out |= {"disattenuated": float(_freed(rho, reliability)), **_detectable(n, reliability)}
    if drawn is None:
        return out
    if np.isnan(drawn).mean() > intervals.TOO_FEW_DRAWS:
        why = "the cosine or the rate is the same for all in over 5 % of the resamples: no interval"
        return out | {"reason": "; ".join(filter(None, (why, out["reason"])))}
    low, high = intervals.percentiles(np.column_stack([stepped, _freed(drawn, stepped)]))
    names = ("reliability", "disattenuated")
    return (
        out
        | {f"{k}_low": float(v) for k, v in zip(names, low, strict=True)}
        | {f"{k}_high": float(v) for k, v in zip(names, high, strict=True)}
    )


def _stepped(alike):
    """Spearman-Brown; 0 where the halves do not agree."""
    positive = np.maximum(alike, 0.0)
    return 2 * positive / (1 + positive)


def _freed(rho, reliability):
    """ρ / √reliability within ±1, the end that ρ points to where there is no reliability."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(reliability > 0, rho / np.sqrt(reliability), np.sign(rho))
    return np.clip(ratio, -1.0, 1.0)


def _spoken(found: dict, events: float) -> dict:
    """`found` without an estimate, and why, where the rates say too little for one; its interval stays."""
    if found.get("reliability") is None:
        return found
    why = None
    if events < MIN_EVENTS:
        why = f"{events:.2g} hits or misses a bystander; at least {MIN_EVENTS} is needed for an estimate"
    elif (bottom := found.get("reliability_low", found["reliability"])) < MIN_RELIABILITY:
        why = f"the reliability may be as low as {bottom:.2g}; {MIN_RELIABILITY} is needed for an estimate"
    if why is None:
        return found
    reason = "; ".join(filter(None, (why, found["reason"])))
    return found | {"disattenuated": None, "detectable": None, "reason": reason}


def _detectable(n: int, reliability: float) -> dict:
    """detectable, and the reason where it is null."""
    exact = intervals.detectable(n, POWER, ALPHA)
    true = None if exact is None else exact / float(np.sqrt(reliability))
    if true is not None and true < 1:
        return {"detectable": true, "reason": None}
    return {
        "detectable": None,
        "reason": "too few personas, or rates too noisy, to find even a true ρ of 1 with 80 % power",
    }
