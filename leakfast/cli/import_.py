"""`leakfast import`: results of another study as a run directory that `stats` and `report` read.
Demands the study's own layout; converts and checks, computes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.cli.places import FOLDER_OUT


@click.group()
def cli() -> None:
    """Turn the results of another study into a run directory.

    Example: leakfast import published results/single_token_100_persona --out runs/published
    """


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=FOLDER_OUT, required=True, help="Run directory to write, new or old.")
@click.option("--json", "as_json", is_flag=True, help="Print what was imported as JSON.")
def published(folder: Path, out: Path, as_json: bool) -> None:
    """Read the published study's results folder, whatever it holds of the study's files.

    Example: leakfast import published results/single_token_100_persona --out runs/published
    """
    from leakfast.cli.text import print_json, print_table
    from leakfast.published.importing import import_run

    run = import_run(folder, out)
    rows = {path: entry.get("rows") for path, entry in run.manifest["shards"].items()}
    if as_json:
        print_json({"run": str(run.path), "files": rows})
    else:
        print_table(["file", "rows"], sorted(rows.items()), title=f"imported into {run.path}")
        click.echo(f"Next: leakfast stats {run.path}")
