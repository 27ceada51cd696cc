"""All pictures of a run, by kind: which there are, and why one is not there. Demands a run and its tables; leaves files
and printing to callers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from leakfast.figures.fitting import fitting
from leakfast.figures.gradients import gradients
from leakfast.figures.grid import grid
from leakfast.figures.layers import layers
from leakfast.figures.matrix import matrix
from leakfast.figures.mitigations import mitigations
from leakfast.figures.partials import partials
from leakfast.figures.persona_map import persona_map
from leakfast.figures.predictors import predictors
from leakfast.figures.question_sets import question_sets
from leakfast.figures.relations import relations
from leakfast.figures.scatter import scatter
from leakfast.figures.shifts import shifts
from leakfast.figures.steering import steering
from leakfast.figures.style import PAGE_IN, captioned, noted
from leakfast.figures.trajectory import trajectory
from leakfast.geometry import Centroids
from leakfast.stats import expected_rates, marks, summary
from leakfast.stats import persona_map as planes
from leakfast.stats.matching import one_each
from leakfast.stats.tables import Stats
from leakfast.storage import layout
from leakfast.storage.run import Run


@dataclass(frozen=True)
class Choices:
    """What a reader may choose of the pictures. width: inches; layer: instead of each behavior's best; order: of the
    matrix's rows, `category`, `cluster` (near ones in the base model's geometry together) or `leakage`; p: `perm` or
    `t`, of the grid."""

    width: float = PAGE_IN
    layer: int | None = None
    cosine: str = "centered"
    order: str = "category"
    p: str = "perm"


@dataclass(frozen=True)
class Drawn:
    """A picture, or in `reason` why there is none. behavior: None where it is about all of them."""

    kind: str
    behavior: str | None
    figure: Figure | None
    reason: str | None = None


@dataclass
class _Source:
    """What pictures are made of; centroids are read once, and only for those that need them."""

    run: Run
    stats: Stats
    choices: Choices
    _centroids: list[Centroids | None] = field(default_factory=list)

    def layer(self, behavior: str) -> int | None:
        if self.choices.layer is not None:
            return self.choices.layer
        return self.stats.best_layer(behavior, self.choices.cosine)

    def of(self, behavior: str) -> dict[str, Any]:
        """The words that most pictures of a behavior share."""
        chosen = {
            "layer": self.layer(behavior),
            "cosine": self.choices.cosine,
            "y": self.stats.outcome(behavior),
        }
        return {"behavior": behavior, "width": self.choices.width} | chosen

    def apart(self, kind: str) -> list[str]:
        """The behaviors that have a picture each because a column does not hold them together; else none."""
        found: list[str] = []
        if self.choices.width < PAGE_IN and kind == "grid":
            found = self.stats.behaviors()
        elif self.choices.width < PAGE_IN and kind == "trajectory" and self.run.has(layout.table(kind)):
            found = self.run.read(layout.table(kind))["behavior"].unique(maintain_order=True).to_list()
        return found if len(found) > 1 else []

    def centroids(self) -> Centroids | None:
        if not self._centroids:
            there = self.run.has(layout.centroids())
            self._centroids.append(Centroids.load(self.run.path / layout.centroids()) if there else None)
        return self._centroids[0]


_NO_CENTROIDS = "the run holds no centroids of the base model"
_NO_LAYER = "no ρ is defined at a layer (`leakfast stats` says why)"


def _scatter(source: _Source, behavior: str) -> Figure | str:
    told = source.of(behavior)
    if told["layer"] is None:
        return _NO_LAYER
    tables = source.stats.tables()
    pairs, few = fitting(tables["pairs"], behavior, told["y"])
    return captioned(scatter(*(tables | {"pairs": pairs}).values(), **told), few)


def _probability(source: _Source, behavior: str) -> Figure | str:
    """The scatter with the probability in the rate's place."""
    more, layer = source.stats.more, source.layer(behavior)
    if "probability_correlations" not in more or layer is None:
        return "no probability was measured beside the rates"
    rates = expected_rates.beside(source.stats.rates, more["probabilities"])
    if rates.filter(pl.col("probability").is_not_null(), behavior=behavior).is_empty():
        return "no probability was measured beside its rates"
    told = source.of(behavior) | {"y": "probability"}
    pairs = expected_rates.pairs_by(source.stats.pairs, rates).rename({"rate": "probability"})
    pairs, few = fitting(pairs, behavior, "probability")
    return captioned(scatter(rates, pairs, more["probability_correlations"], **told), few)


def _layers(source: _Source, behavior: str) -> Figure | str:
    told = {"behavior": behavior, "y": source.stats.outcome(behavior), "width": source.choices.width}
    figure = layers(source.stats.correlations, picked=source.stats.more.get("picked"), **told)
    return figure or "fewer than two layers have a ρ"


def _gradients(source: _Source, behavior: str) -> Figure | str:
    more, unit = source.stats.more, source.stats.unit(behavior)
    if "gradients" not in more or "isotonic" not in more:
        return "the run has no table `gradients`"
    told = {"behavior": behavior, "unit": unit, "width": source.choices.width}
    pairs, few = fitting(source.stats.pairs, behavior, "rate")
    fits = more["gradients"].join(pairs, on="adapter", how="semi", maintain_order="left")
    figure = gradients(pairs, fits, more["isotonic"], **told)
    return "no source has a curve" if figure is None else captioned(figure, few)


def _matrix(source: _Source, behavior: str) -> Figure | str:
    table, order = source.stats.more.get("matrix"), source.choices.order
    if table is None:
        return "the run has no table `matrix`"
    rows: str | list[str] = order
    if order == "cluster":
        centroids = source.centroids()
        if centroids is None:
            return f"{_NO_CENTROIDS}, which the order `cluster` needs; choose category or leakage"
        rows = planes.in_a_row(centroids)
    stats, told = source.stats, {"behavior": behavior, "order": rows, "width": source.choices.width}
    return matrix(table, y=stats.outcome(behavior), unit=stats.unit(behavior), **told) or "no value is known"


def _of_table(draw: Callable[..., Figure | None], *names: str, unit: bool = True):
    """A picture of one table or two at a layer."""

    def drawn(source: _Source, behavior: str) -> Figure | str:
        told, more = source.of(behavior), source.stats.more
        if any(name not in more for name in names):
            return f"the run has no table `{names[0]}`"
        if told["layer"] is None:
            return _NO_LAYER
        told |= {"unit": source.stats.unit(behavior)} if unit else {}
        return draw(*(more[name] for name in names), **told) or "nothing is defined at this layer"

    return drawn


def _predictors(source: _Source, behavior: str) -> Figure | str:
    table = source.stats.more.get("predictors_held_out")
    if table is None:
        return "fewer than two sources were trained: none can be left out"
    return predictors(table, behavior=behavior, width=source.choices.width) or "no predictor has a mean ρ"


def _steering(source: _Source, behavior: str) -> Figure | str:
    table = source.stats.more.get("steering")
    if table is None:
        return "nothing was steered"
    return steering(table, behavior=behavior, width=source.choices.width) or "it was not measured steered"


def _mitigations(source: _Source, behavior: str) -> Figure | str:
    table = source.stats.more.get("mitigations")
    if table is None:
        return "the run has no behavior with variants"
    return (
        mitigations(table, behavior=behavior, width=source.choices.width) or "it is no behavior with variants"
    )


def _grid(source: _Source, behavior: str | None = None) -> Figure | str:
    every = source.stats.behaviors() if behavior is None else [behavior]
    found = {name: source.layer(name) for name in every}
    at = {behavior: layer for behavior, layer in found.items() if layer is not None}
    if not at:
        return _NO_LAYER
    chosen = source.choices
    told = {"cosine": chosen.cosine, "p": chosen.p, "width": chosen.width}
    tables, first = source.stats.tables(), next(iter(at))
    pairs, few = fitting(tables["pairs"], first, source.stats.outcome(first))
    return captioned(grid(*(tables | {"pairs": pairs}).values(), layers=at, **told), few)


def _relations(source: _Source) -> Figure | str:
    table = source.stats.more.get("relations")
    if table is None or table["behavior"].n_unique() < 2:
        return "the run has one behavior; relations set several side by side"
    units = {behavior: source.stats.unit(behavior) for behavior in table["behavior"].unique()}
    alike = source.stats.more["relations_alike"]
    return relations(table, alike, units=units, width=source.choices.width) or "no category is known"


def _trajectory(source: _Source, behavior: str | None = None) -> Figure | str:
    if not source.run.has(layout.table("trajectory")):
        return "nothing was measured at points of training"
    table = source.run.read(layout.table("trajectory"))
    table = one_each(table if behavior is None else table.filter(behavior=behavior))
    figure = trajectory(table, lambda behavior: summary.unit(table, behavior), source.choices.width)
    return noted(figure, marks.series_note(table))


def _map(source: _Source) -> Figure | str:
    centroids = source.centroids()
    if centroids is None:
        return _NO_CENTROIDS
    known = [layer for b in source.stats.behaviors() if (layer := source.layer(b)) is not None]
    layer = known[0] if known else centroids.layers[-1]
    trained = source.stats.rates.filter(pl.col("role") == "source")
    kinds = dict(source.stats.rates.select("persona", "category").drop_nulls().rows())
    if source.run.has(layout.PERSONAS):
        kinds |= json.loads((source.run.path / layout.PERSONAS).read_text(encoding="utf-8")).get(
            "categories", {}
        )
    try:
        found = planes.persona_map(centroids, layer, source.choices.cosine)
    except ValueError as error:  # too few personas, or a layer that was not computed
        return str(error)
    return persona_map(found, kinds, trained["source"].unique().to_list(), width=source.choices.width)


_OF_ALL: dict[str, Callable[[_Source], Figure | str]] = {
    "grid": _grid,
    "relations": _relations,
    "trajectory": _trajectory,
    "map": _map,
}
_OF_ONE: dict[str, Callable[[_Source, str], Figure | str]] = {
    "scatter": _scatter,
    "probability": _probability,
    "layers": _layers,
    "gradients": _gradients,
    "matrix": _matrix,
    "partials": _of_table(partials, "partials", unit=False),
    "predictors": _predictors,
    "question_sets": _of_table(question_sets, "question_sets"),
    "shifts": _of_table(shifts, "shifts", "shift_correlations"),
    "steering": _steering,
    "mitigations": _mitigations,
}
KINDS = ("grid", *_OF_ONE, "relations", "trajectory", "map")


@dataclass(frozen=True)
class Picture:
    """A picture that a run may have, not drawn yet."""

    kind: str
    behavior: str | None
    draw: Callable[[], Drawn]


def draw(run: Run, stats: Stats, only: Sequence[str] = (), choices: Choices = Choices()) -> Iterator[Drawn]:
    """The pictures of a run, one after the other: those of `only` (of KINDS; empty: all), a behavior at a time where
    they are about one. Each has what its adapters' health asks to be said below it."""
    return (picture.draw() for picture in pictures(run, stats, only, choices))


def pictures(
    run: Run, stats: Stats, only: Sequence[str] = (), choices: Choices = Choices()
) -> Iterator[Picture]:
    """The same, each drawn when it is asked for."""
    source = _Source(run, stats, choices)
    every = stats.behaviors()
    for kind in KINDS:
        if only and kind not in only:
            continue
        apart, those = source.apart(kind), every
        if (
            kind == "steering" and (steered := stats.more.get(kind)) is not None
        ):  # some may be measured so alone
            those = list(dict.fromkeys([*every, *steered["behavior"].unique(maintain_order=True)]))
        for behavior in apart or (those if kind in _OF_ONE else []):
            yield Picture(kind, behavior, partial(_of_behavior, source, kind, behavior))
        if not apart and kind in _OF_ALL:
            yield Picture(kind, None, partial(_of_run, source, kind))


def _of_behavior(source: _Source, kind: str, behavior: str) -> Drawn:
    made = (_OF_ONE | {"grid": _grid, "trajectory": _trajectory})[kind](source, behavior)
    note = None if kind == "trajectory" else marks.notes(source.stats.health, behavior)  # which has its own
    return _drawn(kind, behavior, made, note)


def _of_run(source: _Source, kind: str) -> Drawn:
    every = source.stats.behaviors() if kind in ("grid", "relations") else []
    told = [marks.notes(source.stats.health, behavior) for behavior in every]
    return _drawn(kind, None, _OF_ALL[kind](source), "; ".join(filter(None, told)) or None)


def _drawn(kind: str, behavior: str | None, made: Figure | str, note: str | None) -> Drawn:
    if isinstance(made, str):
        return Drawn(kind, behavior, None, made)
    return Drawn(kind, behavior, noted(made, note))
