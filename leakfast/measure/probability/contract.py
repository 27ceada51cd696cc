"""What of a behavior its probability is asked of: words on replies, beginnings of a reply, or given pairs of replies; each under
one contract, `Asking`. Demands a loaded model and, for replies, a run that holds them; leaves shards to the measurer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from leakfast.behaviors.registry import get
from leakfast.errors import InputError
from leakfast.progress import Progress
from leakfast.storage import schema
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure.request import Asked, Target
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run

OK, TOO_LONG = "ok", "too_long"


class Asking(Protocol):
    """What is asked of every persona, in the same order under every adapter. each: things asked of a persona; estimators: a
    row of each thing for each of them."""

    each: int
    estimators: tuple[str, ...]

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


def check_asked(behavior: str) -> None:
    """Raises InputError for a behavior of which nothing says what its probability is asked of."""
    if get(behavior).probable_by is None:
        raise InputError(
            f"eval: the probability of {behavior} asked, but nothing says which words or beginnings show it. Needed: a "
            "behavior with a continuation, openings, or pairs for a judge. Leave --measure out for its own measurement."
        )


def askings(
    run: Run,
    loaded: Loaded,
    one: Asked,
    personas: Sequence[Persona],
    targets: Sequence[Target],
    stops: Collection[int],
    series: bool,
) -> list[tuple[Target, Asking, bool]]:
    """(target, what it is asked, whether on its own replies) of a behavior, targets in order, those on their own replies
    last. Raises InputError where replies, beginnings or pairs cannot be asked."""
    from leakfast.measure.probability.openings import Beginnings
    from leakfast.measure.probability.pairs import PairsAsked
    from leakfast.measure.probability.words import OnReplies

    kind = get(one.behavior).probable_by
    if kind != "words":
        asking = (Beginnings if kind == "openings" else PairsAsked)(loaded, one, personas)
        return [(target, asking, False) for target in targets]
    found: list[tuple[Target, Asking, bool]] = []
    if one.config.probability_replies != "own":
        shared = OnReplies(run, loaded, one, personas, stops)
        found += [(target, shared, False) for target in targets]
    if one.config.probability_replies != "base":
        mine = [target for target in targets if target.name != BASE]
        found += [(t, OnReplies(run, loaded, one, personas, stops, t.name, series), True) for t in mine]
    return found
