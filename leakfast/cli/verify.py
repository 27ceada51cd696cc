"""`leakfast verify`: what of a run can be trusted. Demands a run directory, and the model where shards are to be measured again;
changes nothing in the run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from leakfast.cli.places import RUN


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=0,
    help="Shards measured again and compared; needs the model.",
)
@click.option(
    "--study",
    type=click.Path(path_type=Path),
    default=None,
    help="The study's own file, where it names persona or question files beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all checks as JSON.")
def cli(run: Path, sample: int, study: Path | None, as_json: bool) -> int | None:
    """Look again at a run's files, rows and tables, and say what cannot be trusted. Nothing in it is changed.

    Exit code 3: something cannot be trusted.

    Example: leakfast verify runs/demo --sample 2
    """
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json, print_table
    from leakfast.inert import one_line
    from leakfast.pipeline.checks import verify

    with progress_for("verify") as progress:
        found = verify(run, study=study, sample=sample, progress=progress)
    if as_json:
        print_json(
            {
                "run": str(found.run),
                "trusted": not found.wrong,
                "checks": [asdict(check) for check in found.checks],
            }
        )
        return 3 if found.wrong else None
    rows = [[c.name, c.checked, c.unit, len(c.wrong) or None] for c in found.checks]
    print_table(["what", "looked at", "of", "wrong"], rows, title=f"{found.run}: looked at again")
    for check in found.checks:
        for sentence in check.wrong:
            click.echo(one_line(f"not to be trusted: {sentence}"))
        for sentence in check.notes:
            click.echo(one_line(f"{check.name}: {sentence}"))
    if not found.wrong:
        click.echo("nothing was found that cannot be trusted")
    return 3 if found.wrong else None
