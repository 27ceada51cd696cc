"""Finished runs that a prediction learns from, and what of it reaches beyond them. Demands runs with counted shares and
centroids (or a frame of predictors); leaves the fit to `predicting`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from leakfast.behaviors.registry import sign_of
from leakfast.errors import InputError
from leakfast.geometry import Centroids
from leakfast.stats import predicting, predictors, ties
from leakfast.stats.association import spearman_and_pearson
from leakfast.stats.collect import Collected, collect
from leakfast.stats.people import read_people
from leakfast.storage import layout
from leakfast.storage.documents import did_you_mean
from leakfast.storage.run import Run


@dataclass(frozen=True)
class Trained:
    """An adapter of a run: x (P, L), oriented values of the predictor at `layers`; hits, total (P,)."""

    source: str
    adapter: str
    category: str | None
    model: str
    personas: list[str]
    layers: list[int | None]
    x: np.ndarray
    hits: np.ndarray
    total: np.ndarray

    def at(self, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(values (P,), whether value and counts are known (P,))."""
        x = self.x[:, self.layers.index(layer)]
        return x, np.isfinite(x) & (self.total > 0)


@dataclass(frozen=True)
class Base:
    """What is known of the source to predict, before training: values of the predictor, columns `predictors.FRAME`; the
    personas' categories; fingerprint of the model."""

    frame: pl.DataFrame
    categories: dict[str, str | None]
    model: str


@dataclass(frozen=True)
class Forecast:
    """rows: bystanders, the most leakage first; sources: whose lines it rests on; remarks: what it reaches beyond."""

    rows: pl.DataFrame
    sources: list[str]
    predictor: str
    layer: int | None
    level: float
    completions: int
    remarks: list[str] = field(default_factory=list)


def trained(runs: Sequence[str | Path], behavior: str, predictor: str) -> list[Trained]:
    """Every adapter of `behavior` in the runs; those that were taught another one only where a run has no others (of a
    control, say), since what they leak of it is not what is predicted.

    Raises InputError where a run has none, where nothing was counted, and for a predictor that a run does not have."""
    found: list[Trained] = []
    for path in runs:
        run = Run(path).open()
        told = collect(run)
        rates = told.rates.filter(behavior=behavior)
        taught = rates.filter((pl.col("taught") == behavior).fill_null(True))
        rates = rates if taught.filter(role="bystander").is_empty() else taught
        if rates.filter(role="bystander").is_empty():
            known = ", ".join(told.rates["behavior"].unique(maintain_order=True)) or "none"
            raise InputError(
                f"predict: {run.path} holds no trained adapter of {behavior!r} (behaviors: {known}). Runs in which that "
                "behavior was measured under other personas are needed. Give one of these with --from."
            )
        frame, model = frame_of(run, told)
        names = frame["predictor"].unique(maintain_order=True).to_list()
        if predictor not in names:
            raise InputError(
                f"predict: {predictor!r} asked, but {run.path} has the predictors {', '.join(names) or 'none'}."
                f"{did_you_mean(predictor, names)} Use --predictor with one of these, or make the others with "
                f"`leakfast predictors --model MODEL --out {run.path}`, of the run's own model."
            )
        found += _of_run(rates, told, frame.filter(predictor=predictor), model)
    if not any(np.isfinite(one.total).any() for one in found):
        raise InputError(
            f"predict: {behavior} of these runs has scores, and no counts. The interval is one of shares, so hits among "
            "completions (or items) are needed. Choose a behavior that is counted, such as --behavior marker."
        )
    return found


def frame_of(run: Run, told: Collected) -> tuple[pl.DataFrame, str]:
    """The run's frame of predictors (its cosines and words where none was made) and its model's fingerprint."""
    model = told.centroids.metadata.get("model_fingerprint", "") if told.centroids is not None else ""
    return predictors.of_run(told), str(model)


def _of_run(rates: pl.DataFrame, told: Collected, frame: pl.DataFrame, model: str) -> list[Trained]:
    found = []
    for made in predictors.compared(rates, told.questions, frame):
        for number, (adapter, source) in enumerate(made.adapters):
            mine = made.adapter == number
            sides = made.x[mine], made.hits[mine], np.nan_to_num(made.total[mine])
            layers = [column.layer for column in made.columns]
            kind = told.people.categories.get(source)
            found.append(Trained(source, adapter, kind, model, made.persona[mine].tolist(), layers, *sides))
    return found


def base_of(path: str | Path) -> Base:
    """What a run folder with base centroids, or a frame of predictors, knows before training. Raises InputError without."""
    run = Run(path).open()
    people, _ = read_people(run)
    there = (run.path / layout.centroids()).is_file()
    centroids = Centroids.load(run.path / layout.centroids()) if there else None
    frame = predictors.of_frame(run.read(layout.PREDICTORS))
    if frame.is_empty() and centroids is None:
        raise InputError(
            f"predict: {run.path} holds neither {layout.centroids()} nor a frame of predictors, of which one is needed. Make "
            f"it with `leakfast centroids --model MODEL --out {run.path / layout.centroids()}`."
        )
    if frame.is_empty() and centroids is not None:
        frame = of_model(centroids, people).frame
    told = run.manifest["shards"].get(layout.predictors(), {}).get("base", "")
    model = told if centroids is None else centroids.metadata.get("model_fingerprint", "")
    return Base(frame, people.categories, str(model))


def of_model(centroids: Centroids, people) -> Base:
    """The same of centroids that were just made; people: `collect.People`."""
    names = list(centroids.personas)
    frame = pl.concat([predictors.of_centroids(centroids, names), predictors.of_text(people, names)])
    frame = frame.filter(pl.col("persona").is_in(names))
    return Base(frame, people.categories, str(centroids.metadata.get("model_fingerprint", "")))


def layer_of(pairs: Sequence[Trained], layer: int | None = None) -> int | None:
    """The layer that is used: `layer`, else of those that all adapters have the one with the largest |mean ρ| of value and
    rate; None of a predictor without layers. Raises InputError for a layer that not all have."""
    common = [at for at in pairs[0].layers if all(at in one.layers for one in pairs)]
    if not common:
        raise InputError(
            "predict: the runs have the predictor at no common layer, so that nothing learned from one holds for another. "
            "Needed: runs whose centroids (or predictors) share a layer. Give other runs with --from, or make them there too."
        )
    if layer is not None and layer not in common:
        known = ", ".join(str(at) for at in common if at is not None) or "none"
        raise InputError(
            f"predict: layer {layer} asked, but the layers that all runs have are {known}. Use one of these, or leave "
            "--layer out for the one with the largest mean ρ."
        )
    if layer is not None:
        return layer
    return max(common, key=lambda at: abs(float(np.mean([_rho(one, at) for one in pairs]))))


def _rho(one: Trained, layer: int | None) -> float:
    x, known = one.at(layer)
    if known.sum() < 4:
        return 0.0
    rho = spearman_and_pearson(x[known][:, None], one.hits[known] / one.total[known])[0][0]
    return float(np.nan_to_num(rho))


def lines_of(pairs: Sequence[Trained], layer: int | None) -> tuple[list[predicting.Line], list[str]]:
    """The fits at a layer, and a sentence for each adapter that has none."""
    lines, lacking = [], []
    for one in pairs:
        x, known = one.at(layer)
        made = predicting.line(one.source, x[known], one.hits[known], one.total[known])
        if isinstance(made, str):
            lacking.append(f"{one.adapter} is not in the fit: {made}")
        else:
            lines.append(made)
    return lines, lacking


def forecast(
    pairs: Sequence[Trained],
    base: Base,
    source: str,
    behavior: str,
    predictor: str,
    *,
    layer: int | None = None,
    level: float = predicting.LEVEL,
) -> Forecast:
    """Bystanders of `source`, the most leakage first, from the adapters of all other sources. rows: rank, persona, category,
    value (oriented), expected, low, high, measured_low, measured_high, outside (the value lies beyond those of all pairs
    that were fitted), seen (whether a run measured that persona), measured (where a run has trained this source, which is then
    left out of the fit). Raises InputError without another source, or where the source is not known."""
    own, others = ([one for one in pairs if (one.source == source) == mine] for mine in (True, False))
    if not others:
        raise InputError(
            f"predict: the runs trained {source} alone, and a source cannot be predicted from itself. At least one other source "
            f"is needed, {predicting.FEWEST} for an interval worth reading. Give further runs with --from."
        )
    at = layer_of(others, layer)
    mine = base.frame.filter(
        pl.col("layer").eq_missing(pl.lit(at, pl.Int32)), source=source, predictor=predictor
    )
    mine = mine.filter(pl.col("value").is_not_null(), pl.col("persona") != source)
    if mine.is_empty():
        known = base.frame.filter(predictor=predictor)["source"].unique().sort().to_list()
        raise InputError(
            f"predict: {predictor} of {source!r} is not known at {f'layer {at}' if at is not None else 'all'}; there are "
            f"{len(known)} personas with it.{did_you_mean(source, known)} Use --source with one of these, or --run with a "
            "folder that has its centroids."
        )
    lines, remarks = lines_of(others, at)
    if not lines:
        raise InputError(
            f"predict: no source can be fitted: {'; '.join(remarks)}. Give other runs with --from."
        )
    completions = int(np.median(np.concatenate([one.total[one.total > 0] for one in others])))
    value = ties.floats(mine["value"] * mine["orientation"].cast(pl.Float64))
    found = predicting.predict(lines, value, completions, level)
    ends = [bound for one in others for bound in _range(one, at)]
    rows = mine.select("persona").with_columns(
        pl.col("persona")
        .replace_strict(base.categories, default=None, return_dtype=pl.String)
        .alias("category"),
        pl.Series("value", value),
        *predicting.as_columns(found),
        pl.Series("outside", (value < min(ends)) | (value > max(ends))),
        pl.col("persona")
        .is_in({name for one in others for name in one.personas} | {o.source for o in others})
        .alias("seen"),
        pl.col("persona")
        .replace_strict(_measured(own), default=None, return_dtype=pl.Float64)
        .alias("measured"),
    )
    order = pl.col("expected") * -sign_of(behavior)
    rows = rows.sort(order, "persona", maintain_order=True).with_row_index("rank", 1)
    rows = rows.with_columns(pl.col("rank").cast(pl.Int64))
    told = _remarks(rows, own, others, base, source, lines)
    names = list(dict.fromkeys(one.source for one in lines))
    return Forecast(rows, names, predictor, at, level, completions, [*told, *remarks])


def _range(one: Trained, layer: int | None) -> tuple[float, float]:
    x, known = one.at(layer)
    return (float(x[known].min()), float(x[known].max())) if known.any() else (np.inf, -np.inf)


def _measured(own: Sequence[Trained]) -> dict[str, float]:
    """persona → its measured share under the adapters of one source together."""
    hits: dict[str, float] = {}
    total: dict[str, float] = {}
    for one in own:
        for name, h, n in zip(one.personas, np.nan_to_num(one.hits), one.total, strict=True):
            hits[name], total[name] = hits.get(name, 0.0) + h, total.get(name, 0.0) + n
    return {name: hits[name] / total[name] for name in hits if total[name] > 0}


def _remarks(
    rows: pl.DataFrame,
    own: Sequence[Trained],
    others: Sequence[Trained],
    base: Base,
    source: str,
    lines: Sequence[predicting.Line],
) -> list[str]:
    """What the prediction reaches beyond."""
    told, names = [], sorted({one.source for one in lines})
    if own:
        told.append(f"{source} was trained in these runs; it is left out of the fit")
    if len(names) == 1:
        told.append(
            f"one source ({names[0]}) was fitted: there is no spread between sources, and no interval"
        )
    elif len(names) < predicting.FEWEST:
        told.append(
            f"{len(names)} sources were fitted: the interval is wide, because they say little of a third"
        )
    models = {one.model for one in others}
    if models != {base.model}:
        told.append("the source's values are of another model than the runs': its line may be another one")
    if len(models) > 1:
        told.append("the runs are of different models")
    if (n := int(rows["outside"].sum())) > 0:
        told.append(
            f"{n} of {rows.height} bystanders lie beyond the values that were fitted: their rates are extrapolated"
        )
    if unseen := rows.filter(~pl.col("seen")).height:
        told.append(f"{unseen} of {rows.height} personas were measured in none of the runs")
    kinds, kind = {one.category for one in others if one.source in names}, base.categories.get(source)
    if kind not in kinds:
        known = ", ".join(sorted(str(k) for k in kinds))
        told.append(f"{source} is of the kind {kind}, the fitted sources are {known}")
    return told


def coverage(
    pairs: Sequence[Trained], *, layer: int | None = None, level: float = predicting.LEVEL
) -> pl.DataFrame:
    """Each source left out in turn (layer and fit from the others): source, sources (others), layer, n, held (share of its
    bystanders whose measured share the interval of shares holds), held_rate (that of rates), spearman (of expected and measured),
    mean_expected, mean_measured, reason. The same personas stand under all sources, so shares of different sources
    are not independent."""
    rows = []
    for source in dict.fromkeys(one.source for one in pairs):
        own, others = ([o for o in pairs if (o.source == source) == mine] for mine in (True, False))
        row: dict = {"source": source, "sources": len({one.source for one in others})}
        if row["sources"] < 2:
            rows.append(row | {"reason": "fewer than two other sources"})
            continue
        at = layer_of(others, layer)
        lines, lacking = lines_of(others, at)
        if len({one.source for one in lines}) < 2:
            rows.append(row | {"layer": at, "reason": "; ".join(lacking)})
            continue
        inside, n, expected, measured = np.zeros(2), 0, [], []
        for one in own:
            x, known = one.at(at)
            completions = int(np.median(one.total[known]))
            found = predicting.predict(lines, x[known], completions, level)
            inside += np.array(predicting.held(found, one.hits[known], one.total[known])) * known.sum()
            n += int(known.sum())
            expected.append(found.expected)
            measured.append(one.hits[known] / one.total[known])
        x, y = np.concatenate(expected), np.concatenate(measured)
        rho = float(spearman_and_pearson(x[:, None], y)[0][0])
        row |= {"layer": at, "n": n, "held": inside[0] / n, "held_rate": inside[1] / n}
        row |= {"spearman": rho if np.isfinite(rho) else None}
        rows.append(row | {"mean_expected": float(x.mean()), "mean_measured": float(y.mean())})
    kinds = {"source": pl.String, "sources": pl.Int64, "layer": pl.Int32, "n": pl.Int64}
    kinds |= dict.fromkeys(("held", "held_rate", "spearman", "mean_expected", "mean_measured"), pl.Float64)
    return pl.DataFrame(rows, schema=kinds | {"reason": pl.String})
