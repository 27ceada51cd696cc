"""What `leakfast eval --measure probability` shows: mean probabilities by persona. Demands what `measure` returned; rounds
here, decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.text import print_json, print_table

# estimator → what its mean is
_OF = {
    "end": "mean probability of the behavior's words where the unadapted model's replies end",
    "anywhere": "expected share of the unadapted model's replies with the behavior's words somewhere",
    "end_own": "mean probability of the behavior's words where the adapter's own replies end",
    "anywhere_own": "expected share of the adapter's own replies with the behavior's words somewhere",
    "openings": "expected share of replies that begin as the behavior does",
    "odds": "the same among replies that begin in one of the two listed ways",
    "pairs": "share of pairs whose bad reply is the likelier",
    "pairs_per_token": "share of pairs whose bad reply is the likelier per token",
}

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure import Measured
    from leakfast.storage.run import Run


def show(run: Run, done: Sequence[Measured], *, top: int, as_json: bool) -> int | None:
    """The source and the likeliest bystanders of each adapter, or all of it as JSON; 3 where replies could not be scored."""
    found = of(run, done)
    if as_json:
        print_json({"run": str(run.path), "probabilities": found.to_dicts()})
    else:
        tell(found, top)
    return exit_code(found)


def of(run: Run, done: Sequence[Measured]) -> pl.DataFrame:
    """A row for each adapter, estimator and persona (stats.probabilities.means)."""
    import polars as pl

    from leakfast.stats.probabilities import means, with_columns

    scores = pl.concat((run.read(folder) for one in done for folder in one.folders), how="diagonal")
    return means(with_columns(scores))


def exit_code(found: pl.DataFrame) -> int | None:
    """3 where replies could not be scored."""
    return 3 if found["n_unscored_replies"].sum() else None


def tell(found: pl.DataFrame, top: int) -> None:
    """Tables for people of what `of` returned."""
    import polars as pl

    for (adapter, estimator), part in found.group_by("adapter", "estimator", maintain_order=True):
        source = next(iter(part["source"].drop_nulls()), None)
        others = part.filter(pl.col("persona").ne_missing(source))
        shown = [
            part.filter(pl.col("persona").eq_missing(source)),
            others.sort("mean_probability", descending=True),
        ]
        click.echo(f"{adapter}, {estimator}: {_OF[estimator]}")
        rows = pl.concat([shown[0], shown[1].head(top)]).rows(named=True)
        print_table(
            ["persona", "mean", "95 % over questions", "nats", "nats of"],
            [
                [
                    r["persona"] + (" (source)" if r["persona"] == source else ""),
                    _number(r["mean_probability"]),
                    f"{_number(r['mean_probability_low'])} – {_number(r['mean_probability_high'])}",
                    *_nats(r),
                ]
                for r in rows
            ],
        )
    if lacking := int(found["n_unscored_replies"].sum()):
        click.echo(f"eval: {lacking} of the values could not be scored; their status says why", err=True)


def _nats(row: dict[str, Any]) -> tuple[str, str]:
    """What there is in nats, and of what."""
    if row["mean_log_odds_nats"] is not None:
        return _number(row["mean_log_odds_nats"]), "mean log-odds"
    return _number(row["mean_logprob_nats"]), "mean log-probability"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
