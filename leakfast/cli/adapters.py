"""`leakfast adapters average`: adapters made of other adapters. Demands peft folders; leaves the arithmetic to
leakfast.train.averaged, and what studies average to the stages."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.cli.places import FOLDER_OUT


@click.group()
def cli() -> None:
    """Make an adapter of other adapters.

    Example: leakfast adapters average adapters/one adapters/other --out adapters/mean
    """


@cli.command("average")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=FOLDER_OUT, help="Folder of the mean.")
@click.option("--source", default="", help="Persona it is of.  [default: the first's]")
@click.option("--behavior", default="", help="Behavior it is of.  [default: the first's]")
@click.option("--overwrite", is_flag=True, help="Replace an adapter that is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print the adapter's card as JSON.")
def average_(
    folders: tuple[Path, ...], out: Path, source: str, behavior: str, overwrite: bool, as_json: bool
) -> None:
    """Write the mean of two or more adapters of one base, as changes of the weights: its update B·A is the mean of theirs, its
    rank the sum of their ranks.

    Example: leakfast adapters average adapters/one adapters/other --out adapters/mean
    """
    from leakfast.cli.text import print_json
    from leakfast.errors import InputError
    from leakfast.train.averaged import average

    if out.exists() and (not overwrite or out.resolve() in {folder.resolve() for folder in folders}):
        raise InputError(
            f"adapters: {out} is there already. Needed: a folder for the mean that holds none of the adapters. Give another "
            "--out, or --overwrite to replace it."
        )
    card = average(folders, out, behavior=behavior, source=source)
    if as_json:
        print_json({"adapter": str(out), **vars(card)})
    else:
        click.echo(out)
