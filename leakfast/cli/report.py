"""`leakfast report`: draw the figures and write the HTML page of a run. Demands a run with
completions; tables that are absent or out of date are computed first."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the paths of report and figures as JSON.")
def cli(run: Path, as_json: bool) -> int | None:
    """Draw RUN/figures and write RUN/report.html, one file that needs nothing else.

    Example: leakfast report runs/demo
    """
    from leakfast.cli.health import tell
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.report.page import report
    from leakfast.stats.tables import current

    tables = current(run)
    tell(tables.warnings(), err=True)
    with progress_for("report") as progress:
        path = report(run, tables, progress)
    drawn = sorted(str(file) for file in (path.parent / "figures").glob("*.p[nd][gf]"))
    if as_json:
        print_json({"report": str(path), "figures": drawn})
    else:
        click.echo(path)
    return 3 if tables.missing else None
