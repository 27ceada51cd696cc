"""The contract between what the probability of a behavior is asked of (words on replies, beginnings of a reply, given pairs of
replies) and the measurer, and the rows that come of it. Demands nothing; scores nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from leakfast.progress import Progress
from leakfast.storage import schema

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure.request import Target
    from leakfast.models.loading import Loaded

OK, TOO_LONG = "ok", "too_long"


class Asking(Protocol):
    """What is asked of every persona, in the same order under every adapter. each: things asked of a persona; estimators: a
    row of each thing for each of them; told: a hash of what is asked, whoever is asked how often: two probabilities where it
    differs are of two things."""

    each: int
    estimators: tuple[str, ...]
    told: str

    def key(self, start: int, stop: int) -> dict[str, Any]:
        """What the values of personas [start, stop) follow from, beside model and adapter; plain values."""

    def rows(
        self, current: Loaded, start: int, stop: int, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Those of the personas under the model as it is, in columns of schema `probability` (all but who is measured)."""


def frame(rows: list[dict[str, Any]], behavior: str, target: Target) -> pl.DataFrame:
    """Schema `probability` of rows of an `Asking`; what a row leaves out is null."""
    import polars as pl

    columns = schema.columns("probability")
    names = [name for name in columns if name not in ("behavior", "adapter", "source")]
    made = pl.DataFrame(rows, schema={name: columns[name] for name in names}, orient="row")
    made = made.with_columns(
        behavior=pl.lit(behavior), adapter=pl.lit(target.name), source=pl.lit(target.source, pl.String)
    )
    return schema.check(made.select(list(columns)), "probability")
