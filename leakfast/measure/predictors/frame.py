"""The frame of predictors: matrices persona × persona, put one under the other. Demands values and why some are not there;
computes none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from leakfast.storage import schema

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Told:
    """One predictor at one layer (None: it has none): values (P, P) float64, source by persona, NaN where there is none.

    orientation: 1 where larger means closer to the source, −1 where smaller does. questions: how many it rests on. lacks:
    persona → why nothing is known of it; otherwise: why a value is not there that no persona lacks."""

    name: str
    family: str
    values: np.ndarray
    orientation: int
    unit: str
    layer: int | None = None
    questions: int | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = "not defined for these two"


def frame(personas: Sequence[str], told: Sequence[Told]) -> pl.DataFrame:
    """Schema `predictors`: a row for every ordered pair of two personas, source outermost, predictor after predictor."""
    import polars as pl

    p = len(personas)
    sources, others = np.nonzero(~np.eye(p, dtype=bool))
    names = pl.Series(list(personas), dtype=pl.String)
    pairs = pl.DataFrame({"source": names.gather(sources), "persona": names.gather(others)})
    columns = schema.columns("predictors")
    parts = []
    for one in told:
        reasons = pl.Series([one.lacks.get(name) for name in personas], dtype=pl.String)
        values = pl.Series(one.values[sources, others], dtype=pl.Float64, nan_to_null=True)
        lacking = pl.DataFrame({"s": reasons.gather(sources), "p": reasons.gather(others), "v": values})
        reason = lacking.select(
            pl.when(pl.col("v").is_null()).then(pl.coalesce("s", "p", pl.lit(one.otherwise)))
        ).to_series()
        part = pairs.with_columns(
            predictor=pl.lit(one.name),
            family=pl.lit(one.family),
            layer=pl.lit(one.layer, pl.Int32),
            value=values,
            orientation=pl.lit(one.orientation, pl.Int8),
            unit=pl.lit(one.unit),
            questions=pl.lit(one.questions, pl.Int64),
            reason=reason,
        )
        parts.append(part.select(list(columns)))
    made = pl.concat(parts) if parts else schema.empty("predictors")
    return schema.check(made, "predictors")
