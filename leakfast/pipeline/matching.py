"""Where trainings are equally strong on their sources: the sources alone are measured at all points, and of each adapter the
point nearest to the study's `match` is chosen. Demands trained adapters and a run; leaves asking everybody there to the
stages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from leakfast.behaviors.registry import get
from leakfast.measure import Drawing, Measured, Request, measure
from leakfast.models.adapters import card_in
from leakfast.pipeline import asks
from leakfast.stats import rates
from leakfast.stats.matching import nearest
from leakfast.storage import layout
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.pipeline.steps import Steps
    from leakfast.prompts.personas import Persona
    from leakfast.study.config import Study

log = logging.getLogger("leakfast.run")

Points = dict[str, list[float]]  # adapter → shares of its training


def steps_of(behavior: str) -> tuple[str, str]:
    """What the two steps are called: to choose, and anew where it was chosen."""
    return f"{behavior} of the sources through training", f"{behavior} of the sources where they match"


def matched(
    study: Study,
    loaded: Loaded,
    steps: Steps,
    personas: Sequence[Persona],
    behavior: str,
    adapters: Sequence[Path],
) -> Points:
    """Where everybody is measured: of each adapter the chosen point and the end. What the sources said is kept in the run, and
    the choice follows from it, so that the same call again makes nothing anew and chooses the same.

    The replies that choose and those that are drawn anew at the chosen point have other seeds, and those of everybody have
    others again: no reply is in two of them."""
    if not adapters:
        return {}
    people, one = asks.asked_to_match(study, behavior, personas)
    run, drawing, seed = steps.run, Drawing.of(study), study.seeds[0]

    def drawn(title: str, kind: str, points: Mapping[str, Sequence[float]]) -> list[Measured]:
        request = Request(
            [replace(one, apart=kind)],
            people,
            adapters,
            seed=derive_seed(seed, "match", kind),
            points=points,
            source_alone=True,
        )
        with steps.timed(title) as report:
            return measure(loaded, run, request, drawing, at="checkpoints", progress=report)

    looking, anew = steps_of(behavior)
    every = {adapter.name: asks.points(study, _taught(run.path, adapter)) for adapter in adapters}
    found = _chosen(steps, behavior, drawn(looking, layout.CHOOSING, every), study.trajectory.match or 0.0)
    drawn(anew, layout.CHOSEN, {name: [share] for name, share in found.items()})
    return {name: sorted({share, 1.0}) for name, share in found.items()}


def _taught(run: Path, adapter: Path) -> str:
    """The behavior that an adapter of the run was trained for."""
    card = card_in(run, adapter.name)
    assert card is not None, f"the run made {adapter.name} with its card"
    return card.behavior


def _chosen(steps: Steps, behavior: str, measured: Sequence[Measured], match: float) -> dict[str, float]:
    """Adapter → the share at which its source's rate is nearest; told of in the journal."""
    detector = get(behavior).detector
    assert detector is not None, "references refuses the rest"
    counts: dict[str, list[tuple[float, int, int]]] = {}
    for one in measured:
        for target, folder in zip(one.targets, one.folders, strict=True):
            counted = rates.count(steps.run.read(folder), detector(pl.col("text")))
            adapter, share = layout.point(target.name)
            assert adapter is not None, "no base is asked"
            told = (int(counted["hits"].sum()), int(counted["total"].sum()))
            counts.setdefault(adapter, []).append((share, *told))
    found: dict[str, float] = {}
    for adapter, points in counts.items():
        near = nearest(points, match)
        if near is None:
            log.warning("%s: no reply of its source could be counted; its end is taken", adapter)
        found[adapter] = 1.0 if near is None else near
        hits, total = next((h, n) for at, h, n in points if at == found[adapter])
        about = {"behavior": behavior, "adapter": adapter, "match": match, "share": found[adapter]}
        steps.run.log("matched", **about, hits=hits, total=total, points=len(points))
    return found
