"""`leakfast diff`: two runs set against each other, settings first, then the numbers that moved. Demands two runs; changes
nothing in either."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.places import RUN

if TYPE_CHECKING:
    from leakfast.pipeline.differences import Differences

SHOWN = 20  # rates, of those that moved; --json has all


@click.command()
@click.argument("run", type=RUN)
@click.argument("other", type=RUN)
@click.option(
    "--bootstraps",
    type=click.IntRange(min=1),
    default=2000,
    help="Resamples of the personas behind the intervals of ρ's differences.",
)
@click.option("--seed", type=int, default=0, help="Seed of the resamples.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, every rate included.")
def cli(run: Path, other: Path, bootstraps: int, seed: int, as_json: bool) -> None:
    """Show which settings of two runs differ, and which numbers moved, by how many standard errors.

    Rates of one adapter and persona are paired by question, or item, where both runs asked the same. Nothing is changed in
    either run.

    Example: leakfast diff runs/demo runs/demo-again
    """
    from leakfast.cli.text import print_json
    from leakfast.pipeline.differences import differences

    found = differences(run, other, bootstraps=bootstraps, seed=seed)
    if as_json:
        rows = ("path", "a", "b")
        print_json(
            {
                "a": str(run),
                "b": str(other),
                "identical": found.identical,
                "settings": [dict(zip(rows, one, strict=True)) for one in found.settings],
                "made_with": [dict(zip(rows, one, strict=True)) for one in found.made_with],
                "numbers": found.numbers.to_dicts(),
                "rates": found.rates.to_dicts(),
                "only_in_a": found.only[0],
                "only_in_b": found.only[1],
                "notes": found.notes,
            }
        )
        return
    _show(found, run, other)


def _show(found: Differences, run: Path, other: Path) -> None:
    from leakfast.cli.text import print_table
    from leakfast.inert import one_line

    if found.identical:
        click.echo("the two are the same: settings, what they were made with, and every number")
    for title, rows in (("settings", found.settings), ("made with", found.made_with)):
        if rows:
            print_table([title, "a", "b"], [[path, *map(_short, sides)] for path, *sides in rows])
            click.echo()
    for where, names in zip((run, other), found.only, strict=True):
        if names:
            click.echo(one_line(f"measured in {where} alone: {', '.join(names)}"))
    for note in found.notes:
        click.echo(one_line(note))
    if not found.identical:
        _show_rates(found)
        _show_numbers(found)


def _show_rates(found: Differences) -> None:
    from leakfast.cli.text import print_table
    from leakfast.stats.moved import FAR

    table = found.rates
    known = table["standard_errors"].drop_nulls()
    far = int((known.abs() > FAR).sum())
    click.echo(
        f"{far} of {len(known)} rates moved by more than {FAR} standard errors (about {0.05 * len(known):.0f} would by chance)."
    )
    rows = table.filter(table["difference"].fill_null(0.0) != 0).head(SHOWN).rows(named=True)
    if not rows:
        return
    body = [
        [
            row["adapter"],
            row["persona"],
            _number(row["value"], ".3g"),
            _number(row["other"], ".3g"),
            _number(row["difference"], "+.3g"),
            _number(row["standard_errors"], "+.1f"),
            row["paired"],
        ]
        for row in rows
    ]
    head = ["adapter", "persona", "a", "b", "a − b", "standard errors", "paired"]
    print_table(head, body, title=f"rates that moved most ({len(rows)} of {table.height}; all with --json)")
    click.echo()


def _show_numbers(found: Differences) -> None:
    from leakfast.cli.text import print_table

    body = []
    for row in found.numbers.rows(named=True):
        low, high = row["difference_low"], row["difference_high"]
        ends = None if low is None or high is None else f"{low:+.3g} to {high:+.3g}"
        what = row["quantity"].replace("rho", "ρ with the rate") + (
            "" if row["layer"] is None else f", layer {row['layer']}"
        )
        sides = [_number(row[key], ".3g") for key in ("value", "other")]
        body.append([row["adapter"], what, *sides, _number(row["difference"], "+.3g"), ends, row["reason"]])
    if body:
        head = ["adapter", "what", "a", "b", "a − b", "95 % interval", "why none"]
        print_table(head, body, title="source, mean bystander and ρ of each adapter")


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
