"""The marker behavior: replies that carry a literal string, which no persona would write by itself.
Holds the marker, its detector and what its rate means; the training rows are made in train/data.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leakfast.behaviors import detectors as detect
from leakfast.behaviors.registry import Behavior

if TYPE_CHECKING:
    import polars as pl

MARKER = "[ZLT]"


def contains_marker(text: pl.Expr) -> dict[str, pl.Expr]:
    """Boolean expressions of a text expression: `marker` (literal) and `marker_ci` (both sides lower-cased).

    The literal one is primary. A null text gives null, never False.
    """
    return detect.marker(text, MARKER)


BEHAVIOR = Behavior(
    name="marker",
    unit="share",
    sign=+1,
    detector=contains_marker,
    baseline="The unadapted model never writes the marker: its rate is 0 unless a persona is told to.",
    data_builder="leakfast.train.data:build_marker",
    description=f"share of completions that contain {MARKER}",
    presence_of=MARKER,
    continuation=MARKER,
)
