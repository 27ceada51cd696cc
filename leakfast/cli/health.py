"""What a command says before any number: which adapters damaged the model, or are to be read with care. Demands
sentences of `stats.health`; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure import Measured
    from leakfast.storage.run import Run


def tell(sentences: Iterable[str], *, err: bool = False) -> None:
    """A line for each adapter that is not ok; err: on stderr, because stdout is read by a program."""
    from leakfast.inert import inert

    for sentence in sentences:
        click.echo(inert(sentence), err=err)


def of_evaluation(run: Run, done: Measured) -> pl.DataFrame:
    """Table `health` of what was measured, and of the run's unadapted model if it is there (polars)."""
    from leakfast.stats import health
    from leakfast.storage.layout import BASE

    beside = f"{done.folders[0].rpartition('/')[0]}/{BASE}"
    return health.read(run, list(dict.fromkeys([*done.folders, beside])))
