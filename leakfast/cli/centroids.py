"""`leakfast centroids`: mean last-token states per persona and layer into one safetensors file, and a
persona's neighbours on stdout. Demands a model; leaves the computing to leakfast.measure.centroids."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.places import FILE_OUT, check
from leakfast.cli.settings import rendering_options, stream_option, threads_option
from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean

if TYPE_CHECKING:
    from leakfast.geometry import Centroids

_SHOWN_LAYERS = 8


@click.command()
@click.option(
    "--model",
    default=None,
    help="organism, a hub id, or a folder.  [default: the card's base, else Qwen2.5-7B]",
)
@click.option("--revision", default=None, help="Commit or branch of a hub model.")
@click.option("--layers", default="all", help="Decoder blocks from 0: all, 0,2,4, or 0-5.")
@click.option(
    "--adapter", type=click.Path(path_type=Path), default=None, help="LoRA folder: measure it, not the base."
)
@click.option("--personas", default="all", help="all, names, or a .toml or .json file.")
@click.option("--questions", default="eval", help="Question set or file.")
@click.option("--keep-questions", is_flag=True, help="Store the state of every single question too.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default=None,
    help="Model precision.  [default: float32 for the organism, else auto: float32 on a CPU without bfloat16]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp8"]),
    default=None,
    help="fp8: linear layers in FP8 (GPU of compute 8.9 or more).  [default: as --dtype]",
)
@stream_option("auto")
@click.option("--out", type=FILE_OUT, default=None, help="File.  [default: centroids-MODEL.safetensors]")
@click.option(
    "--show", multiple=True, metavar="PERSONA", help="Print this persona's neighbours; may be repeated."
)
@click.option("--top", type=click.IntRange(min=1), default=10, help="Neighbours to print.")
@click.option(
    "--cosine",
    "kind",
    type=click.Choice(["centered", "raw"]),
    default="centered",
    help="Which cosine to print.",
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@rendering_options
def cli(
    model: str | None,
    revision: str | None,
    layers: str,
    adapter: Path | None,
    personas: str,
    questions: str,
    keep_questions: bool,
    dtype: str | None,
    precision: str | None,
    stream: str | None,
    out: Path | None,
    show: tuple[str, ...],
    top: int,
    kind: str,
    as_json: bool,
    **rendering: Any,
) -> None:
    """Average last-token states per persona and layer.

    Example: leakfast centroids --model organism --layers all --show villain
    """
    from leakfast.cli.progress import progress_for
    from leakfast.measure.centroids import measure
    from leakfast.models.adapters import adapter_hash, read_card
    from leakfast.prompts.personas import load_personas
    from leakfast.prompts.rendering import asked_by

    card = None
    if adapter is not None:
        adapter_hash(adapter)  # says what is missing before any model is looked for
        card = read_card(adapter)
    if model is None:
        from leakfast.models.names import DEFAULT_MODEL

        model = card.base if card else DEFAULT_MODEL
    people = {persona.name: persona for persona in load_personas(personas)}
    for name in show:
        if name not in people:
            raise InputError(
                f"centroids: --show {name}, but it is none of the {len(people)} personas asked."
                f"{did_you_mean(name, people)} Add it to --personas, or show another."
            )
    if show and kind == "centered" and len(people) < 2:
        raise InputError(
            "centroids: a centered cosine subtracts the mean of several personas, and one was asked. "
            "Add to --personas, or use --cosine raw."
        )
    out = out or check(Path(_default_name(model, adapter)), "centroids: without --out, the file")
    with progress_for("centroids") as progress:
        made = measure(
            model,
            personas,
            questions,
            layers,
            adapter=adapter,
            dtype=dtype or ("float32" if model == "organism" else "auto"),
            revision=revision,
            keep_questions=keep_questions,
            precision=precision,
            rendering=asked_by(None, card, **rendering),
            stream=stream or "auto",
            progress=progress,
        )
    made.save(out)
    _print(made, out, show, top, kind, {name: p.category for name, p in people.items()}, as_json)


def _print(
    made: Centroids,
    out: Path,
    show: tuple[str, ...],
    top: int,
    kind: str,
    categories: dict[str, Any],
    as_json: bool,
) -> None:
    from leakfast.cli.text import print_json, print_table

    p, d = made.means[made.layers[0]].shape
    neighbours = {name: _neighbours(made, name, kind) for name in show}
    if as_json:
        print_json(
            {
                "out": str(out),
                **made.metadata,
                "cosine": kind,
                "neighbours": {name: table[:top] for name, table in neighbours.items()},
            }
        )
        return
    shown = _spread(made.layers)
    for name, table in neighbours.items():
        print_table(
            ["persona", "category", *(f"layer {layer}" for layer in shown)],
            [
                (
                    row["persona"],
                    categories[row["persona"]],
                    *(f"{row['cosine'][layer]:+.3f}" for layer in shown),
                )
                for row in table[:top]
            ],
            title=f"{name}: nearest personas at layer {made.layers[-1]}, {kind} cosine",
        )
    spans = ", ".join(map(str, made.layers)) if len(made.layers) <= _SHOWN_LAYERS else _spans(made.layers)
    q = len(made.metadata["questions"])
    click.echo(
        f"{out}: {p} personas × {d} dimensions, mean over {q} questions, layers {spans}, {made.metadata['dtype']}"
    )


def _neighbours(made: Centroids, name: str, kind: str) -> list[dict[str, Any]]:
    """Every other persona with its cosines per layer, nearest at the last layer asked first."""
    row = made.personas.index(name)
    cosines = {layer: made.cosine(layer, kind)[row] for layer in made.layers}
    others = [i for i in range(len(made.personas)) if i != row]
    others.sort(key=lambda i: (-cosines[made.layers[-1]][i], made.personas[i]))
    return [
        {"persona": made.personas[i], "cosine": {layer: float(cosines[layer][i]) for layer in made.layers}}
        for i in others
    ]


def _spread(layers: list[int]) -> list[int]:
    """At most _SHOWN_LAYERS of the layers, evenly, the last always."""
    step = -(-len(layers) // _SHOWN_LAYERS)
    return layers[::-1][::step][::-1]


def _spans(layers: list[int]) -> str:
    return (
        f"{layers[0]}–{layers[-1]}"
        if layers == list(range(layers[0], layers[-1] + 1))
        else f"{len(layers)} of them"
    )


def _default_name(model: str, adapter: Path | None) -> str:
    parts = [Path(model).name, *([adapter.resolve().name] if adapter else [])]
    return "centroids-" + re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts)) + ".safetensors"
