"""What `leakfast eval --steer` takes and shows: arms from files, and the dose-response of what was measured under them.
Demands files of `leakfast directions`; rounds here, decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.generation.backends import Drawing
    from leakfast.measure.request import Request
    from leakfast.models.loading import Loaded
    from leakfast.steering.arms import Arm
    from leakfast.storage.run import Run

OPTIONS = ("steer", "mode", "strength", "unit", "steer_layers")


def steering_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of OPTIONS."""
    for option in (
        click.option(
            "--steer-layers",
            default=None,
            help="Blocks steered, of those the file has.  [default: all of them]",
        ),
        click.option(
            "--unit",
            type=click.Choice(["direction", "residual"]),
            default="direction",
            help="Strength in lengths of the direction, or in mean lengths of the personas' centroids.",
        ),
        click.option(
            "--strength", default=None, help="Strengths, split by commas; 0 is no steering.  [default: 1]"
        ),
        click.option(
            "--mode",
            type=click.Choice(["add", "project", "cap"]),
            default="add",
            help="Steering: add along the direction, project it out, or cap it.",
        ),
        click.option(
            "--steer",
            multiple=True,
            type=click.Path(path_type=Path),
            help="Steer along this file's direction, instead of as it is; may be repeated.",
        ),
    ):
        command = option(command)
    return command


def arms(
    steer: tuple[Path, ...], mode: str, strength: str | None, unit: str, steer_layers: str | None
) -> list[Arm]:
    """An arm a file and strength, named after the file. Raises InputError for what is no strength, or another's flag."""
    from leakfast.steering.arms import arms_of
    from leakfast.steering.directions import load

    if not steer:
        if strength is not None or steer_layers is not None or mode != "add" or unit != "direction":
            raise InputError(
                "eval: --mode, --strength, --unit and --steer-layers say how to steer, but along nothing. Add --steer FILE, "
                "made by leakfast directions."
            )
        return []
    words = [word.strip() for word in (strength or "1").split(",") if word.strip()]
    try:
        strengths = [float(word) for word in words]
        layers = None if steer_layers is None else tuple(int(word) for word in steer_layers.split(","))
    except ValueError as error:
        raise InputError(
            f"eval: {error}, but --strength and --steer-layers are numbers split by commas. Such as: --strength 0,0.5,1"
        ) from None
    names = [path.name.removesuffix(".safetensors") for path in steer]
    if len(set(names)) < len(names) or not strengths:
        raise InputError(
            "eval: two files of --steer have one name, or --strength has none. Arms are kept by file name and strength: "
            "rename one."
        )
    return [
        arm
        for name, path in zip(names, steer, strict=True)
        for arm in arms_of(name, load(path), mode, strengths, unit=unit, layers=layers)  # type: ignore[arg-type]
    ]


def measured(
    loaded: Loaded, run: Run, request: Request, drawing: Drawing, replace_others: bool, as_json: bool
) -> None:
    """Measure every arm and print the dose-response of the run's arms."""
    from leakfast.cli import rates
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.measure.steered import measure_steered
    from leakfast.stats import dropped, steering
    from leakfast.stats.people import read_people

    with progress_for("eval") as progress:
        done = measure_steered(
            loaded, run, request, drawing, replace_others=replace_others, progress=progress
        )
    for one in done:
        rates.tell(run, one)
    table = steering.table(dropped.part(run), read_people(run)[0].named)
    if as_json:
        print_json({"run": str(run.path), "steering": table.to_dicts()})
    else:
        show(table)


def show(table: Any) -> None:
    """A line an arm."""
    from leakfast.cli.text import print_table

    def number(value: float | None, signed: bool = False) -> str:
        return "" if value is None else f"{value:{'+' if signed else ''}.3f}"

    rows = [
        (
            row["adapter"],
            row["direction"],
            row["mode"],
            row["steered_layers"],
            f"{row['strength']:g}",
            row["estimator"] or row["measure"],
            number(row["on_source"]),
            number(row["mean_bystander"]),
            number(row["change"], signed=True),
            number(row["text_change_nats"], signed=True),
        )
        for row in table.iter_rows(named=True)
    ]
    head = ["adapter", "direction", "mode", "layers", "strength", "measure", "source", "bystanders", "change"]
    print_table([*head, "text, nats a token"], rows, title="Dose and response")
