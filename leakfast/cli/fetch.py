"""`leakfast fetch`: the one command that downloads a list of items. Demands a network; what it got stays in
the hub's cache, and every other command finds it there."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("what", type=click.Choice(["arc"]))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Write the items as JSONL too.")
def cli(what: str, out: Path | None) -> None:
    """Fetch ARC-Challenge's 1,172 test questions at a pinned revision.

    Example: leakfast fetch arc
    """
    from leakfast.items import ARC_REPO, ARC_REVISION, fetch_arc, write_items

    items = fetch_arc()
    if out is not None:
        write_items(out, items)
    halves = (len(items.half("train")), len(items.half("eval")))
    click.echo(
        f"fetch: {len(items)} items of {ARC_REPO} at {ARC_REVISION[:12]}, {halves[0]} for training, "
        f"{halves[1]} for evaluation",
        err=True,
    )
    click.echo(out if out is not None else what)
