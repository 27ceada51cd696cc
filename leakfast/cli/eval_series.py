"""The part of `leakfast eval --checkpoints` that shows what came of it: the table `trajectory`, a line a persona.
Called by cli/eval.py when every point is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from leakfast.storage.run import Run


def show(run: Run, as_json: bool) -> None:
    """Make the table and figure of what the run holds, and print the rates at shares of training."""
    from leakfast.cli.text import print_json, print_table
    from leakfast.report import trajectory
    from leakfast.stats import summary

    table = trajectory.write(run)
    if as_json:
        print_json({"run": str(run.path), "trajectory": [] if table is None else table.to_dicts()})
        return
    if table is None:
        click.echo("eval: no point has a rate yet: a judge has to read the completions first", err=True)
        return
    shares = sorted(table["share"].unique().to_list())
    rows = []
    key = ["behavior", "adapter", "items", "scoring"]
    for told, part in table.group_by(key, maintain_order=True):
        scale = 100 if summary.unit(table, str(told[0])) == "share" else 1
        for (persona,), line in part.group_by("persona", maintain_order=True):
            found = {
                share: (rate, health) for share, rate, health in line.select("share", "rate", "health").rows()
            }
            rates = [found.get(share, (None, None)) for share in shares]
            marked = [" (damaged)" if health == "damaged" else "" for _, health in rates]
            shown = [
                None if rate is None else f"{scale * rate:.1f}{mark}"
                for (rate, _), mark in zip(rates, marked, strict=True)
            ]
            rows.append([*told, line["role"][0], persona, *shown])
    print_table(
        [*key, "role", "persona", *(f"{100 * s:.0f} %" for s in shares)],
        rows,
        title="rate in % (of judged behaviors: points) at shares of training",
    )
