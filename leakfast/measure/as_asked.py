"""Measures each behavior as its settings say: by what it is measured by, by probability, or by both, the unadapted model's
replies first. Demands a run and a loaded base model; leaves how to `measure`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leakfast.measure.contract import Measured
from leakfast.measure.request import Asked, Request
from leakfast.measure.stage import measure
from leakfast.progress import Progress
from leakfast.storage.layout import BASE

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

    Where the probability of a behavior is asked and the run holds no replies of the unadapted model to it,
    `probability_samples` a prompt are drawn first. Raises as `measure`."""
    how: dict[str, Any] = {"replace": replace_others, "progress": progress}
    own = [one for one in request.asked if one.by_choices or one.config.measure != "probability"]
    probable = [one for one in request.asked if not one.by_choices and one.config.measure != "completions"]
    done = measure(loaded, run, _of(request, own), drawing, at=at, **how) if own else []
    lacking = [_few(one) for one in probable if not one.beside and not run.shards(one.folder(BASE))]
    if lacking:
        run.create()
        measure(loaded, run, replace(_of(request, lacking), adapters=(), base=True), drawing, **how)
    if not probable:
        return done, []
    return done, measure(loaded, run, _of(request, probable), drawing, at=at, by="probability", **how)


def _of(request: Request, asked: list[Asked]) -> Request:
    return replace(request, asked=asked)


def _few(one: Asked) -> Asked:
    """Its questions with as few samples as probabilities are asked on."""
    return replace(one, config=one.config.model_copy(update={"samples": one.config.probability_samples}))
