"""Measuring a model into a run directory: `measure(loaded, run, request, drawing, at=…)`. A Request says which adapters,
personas and behaviors, a Drawing how completions are drawn; completions, multiple choice and the probability of a behavior's
words are three measurers behind one protocol (contract.Measurer). Centroids are measured beside them. Demands a
run and a loaded base model; the same call again resumes. Leaves counting to leakfast.stats."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leakfast.generation.backends import Drawing
    from leakfast.measure.contract import Measured
    from leakfast.measure.request import Asked, Request, asked_of
    from leakfast.measure.stage import measure, rates

__all__ = ["Asked", "Drawing", "Measured", "Request", "asked_of", "measure", "rates"]

_HOMES = {"Asked": "request", "Request": "request", "asked_of": "request", "Measured": "contract"}


def __getattr__(
    name: str,
) -> Any:  # loaded when asked for: tables read this package's modules without a model
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'stage')}"), name)
