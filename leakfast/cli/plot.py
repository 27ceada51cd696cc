"""`leakfast plot`: the figures of a run for a paper, as wide as its column or its page. Demands a run with tables (made
first where they are absent or out of date); draws nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.places import FOLDER_OUT, RUN

if TYPE_CHECKING:
    from leakfast.figures.of_run import Drawn
    from leakfast.storage.run import Run

FORMATS = ("png", "pdf", "svg")


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--only", metavar="KINDS", help="Kinds of figures, by commas: grid, scatter, layers, … [default: all]"
)
@click.option(
    "--format",
    "formats",
    default="png,pdf",
    metavar="FORMATS",
    help="File formats, by commas: png, pdf, svg.",
)
@click.option("--width", type=click.Choice(["column", "page"]), default="page", help="3.5 or 7 inches.")
@click.option(
    "--order",
    type=click.Choice(["category", "cluster", "leakage"]),
    default="category",
    help="Rows of the matrix.",
)
@click.option(
    "--layer", type=click.IntRange(min=0), help="Layer of the cosine. [default: each behavior's best]"
)
@click.option(
    "--cosine", type=click.Choice(["centered", "raw"]), default="centered", help="Which cosine is drawn."
)
@click.option(
    "--p",
    type=click.Choice(["perm", "t"]),
    default="perm",
    help="Which p the grid prints: by permutation or by t.",
)
@click.option("--out", type=FOLDER_OUT, help="Folder for the files. [default: RUN/figures]")
@click.option("--json", "as_json", is_flag=True, help="Print files, sizes and captions as JSON.")
def cli(
    run: Path,
    only: str | None,
    formats: str,
    width: str,
    order: str,
    layer: int | None,
    cosine: str,
    p: str,
    out: Path | None,
    as_json: bool,
) -> int | None:
    """Draw the figures of a run for a paper: text of 7 pt and more at the width asked.

    Example: leakfast plot runs/demo --only grid,layers,matrix --width column --format pdf
    """
    from leakfast.cli.health import tell
    from leakfast.cli.text import print_json
    from leakfast.figures.of_run import KINDS, Choices, draw
    from leakfast.figures.style import COLUMN_IN, PAGE_IN
    from leakfast.stats.pairs import layers_of
    from leakfast.stats.tables import current, steered_alone
    from leakfast.storage.run import Run

    kinds = _listed(only, KINDS, "--only") if only else ()
    wanted = _listed(formats, FORMATS, "--format")
    opened = Run(run).open()
    if layer is not None:  # before tables are made
        _check_layer(run, layer, layers_of(opened))
    alone = steered_alone(opened) if kinds == ("steering",) else None  # whose rates have nothing to count
    tables = alone or current(opened)
    tell(tables.warnings(), err=True)
    _check_layer(run, layer, tables.layers())
    choices = Choices({"column": COLUMN_IN, "page": PAGE_IN}[width], layer, cosine, order, p)
    found = list(draw(opened, tables, kinds, choices))
    told = [_kept(opened, out, one, wanted, width) for one in found if one.figure is not None]
    absent = [
        {"kind": one.kind, "behavior": one.behavior, "reason": one.reason}
        for one in found
        if one.figure is None
    ]
    if as_json:
        print_json({"figures": told, "absent": absent})
    else:
        for row in told:
            click.echo("\n".join(row["files"]))
        if kinds:
            for row in absent:
                tell(
                    [
                        f"not drawn: {' of '.join(filter(None, (row['kind'], row['behavior'])))}: {row['reason']}"
                    ],
                    err=True,
                )
    return 3 if kinds and absent else None


def _listed(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    from leakfast.errors import InputError
    from leakfast.storage.documents import did_you_mean

    asked = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in asked:
        if word not in known:
            raise InputError(
                f"plot: {option} holds {word!r}, but there are {', '.join(known)}.{did_you_mean(word, known)} "
                f"Name some of these, by commas: {option} {known[0]},{known[1]}"
            )
    if not asked:
        raise InputError(
            f"plot: {option} is empty; one of {', '.join(known)} is needed. Type {option} {known[0]}"
        )
    return asked


def _check_layer(run: Path, layer: int | None, there: list[int]) -> None:
    from leakfast.errors import InputError

    if layer is not None and layer not in there:
        known = ", ".join(map(str, there)) or "none"
        raise InputError(
            f"plot: layer {layer} asked, but {run} has correlations at {known}. Use one of these, or none."
        )


def _kept(opened: Run, out: Path | None, one: Drawn, formats: tuple[str, ...], width: str) -> dict[str, Any]:
    """Write a figure in every format and say what was written."""
    from leakfast.figures.files import write
    from leakfast.figures.style import caption_of

    assert one.figure is not None
    files = [str(path) for path in write(opened, one, formats, width, out)]
    wide, high = one.figure.get_size_inches()
    return {
        "kind": one.kind,
        "behavior": one.behavior,
        "files": files,
        "width_in": float(wide),
        "height_in": float(high),
        "caption": caption_of(one.figure),
    }
