"""`leakfast directions`: a direction in the residual stream from centroids, a random one as long, or one that is given, into a
file that `leakfast eval --steer` takes. Demands a model; leaves the arithmetic to leakfast.steering.directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from leakfast.cli.places import FILE_OUT
from leakfast.cli.settings import rendering_options, threads_option
from leakfast.errors import InputError

_MADE = ("source-mean", "contrast", "difference")


@click.command()
@click.option("--model", default="organism", help="organism, a hub id, or a folder.")
@click.option("--revision", default=None, help="Commit or branch of a hub model.")
@click.option(
    "--kind",
    type=click.Choice([*_MADE, "random", "file"]),
    default="source-mean",
    help="The source's centroid less the mean of all; less the mean of those against; less that of one persona; a random "
    "one as long as --like; or --like as it is, stamped with the model.",
)
@click.option("--source", default=None, help="Persona that it points to.")
@click.option("--against", default=None, help="Personas it points away from, split by commas.")
@click.option(
    "--like", type=click.Path(path_type=Path), default=None, help="File of directions, for random and file."
)
@click.option(
    "--layers", default="all", help="Decoder blocks from 0, whose outputs it is of: all, 4, or 2-5."
)
@click.option("--personas", default="all", help="Personas whose mean is subtracted: all, names, or a file.")
@click.option("--questions", default="eval", help="Question set or file that centroids average over.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default=None,
    help="Model precision.  [default: float32 for the organism, else auto: float32 on a CPU without bfloat16]",
)
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Of a random direction.")
@click.option("--out", type=FILE_OUT, required=True, help="File to write.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@rendering_options
def cli(
    model: str,
    revision: str | None,
    kind: str,
    source: str | None,
    against: str | None,
    like: Path | None,
    layers: str,
    personas: str,
    questions: str,
    dtype: str | None,
    seed: int,
    out: Path,
    as_json: bool,
    **rendering: Any,
) -> None:
    """Make a direction to steer along.

    Example: leakfast directions --model organism --kind contrast --source villain --against assistant --layers 4 --out
    villain.safetensors
    """
    from leakfast import models
    from leakfast.cli.progress import progress_for
    from leakfast.geometry import parse_layers
    from leakfast.measure.centroids import compute
    from leakfast.prompts.personas import load_personas, load_questions
    from leakfast.prompts.rendering import asked_by
    from leakfast.steering import directions

    if (kind in _MADE) != (source is not None) or (kind in _MADE) == (like is not None):
        needed = "--source PERSONA, and no --like" if kind in _MADE else "--like FILE, and no --source"
        raise InputError(f"directions: --kind {kind} needs {needed}.")
    named = [word.strip() for word in (against or "").split(",") if word.strip()]
    people = load_personas(personas)
    wanted: list[int] = []
    if like is None:
        directions.check_named(kind, str(source), named, [person.name for person in people])
        wanted = parse_layers(layers, models.load_config(model, revision).num_hidden_layers, model)
    loaded = models.load(
        model,
        dtype=dtype or ("float32" if model == "organism" else "auto"),
        revision=revision,
        rendering=asked_by(None, **rendering),
    )
    if like is not None:
        given = directions.load(like, loaded.fingerprint)
        directions.check_fits(given, loaded, str(like))
        made = directions.random_like(given, seed) if kind == "random" else given
    else:
        with progress_for("directions") as progress:
            centroids = compute(loaded, people, load_questions(questions), wanted, progress=progress)
        made = directions.of_centroids(centroids, kind, str(source), named)
    made.save(out)
    _print(made, out, as_json)


def _print(made: Any, out: Path, as_json: bool) -> None:
    from leakfast.cli.text import print_json, print_table
    from leakfast.steering.directions import described

    if as_json:
        print_json({"out": str(out), "model_fingerprint": made.fingerprint, **described(made)})
        return
    lengths = made.residual_norms
    rows = [
        (str(layer), f"{norm:.3f}", f"{lengths[layer]:.3f}" if layer in lengths else "")
        for layer, norm in made.norms.items()
    ]
    print_table(["layer", "length", "mean length of centroids"], rows)
    click.echo(f"{out}: {made.kind}, layers {', '.join(map(str, made.layers))}")
