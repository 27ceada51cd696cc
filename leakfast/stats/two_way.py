"""Intervals that hold for other personas *and* other questions. Demands pairs, their correlations and counts per question;
leaves intervals over personas alone to `correlations`.

Both personas and questions are drawn, crossed. The variance of an estimate is then V = V_p + V_q − V_pq: what resampling
personas gives, what leaving out questions gives, less the noise of single cells, which is in both (Owen 2007). On Fisher's z
scale V_p is the bootstrap's, V_q the delete-one jackknife over questions, and V_pq the variance under noise of the size that
a persona-by-question table leaves over its margins. Degrees of freedom are those of whatever there are fewer of: with 8
questions Satterthwaite's gave 92 % coverage where these give 95 %."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from leakfast.stats import intervals, ties
from leakfast.stats.association import unit, within
from leakfast.stats.correlations import COSINES, POOLED, YS
from leakfast.stats.ranking import alike
from leakfast.stats.rates import BASE
from leakfast.storage.seeds import derive_seed

MIN_QUESTIONS = 3
_NOISES = 200
_KEY = ["behavior", "seed", "source", "adapter", "layer", "cosine", "y"]
_VALUES = {
    "questions": pl.Int64,
    "spearman_question_se_z": pl.Float64,
    "spearman_cell_se_z": pl.Float64,
    "spearman_both_low": pl.Float64,
    "spearman_both_high": pl.Float64,
    "both_reason": pl.String,
}


def with_questions(
    correlations: pl.DataFrame, pairs: pl.DataFrame, questions: pl.DataFrame, seed: int = 0
) -> pl.DataFrame:
    """`correlations` + questions, spearman_question_se_z, spearman_cell_se_z, spearman_both_low, spearman_both_high,
    both_reason: the 95 % interval of ρ over personas and questions; for rows over all categories.

    Estimand: the mean of ρ over studies with other personas and as many other questions of the same kinds, with as many
    samples. pairs: as `correlate` takes them; questions: schema `question_counts`."""
    if "adapter" not in pairs.columns:
        pairs = pairs.with_columns(adapter=pl.col("source"))
    rows = [row for group in pairs.partition_by("behavior", "seed") for row in _one(group, questions, seed)]
    found = pl.DataFrame(rows, schema={**{k: correlations.schema[k] for k in _KEY}, **_FOUND})
    table = correlations.join(found, on=_KEY, how="left", nulls_equal=True, maintain_order="left")
    whole = pl.col("category").is_null()
    table = table.with_columns(pl.when(whole).then(pl.col(name)) for name in _FOUND)
    rho, of_people, of_questions, of_cells = (
        ties.floats(table[name])
        for name in ("spearman", "spearman_se_z", "spearman_question_se_z", "spearman_cell_se_z")
    )
    df = (ties.floats(table["personas"]) - 1, ties.floats(table["questions"]) - 1)
    low, high = both(rho, (of_people, of_questions, of_cells), df)
    known = np.isfinite(low)
    why = (
        pl.when(pl.Series(known))
        .then(None)
        .otherwise(pl.coalesce("both_reason", "ci_reason", pl.lit("no counts per question, or ρ is ±1")))
    )
    return table.with_columns(
        *intervals.columns("spearman_both", low, high), both_reason=pl.when(whole).then(why)
    ).select(*correlations.columns, *_VALUES)


_FOUND = {name: kind for name, kind in _VALUES.items() if "both_low" not in name and "both_high" not in name}


def both(rho, errors, df) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of ρ: tanh(atanh ρ ± t·√V), V = V_p + V_q − V_pq, no smaller than V_p and V_q.

    errors: standard errors on the z scale over personas, over questions and of cells; df: personas − 1, questions − 1."""
    people, asked, cells = (np.square(error) for error in errors)
    variance = np.maximum(people + asked - cells, np.maximum(people, asked))
    with np.errstate(divide="ignore", invalid="ignore"):
        half = intervals.t_half(np.sqrt(variance), np.minimum(*df))
        center = np.arctanh(rho)
        return np.tanh(center - half), np.tanh(center + half)


def of_mean(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of a table of values (P, Q), personas by questions, both drawn: 95 % interval of the mean over
    other personas and questions. NaN ends for fewer than two of either."""
    p, q = values.shape
    mean = float(values.mean())
    if min(p, q) < 2:
        return mean, float("nan"), float("nan")
    people, asked = values.mean(1), values.mean(0)
    rest = values - people[:, None] - asked[None] + mean
    of_people, of_questions = people.var(ddof=1) / p, asked.var(ddof=1) / q
    of_cells = float((rest**2).sum()) / ((p - 1) * (q - 1)) / (p * q)
    variance = max(of_people + of_questions - of_cells, of_people, of_questions)
    if variance == 0:
        return mean, mean, mean
    free = (of_people + of_questions) ** 2 / (of_people**2 / (p - 1) + of_questions**2 / (q - 1))
    half = float(intervals.t_half(np.sqrt(variance), free))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Asked:
    """One adapter: names of its bystanders (P,), cosines (P, K), y → its value (P,), NaN where it is not known, and y →
    its value without each question (P, Q), the noise of a persona's mean (P,) and what each cell has over its margins
    (P, Q); or why a y has none."""

    people: list[str]
    x: np.ndarray
    whole: dict[str, np.ndarray]
    values: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray] | str]
    questions: list[int]

    def same(self, one: str, other: str) -> bool:
        """Whether two y are equal to the bit (rate and delta over a baseline of 0, say)."""
        sides = self.values[one], self.values[other]
        if any(isinstance(side, str) for side in sides) or not _equal(self.whole[one], self.whole[other]):
            return False
        return all(_equal(a, b) for a, b in zip(*sides, strict=True))


def _one(group: pl.DataFrame, questions: pl.DataFrame, seed: int) -> Iterator[dict]:
    """The rows of one behavior and training seed."""
    behavior, train_seed = group["behavior"][0], group["seed"][0]
    layers = sorted(group["layer"].unique())
    counts = questions.filter(behavior=behavior) if questions.height else questions
    asked = {
        key: asked_of(part, counts, layers)
        for key, part in group.group_by("adapter", "source", maintain_order=True)
    }
    scopes = [(adapter, source, [one]) for (adapter, source), one in asked.items()]
    scopes.append((None, POOLED, list(asked.values())))
    cells = [(layer, cosine) for layer in layers for cosine in COSINES]
    for adapter, source, parts in scopes:
        for y in YS:
            drawn = derive_seed("two-way", seed, behavior, train_seed, adapter or POOLED, y)
            told = {"behavior": behavior, "seed": train_seed, "source": source, "adapter": adapter, "y": y}
            found = errors_of(parts, y, drawn)
            for k, (layer, cosine) in enumerate(cells):
                row = {**told, "layer": layer, "cosine": cosine}
                if isinstance(found, str):
                    yield row | {"both_reason": found}
                    continue
                of_questions, of_cells = (float(side[k]) if np.isfinite(side[k]) else None for side in found)
                yield row | {
                    "questions": len(parts[0].questions),
                    "spearman_question_se_z": of_questions,
                    "spearman_cell_se_z": of_cells,
                }


def _equal(one, other) -> bool:
    return np.array_equal(one, other, equal_nan=True)


def asked_of(part: pl.DataFrame, counts: pl.DataFrame, layers: list[int]) -> Asked:
    """The pairs of one adapter beside its counts per question; K = layers × COSINES. Personas in order of their names."""
    adapter = part["adapter"][0]
    people = sorted(part["persona"].unique())
    place = {name: i for i, name in enumerate(people)}
    x = np.full((len(people), len(layers) * len(COSINES)), np.nan)
    for name, layer, *values in part.select("persona", "layer", *(f"cosine_{c}" for c in COSINES)).rows():
        at = layers.index(layer) * len(COSINES)
        x[place[name], at : at + len(COSINES)] = [np.nan if v is None else v for v in values]
    mine = counts.filter(adapter=adapter) if counts.height else counts
    numbers = sorted(mine["question"].unique()) if mine.height else []
    own, base = (counts_table(counts, [name] * len(people), people, numbers) for name in (adapter, BASE))
    values: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray] | str] = {}
    rates = part.unique("persona").sort("persona")
    known = {y: ties.floats(rates[y]) for y in YS}
    for y, whole in known.items():
        if len(numbers) < MIN_QUESTIONS:
            values[y] = f"{len(numbers)} questions with counts; at least {MIN_QUESTIONS} are needed"
        elif y == "delta" and not np.isfinite(whole).any():
            values[y] = "the unadapted model was not measured on the same prompts"
        else:
            values[y] = _left_out(own, base if y == "delta" else None, np.isfinite(whole))
    return Asked(people, x, known, values, numbers)


def counts_table(
    counts: pl.DataFrame, adapters: Sequence[str], people: Sequence[str], numbers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """hits and totals, two (P, Q) float64 arrays of rows (adapter, persona) by question; 0 where nothing was counted.
    counts: schema `question_counts` of one behavior."""
    hits, total = (np.zeros((len(people), len(numbers))) for _ in range(2))
    if not counts.height or not len(numbers):
        return hits, total
    rows = pl.DataFrame({"adapter": adapters, "persona": people}).with_row_index("_row")
    mine = counts.filter(pl.col("adapter").is_in(list(set(adapters))))  # a join reads all that it is given
    cells = mine.join(rows, on=["adapter", "persona"]).filter(pl.col("question").is_in(list(numbers)))
    order = np.argsort(numbers, kind="stable")
    column = order[np.searchsorted(np.asarray(numbers)[order], cells["question"].to_numpy())]
    at = cells["_row"].to_numpy(), column
    hits[at], total[at] = cells["hits"].to_numpy(), cells["total"].to_numpy()
    return hits, total


def _left_out(
    own: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray] | None, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values without each question (P, Q), the standard error of a persona's mean that its cells give (P,), and the cells
    less their margins (P, Q); NaN rows for personas that are not known."""
    rest = [side.sum(1, keepdims=True) - side for side in own]
    with np.errstate(divide="ignore", invalid="ignore"):
        if base is None:
            values, cell = rest[0] / rest[1], own[0] / own[1]
        else:
            others = [side.sum(1, keepdims=True) - side for side in base]
            values, cell = ties.difference(*rest, *others), own[0] / own[1] - base[0] / base[1]
    p, q = cell.shape
    margin = (
        np.nanmean(cell, axis=1, keepdims=True) + np.nanmean(cell, axis=0, keepdims=True) - np.nanmean(cell)
    )
    rest_of = cell - margin
    noise = np.sqrt(np.nansum(rest_of**2, axis=1) / max(1, q - 1) / q * p / max(1, p - 1))
    values, rest_of = (np.where(known[:, None], side, np.nan) for side in (values, rest_of))
    return values, np.where(known, noise, np.nan), rest_of


def errors_of(parts: list[Asked], y: str, seed: int) -> tuple[np.ndarray, np.ndarray] | str:
    """(standard error of z over questions (K,), that of cells (K,)), or why there is none."""
    for part in parts:
        if isinstance(found := part.values[y], str):
            return found
    if any(part.questions != parts[0].questions for part in parts):
        return "the sources were asked different questions"
    sides = [part.values[y] for part in parts]
    x = np.concatenate([part.x for part in parts])
    without = np.concatenate([side[0] for side in sides])
    noise = np.concatenate([side[1] for side in sides])
    block = np.repeat(np.arange(len(parts)), [len(part.people) for part in parts])
    q = without.shape[1]
    # the value itself, to which noise is added: the mean of those without one question each
    draws = np.random.Generator(np.random.PCG64(seed)).normal(size=(len(noise), _NOISES)) * noise[:, None]
    noisy = without.mean(1, keepdims=True) + draws
    of_questions, of_cells = np.full(x.shape[1], np.nan), np.full(x.shape[1], np.nan)
    usable = np.isfinite(x) & np.isfinite(without).all(1)[:, None]
    for rows, members in alike(usable):
        if rows.sum() < 4:
            continue
        ranked = _unit_ranks(x[np.ix_(rows, members)], block[rows])
        with np.errstate(divide="ignore", invalid="ignore"):
            z, jitter = (
                np.arctanh(np.clip(ranked.T @ _unit_ranks(side[rows], block[rows]), -1, 1))
                for side in (without, noisy)
            )
            of_questions[members] = np.sqrt((q - 1) / q * np.square(z - z.mean(1, keepdims=True)).sum(1))
            of_cells[members] = jitter.std(1, ddof=1)
    return of_questions, of_cells


def _unit_ranks(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Ranks of each column within blocks, centered and of length 1; NaN for a column that does not vary."""
    return unit(within(values, block))


def beside(summary: pl.DataFrame, bystanders: pl.DataFrame | None) -> pl.DataFrame:
    """`summary` + the ends of the mean bystander's interval; null where `bystanders` has no row."""
    ends = ["mean_bystander_low", "mean_bystander_high"]
    if bystanders is None:
        return summary.with_columns(pl.lit(None, pl.Float64).alias(name) for name in ends)
    ours = bystanders.select("behavior", "adapter", *ends)
    return summary.join(ours, on=["behavior", "adapter"], how="left", maintain_order="left")


def mean_bystanders(rates: pl.DataFrame, questions: pl.DataFrame) -> pl.DataFrame:
    """A row per behavior and adapter: mean_bystander and mean_delta over its bystanders with 95 % intervals over other
    personas and questions (`of_mean`), personas, questions; null ends where a bystander lacks a question."""
    rows: list[dict[str, Any]] = []
    trained = rates.filter(role="bystander").group_by("behavior", "adapter", maintain_order=True)
    for (behavior, adapter), mine in trained if questions.height else ():
        counts = questions.filter(behavior=behavior)
        people, numbers = sorted(mine["persona"]), sorted(counts.filter(adapter=adapter)["question"].unique())
        own, base = (counts_table(counts, [name] * len(people), people, numbers) for name in (adapter, BASE))
        row: dict[str, Any] = {"behavior": behavior, "adapter": adapter, "personas": len(people)}
        row |= {
            "questions": len(numbers),
            "mean_bystander": mine["rate"].mean(),
            "mean_delta": mine["delta"].mean(),
        }
        for name, sides in (("mean_bystander", (own,)), ("mean_delta", (own, base))):
            whole = numbers and all((total > 0).all() for _, total in sides)
            if whole and (name == "mean_bystander" or not mine["delta"].null_count()):
                shares = [hits / total for hits, total in sides]
                _, low, high = of_mean(shares[0] if len(shares) == 1 else shares[0] - shares[1])
                row |= {f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    values = [f"{name}{end}" for name in ("mean_bystander", "mean_delta") for end in ("", "_low", "_high")]
    columns = {"behavior": pl.String, "adapter": pl.String, **dict.fromkeys(values, pl.Float64)}
    columns |= dict.fromkeys(("personas", "questions"), pl.Int64)
    return pl.DataFrame(rows, schema=columns).with_columns(pl.col(values).fill_nan(None))
