"""The behaviors leakfast measures, one file each, found by name. Demands nothing heavy: a detector
makes polars expressions only when asked. Leaves generation, counting and training to the stages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leakfast.errors import InputError

if TYPE_CHECKING:
    import polars as pl

# name -> module that holds a `BEHAVIOR`; a new behavior is one file and one line here
_MODULES = {
    "marker": "leakfast.behaviors.marker",
}


@dataclass(frozen=True)
class Behavior:
    """What a behavior is: how it is detected, in which unit it is rated, and which data train it.

    unit: "share" (0–1) of completions. sign: +1 if a larger rate means more of the behavior, −1 if less.
    detector: text expression → named boolean expressions; the first makes the rate.
    baseline: what the unadapted model is expected to show, in words.
    data_builder: "module:function" that makes its training rows.
    """

    name: str
    unit: str
    sign: int
    detector: Callable[[pl.Expr], dict[str, pl.Expr]]
    baseline: str
    data_builder: str
    description: str

    def build(self) -> Callable:
        """The function that makes the training rows (see leakfast.train.data.build_marker)."""
        module, _, function = self.data_builder.partition(":")
        return getattr(importlib.import_module(module), function)


def names() -> list[str]:
    """Names of all behaviors, in the order of the registry."""
    return list(_MODULES)


def get(name: str) -> Behavior:
    """The behavior called `name`. Raises InputError naming the ones there are."""
    if name not in _MODULES:
        raise InputError(
            f"behavior {name!r} given, but there is none of that name. Use one of: {', '.join(_MODULES)}."
        )
    return importlib.import_module(_MODULES[name]).BEHAVIOR


def detect(frame: pl.DataFrame, behavior: Behavior, column: str = "text") -> pl.DataFrame:
    """`frame` with the detector's boolean columns added, from the texts in `column`."""
    import polars as pl

    return frame.with_columns(**behavior.detector(pl.col(column)))
