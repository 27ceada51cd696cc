"""Measuring adapters and the base under interventions: what a study measures of each, and what it costs. Demands a run and a
request with arms; leaves the dose-response to stats.steering."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leakfast.measure.as_asked import measure_as_asked
from leakfast.measure.plain_text import score
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.generation.backends import Drawing
    from leakfast.measure.contract import Measured
    from leakfast.measure.request import Request
    from leakfast.models.loading import Loaded
    from leakfast.storage.run import Run


def measure_steered(
    loaded: Loaded,
    run: Run,
    request: Request,
    drawing: Drawing,
    *,
    replace_others: bool = True,
    progress: Progress | None = None,
) -> list[Measured]:
    """Everything the request asks, under each of its arms, into steered/; then plain text. Raises as `measure`, and
    InputError for a direction that does not fit the model, before anything is measured."""
    from leakfast.steering.directions import check_fits

    if not request.arms:
        raise ValueError("nothing is done to the model: the request has no arms")
    for arm in request.arms:
        check_fits(arm.directions, loaded, arm.name)
    done, probable = measure_as_asked(
        loaded, run, request, drawing, replace_others=replace_others, progress=progress
    )
    score(loaded, run, request, progress)
    return [*done, *probable]
