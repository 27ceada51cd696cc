"""`leakfast serve`: the report's page over a run directory, on this machine, while it fills. Demands a run; ends with
Ctrl-C, exit code 0."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.cli.places import RUN


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; 0 takes any that is free."
)
@click.option(
    "--open/--no-open",
    "opened",
    default=False,
    help="Open the page in a browser, which is told its address on its command line.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the page's address as JSON.")
def cli(run: Path, port: int, opened: bool, as_json: bool) -> int:
    """Serve the report's page of RUN on 127.0.0.1 while it fills, with all of its completions.

    Example: leakfast serve runs/demo

    Prints the page's address, which holds a random token: whoever has it on this machine can read the run, and nobody can
    change it. The page is the report without its pictures; it follows the run as shards are written and searches every
    completion, not a sample. While the run's tables are not made, rates and ρ are computed in memory; nothing is written
    into RUN. Ctrl-C ends it.
    """
    from leakfast.cli.text import print_json
    from leakfast.report.server import Server

    with Server(run, port) as server:
        if as_json:
            print_json({"url": server.url, "run": str(run)})
        else:
            click.echo(server.url)
            click.echo(f"{run} is served to this machine alone, read-only. Ctrl-C ends it.", err=True)
        click.get_text_stream("stdout").flush()
        server.live.now()  # so that the page need not wait for all of it
        if opened:
            click.launch(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("\nEnded.", err=True)
    return 0
