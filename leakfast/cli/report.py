"""`leakfast report`: write the HTML page of a run. Demands a run with
completions; tables that are absent or out of date are computed first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from leakfast.cli.places import RUN
from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.report.page import Compared
    from leakfast.stats.tables import Stats


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--against",
    type=RUN,
    help="Another run: the page, then RUN/report-against.html, opens with the differences between the two.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the path of the report as JSON.")
def cli(run: Path, against: Path | None, as_json: bool) -> int | None:
    """Write RUN/report.html, one file that needs nothing else (figures as files: leakfast plot).

    Example: leakfast report runs/demo
    """
    from leakfast.cli.health import tell
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.report.page import report
    from leakfast.stats.tables import current

    if against is not None and against.resolve() == run.resolve():
        raise InputError(
            f"report: --against {against} is the run itself, but another run is needed. Type: leakfast report {run} "
            "--against OTHER"
        )
    tables = current(run)
    compared = None if against is None else _compared(run, tables, against)
    tell(tables.warnings(), err=True)
    with progress_for("report") as progress:
        path = report(run, tables, progress, compared)
    if as_json:
        told = {} if compared is None else {"against": compared.table.to_dicts()}
        print_json({"report": str(path), **told})
    else:
        click.echo(path)
    return 3 if tables.missing else None


def _compared(run: Path, tables: Stats, against: Path) -> Compared:
    """RUN set against the other, whose tables are made where they are not current."""
    from leakfast.report.page import Compared
    from leakfast.stats.against import Side, compare
    from leakfast.stats.tables import current
    from leakfast.storage.run import Run

    this, other = (
        Side(Run(path).open(), found) for path, found in ((run, tables), (against, current(against)))
    )
    return Compared(against.resolve().name, compare(this, other))
