"""`leakfast sweep`: one source at several learning rates and epochs, and the study's rule when to stop.
Demands a model; points that are done are kept, so the same command again is the resume."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.errors import InputError


@click.command()
@click.option("--behavior", default="capability", help="Behavior to train.")
@click.option("--source", required=True, help="Persona to train it into.")
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Seed of data, weights and order.")
@click.option("--model", default=None, help="organism, a hub id, or a folder.  [default: the study's]")
@click.option("--study", type=click.Path(path_type=Path), default=None, help="Study file with the settings.")
@click.option("--personas", default="originals", help="Who is measured: all, names, or a file.")
@click.option(
    "--point", "points", multiple=True,
    help="Peak learning rate and epochs, LR:EPOCHS; may be repeated.  [default: the published five]",
)  # fmt: skip
@click.option(
    "--items", default=None, help="Capability: a JSONL file, arc, organism.  [default: the model's]"
)
@click.option(
    "--layer", type=click.IntRange(min=0), default=None, help="Block of the cosines.  [default: 20 of 28]"
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default=None, help="Model precision.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Run directory.  [default: runs/sweep]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the points and the verdict as JSON.")
def cli(
    behavior: str, source: str, seed: int, model: str | None, study: Path | None, personas: str,
    points: tuple[str, ...], items: str | None, layer: int | None, dtype: str | None, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Train one source over learning rates and epochs, and say when to stop.

    Example: leakfast sweep --model organism --source villain --point 1e-3:3 --point 2e-3:3
    """
    from leakfast.cli.progress import progress_for
    from leakfast.cli.settings import changed, run_folder, settle
    from leakfast.cli.text import print_json, print_table
    from leakfast.personas import load_personas
    from leakfast.store import Run

    grid = [_point(word) for word in points]
    settings = settle(behavior, study=study, model=model, dtype=dtype)
    config = settings.config.model_copy(
        update={
            "data": changed(settings.config.data, items=items),
            "eval": changed(settings.config.eval, items=items),
        }
    )
    people = load_personas(personas)
    if source not in {p.name for p in people}:
        people = [*load_personas([source]), *people]
    run = Run(out or run_folder(settings, "sweep"))

    from leakfast import models
    from leakfast.sweep import GRID, layer_of, sweep

    loaded = models.load(settings.model, dtype=settings.dtype, revision=settings.revision)
    layer = layer_of(loaded.n_layers) if layer is None else layer
    if layer >= loaded.n_layers:
        raise InputError(
            f"sweep: layer {layer} asked, but {loaded.name} has blocks 0–{loaded.n_layers - 1}. Use one of them."
        )
    run.create()
    with run.lock(), progress_for("sweep") as progress:
        found = sweep(
            loaded, run, behavior, source, people, config, seed, grid or GRID, layer=layer, progress=progress
        )
    if as_json:
        print_json(
            {
                "run": str(run.path),
                "points": found.points.to_dicts(),
                "traits": found.traits,
                "stop": found.stop,
            }
        )
        return
    columns = ["lr", "epochs", "loss", "source pp", "bystanders pp", "ρ", "n"]
    rows = [
        [f"{r['lr']:g}", r["epochs"], f"{r['loss']:.3f}", _pp(r["source_effect"]), _pp(r["mean_bystander_effect"]),
         None if r["spearman"] is None else f"{r['spearman']:+.2f}", r["n"]]
        for r in found.points.rows(named=True)
    ]  # fmt: skip
    print_table(
        columns,
        rows,
        title=f"{behavior} of {source}: effect, and ρ with the centered cosine at block {layer}",
    )
    click.echo(found.verdict)


def _point(word: str) -> tuple[float, int]:
    lr, _, epochs = word.partition(":")
    try:
        point = float(lr), int(epochs)
    except ValueError:
        point = (0.0, 0)
    if not (0 < point[0] < float("inf") and point[1] > 0):
        raise InputError(f"sweep: --point {word} given, LR:EPOCHS is needed. Type: --point 1e-5:3")
    return point


def _pp(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:+.1f}"
