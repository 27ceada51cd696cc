"""`leakfast export`: share a finished run as Inspect logs, in Weights & Biases, on the Hugging Face Hub. Demands a run
directory; leaves the sending to leakfast.sinks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli import places
from leakfast.cli.places import FOLDER_OUT, RUN
from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.sinks import Target
    from leakfast.stats import Stats

log = logging.getLogger("leakfast.export")
_FLAGS = {"inspect": "out", "wandb": "project", "hub": "repo"}


@click.command()
@click.argument("run", type=RUN)
@click.option("--to", type=click.Choice([*_FLAGS]), required=True, help="Where to.")
@click.option(
    "--out",
    type=FOLDER_OUT,
    default=None,
    help="inspect: folder of the logs.  [default: logs/<name of the run>]",
)
@click.option("--project", default=None, help="wandb: project, or ENTITY/PROJECT.  [default: leakfast]")
@click.option(
    "--repo", default=None, help="hub: OWNER/NAME of the tables; adapters go to OWNER/NAME-<adapter>."
)
@click.option(
    "--public", is_flag=True, help="hub: new repositories are seen by everyone.  [default: private]"
)
@click.option("--json", "as_json", is_flag=True, help="Print what was sent as JSON.")
def cli(
    run: Path, to: str, out: Path | None, project: str | None, repo: str | None, public: bool, as_json: bool
) -> int | None:
    """Share RUN as Inspect logs (one for each behavior and adapter), as a run of Weights & Biases (tables, figures), or as
    repositories of the Hugging Face Hub (tables, adapters, cards). What is there with the same hash is not sent again.

    Example: leakfast export runs/demo --to inspect --out logs
    """
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.inert import inert
    from leakfast.sinks import export, target

    given = {"out": out, "project": project, "repo": repo, "public": public or None}
    mine = {_FLAGS[to], "public"} if to == "hub" else {_FLAGS[to]}
    if stray := [name for name, value in given.items() if value is not None and name not in mine]:
        raise InputError(
            f"export: --{stray[0]} given, but --to {to} has no use for it. Type: --to {to} --{_FLAGS[to]} …"
        )
    where = given[_FLAGS[to]]
    asked = target(to if where is None else f"{to}:{where}", run, public=public)
    with progress_for("export") as progress:
        done = export(run, asked, progress=progress)
    if as_json:
        print_json(
            {
                "to": done.to,
                "where": done.where,
                "sent": done.sent,
                "kept": done.kept,
                "left_out": done.left_out,
                "dropped": done.dropped,
            }
        )
    else:
        for sentence in done.left_out:
            click.echo(f"export: not sent or not known: {inert(sentence)}", err=True)
        if done.dropped:
            click.echo(f"export: {inert(done.dropped)}", err=True)
        click.echo(
            f"{inert(done.where)}: {len(done.sent)} sent, {len(done.kept)} there already with the same hash"
        )
    return 3 if done.left_out else None


def targets(words: Sequence[str], folder: Path) -> list[Target]:
    """What `leakfast run --export` names, looked at before anything is computed. Raises InputError."""
    from leakfast.sinks import check, target

    found = [target(word, folder) for word in words]
    for one in found:
        if one.kind == "inspect":
            places.check(Path(one.where), "run: --export inspect, folder", folder=True)
        check(one)
    return found


def after_run(run: Path, asked: Sequence[Target], stats: Stats) -> list[dict[str, Any]]:
    """Export a run that is finished: what became of each place. A place that refuses is warned of and changes nothing
    else: neither the run's files nor the exit code of the command."""
    from leakfast.errors import LeakfastError
    from leakfast.sinks import export

    told: list[dict[str, Any]] = []
    for one in asked:
        again = f"Type: leakfast export {run} --to {one.kind} --{_FLAGS[one.kind]} {one.where}"
        try:
            done = export(run, one, stats)
        except (LeakfastError, OSError) as error:
            said = error.message if isinstance(error, LeakfastError) else str(error)
            log.warning("%s The run is whole. %s", said, again)
            told.append({"to": one.kind, "where": one.where, "error": said})
            continue
        for sentence in done.left_out:
            log.warning("export to %s: not sent or not known: %s", one.kind, sentence)
        if done.dropped:
            log.info("export to %s: %s", one.kind, done.dropped)
        told.append({"to": done.to, "where": done.where, "sent": len(done.sent), "kept": len(done.kept)})
        log.info("export: %s: %d sent, %d there already", done.where, len(done.sent), len(done.kept))
    return told
