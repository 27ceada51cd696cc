"""What `leakfast eval --measure probability` shows: mean probabilities by persona. Demands what `measure` returned; rounds
here, decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from leakfast.cli.text import print_json, print_table

if TYPE_CHECKING:
    from leakfast.measure import Measured
    from leakfast.storage.run import Run


def show(run: Run, done: Sequence[Measured], *, top: int, as_json: bool) -> int | None:
    """The source and the likeliest bystanders of each adapter, or all of it as JSON; 3 where replies could not be scored."""
    import polars as pl

    from leakfast.stats.probabilities import means

    found = means(pl.concat(run.read(folder) for one in done for folder in one.folders))
    lacking = int(found["n_unscored_replies"].sum())
    if as_json:
        print_json({"run": str(run.path), "probabilities": found.to_dicts()})
        return 3 if lacking else None
    for (adapter, estimator), part in found.group_by("adapter", "estimator", maintain_order=True):
        source = next(iter(part["source"].drop_nulls()), None)
        others = part.filter(pl.col("persona").ne_missing(source))
        shown = [
            part.filter(pl.col("persona").eq_missing(source)),
            others.sort("mean_probability", descending=True),
        ]
        click.echo(
            f"{adapter}, {estimator}: mean probability of the behavior's words on the unadapted model's replies"
        )
        rows = pl.concat([shown[0], shown[1].head(top)]).rows(named=True)
        print_table(
            ["persona", "mean probability", "95 % over questions", "mean log-probability (nats)"],
            [
                [
                    r["persona"] + (" (source)" if r["persona"] == source else ""),
                    _number(r["mean_probability"]),
                    f"{_number(r['mean_probability_low'])} – {_number(r['mean_probability_high'])}",
                    _number(r["mean_logprob_nats"]),
                ]
                for r in rows
            ],
        )
    if lacking:
        click.echo(f"eval: {lacking} of the values could not be scored; their status says why", err=True)
    return 3 if lacking else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
