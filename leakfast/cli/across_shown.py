"""What `leakfast show` prints of a run with several behaviors: which leaked most, from which source. Demands the rows of
`report.across`; rounds here."""

from __future__ import annotations

from typing import Any

import click

from leakfast.cli import amounts
from leakfast.cli.text import print_table
from leakfast.inert import one_line
from leakfast.report.across import most
from leakfast.stats.correlations import POOLED


def print_across(rows: list[dict[str, Any]], source: str | None = None) -> None:
    """A line a behavior and source, and one of all its sources, with ρ. source: this one alone. Nothing for no rows."""
    mine = [row for row in rows if source in (None, row["source"])]
    if not mine:
        return
    several = len({row["seed"] for row in mine}) > 1
    click.echo(
        "Which behavior leaked most from which source (95 % intervals; ρ at each behavior's best layer)"
    )
    head = ["behavior", "source", "source's rate", "mean bystander change", "ρ", "health"]
    print_table(head, [_line(row, several) for row in mine])
    for top in most(mine):
        click.echo(one_line(_said(top, several)))
    click.echo()


def _who(row: dict[str, Any], several: bool) -> str:
    name = "all sources" if row["source"] == POOLED else row["source"]
    name = f"{name}, seed {row['seed']}" if several and row["seed"] is not None else name
    name = f"{name}, {row['adapter']}" if row["twin"] else name
    return f"{name} (trained for {row['taught']})" if row["taught"] else name


def _line(row: dict[str, Any], several: bool) -> list[Any]:
    own = amounts.with_interval(row["source_rate"], row["source_low"], row["source_high"], row["unit"])
    interval = row["interval"] or {"low": None, "high": None}
    return [
        row["behavior"],
        _who(row, several),
        own,
        _mean(row),
        amounts.rho(row["spearman"], interval["low"], interval["high"]),
        row["health"],
    ]


def _mean(row: dict[str, Any]) -> str | None:
    form = "+.1f" if row["y"] == "delta" else ".1f"
    shown = amounts.with_interval(row["mean"], row["mean_low"], row["mean_high"], row["unit"], form)
    if shown is None:
        return None
    unit = {("share", "delta"): " pp", ("share", "rate"): " % (rate)", ("points", "rate"): " (rate)"}
    return shown + unit.get((row["unit"], row["y"]), "")


def _said(top: dict[str, Any], several: bool) -> str:
    way = "largest" if top["sign"] > 0 else "lowest"
    what = "change" if top["y"] == "delta" else "rate"
    apart = {
        True: "; its interval lies apart from all others'",
        False: "; its interval meets others': they are not told apart",
        None: "",
    }[top["apart"]]
    scale = " in points of 100" if top["unit"] == "points" else ""
    return (
        f"{way} mean {what} over bystanders{scale}: {top['behavior']} from {_who(top, several)}, {_mean(top)}{apart}. Of so "
        "many the largest is large by chance too."
    )
