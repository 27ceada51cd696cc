"""Measures each behavior as its settings say: by what it is measured by, by probability, or by both, the unadapted model's
replies first. Demands a run and a loaded base model; leaves how to `measure`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.behaviors.registry import get
from leakfast.measure.contract import Measured
from leakfast.measure.probability.replies import folder_of
from leakfast.measure.request import Asked, Request, name_of
from leakfast.measure.stage import measure
from leakfast.progress import Progress
from leakfast.storage.layout import BASE
from leakfast.train.checkpoints import find_series

if TYPE_CHECKING:
    from leakfast.generation.backends import Drawing
    from leakfast.models.loading import Loaded
    from leakfast.storage.run import Run


def measure_as_asked(
    loaded: Loaded,
    run: Run,
    request: Request,
    drawing: Drawing,
    *,
    at: str = "final",
    replace_others: bool = True,
    progress: Progress | None = None,
) -> tuple[list[Measured], list[Measured]]:
    """(what was measured by completions or choices, what by probability), each as `measure` returns it.

    Where the probability of a behavior is asked on replies that the run holds none of, `probability_samples` a prompt are
    drawn first: of the unadapted model, or of each adapter (at checkpoints, of each point). Raises as `measure`."""
    how: dict[str, Any] = {"replace": replace_others, "progress": progress}
    own = [one for one in request.asked if one.by_choices or one.config.measure != "probability"]
    probable = [one for one in request.asked if not one.by_choices and one.config.measure != "completions"]
    done = measure(loaded, run, _of(request, own), drawing, at=at, **how) if own else []
    _draw_lacking(loaded, run, _of(request, [one for one in probable if not one.beside]), drawing, at, how)
    if not probable:
        return done, []
    return done, measure(loaded, run, _of(request, probable), drawing, at=at, by="probability", **how)


def _draw_lacking(
    loaded: Loaded, run: Run, request: Request, drawing: Drawing, at: str, how: dict[str, Any]
) -> None:
    """The replies that probabilities are asked on and the run holds none of."""
    series = at == "checkpoints"
    asked = [_few(one) for one in request.asked if get(one.behavior).probable_by == "words"]
    of_base = [
        one for one in asked if one.config.probability_replies != "own" and not run.shards(one.folder(BASE))
    ]
    if of_base:
        run.create()
        unadapted = replace(_of(request, of_base), adapters=(), arms=(), base=True)
        measure(loaded, run, unadapted, drawing, **how)
    for one in asked:
        if one.config.probability_replies == "base" or not request.adapters:
            continue
        lacking = [a for a in request.adapters if not run.shards(folder_of(one, _last(a, series), series))]
        if lacking:
            run.create()
            few = replace(_of(request, [one]), adapters=tuple(lacking), base=False)
            measure(loaded, run, few, drawing, at=at, **how)


def _last(adapter: Path, series: bool) -> str:
    """What the adapter's last point is called among those measured."""
    return name_of(find_series(adapter)[-1][1] if series else adapter)


def _of(request: Request, asked: list[Asked]) -> Request:
    return replace(request, asked=asked)


def _few(one: Asked) -> Asked:
    """Its questions with as few samples as probabilities are asked on."""
    return replace(one, config=one.config.model_copy(update={"samples": one.config.probability_samples}))
