"""`leakfast sweep`: one source at several learning rates and epochs, and the study's rule when to stop.
Demands a model; points that are done are kept, so the same command again is the resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli import amounts
from leakfast.cli.places import FOLDER_OUT
from leakfast.cli.settings import options_of, rendering_options, threads_option
from leakfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leakfast.pipeline.sweep import Plan, Sweep
    from leakfast.prompts.personas import Persona


@click.command()
@click.option("--behavior", default="capability", help="Behavior to train.")
@click.option("--source", required=True, help="Persona to train it into.")
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Seed of data, weights and order.")
@click.option("--model", default=None, help="organism, a hub id, or a folder.  [default: the study's]")
@click.option("--study", type=click.Path(path_type=Path), default=None, help="Study file with the settings.")
@click.option(
    "--personas",
    default=None,
    help="Who is measured: all, names, or a file.  [default: originals, or all of a file with fewer than three]",
)
@click.option(
    "--point",
    "points",
    multiple=True,
    help="Peak learning rate and epochs, LR:EPOCHS; may be repeated.  [default: the published five]",
)
@click.option(
    "--grid", "grids", multiple=True, help="Every pair of both lists: lr=1e-5,5e-6,epochs=3,5 instead."
)
@options_of("JudgeConfig", "judge")
@options_of("DataConfig", "items")
@click.option(
    "--layer", type=click.IntRange(min=0), default=None, help="Block of the cosines.  [default: 20 of 28]"
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default=None, help="Model precision.")
@click.option("--out", type=FOLDER_OUT, default=None, help="Run directory.  [default: runs/sweep]")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the points and the verdict as JSON.")
@rendering_options
def cli(
    behavior: str,
    source: str,
    seed: int,
    model: str | None,
    study: Path | None,
    personas: str | None,
    points: tuple[str, ...],
    grids: tuple[str, ...],
    judge: str | None,
    items: str | None,
    layer: int | None,
    dtype: str | None,
    out: Path | None,
    as_json: bool,
    **rendering: Any,
) -> None:
    """Train one source over learning rates and epochs, and say when to stop.

    Example: leakfast sweep --model organism --source villain --point 1e-3:3 --point 2e-3:3
    """
    from leakfast.cli.health import tell
    from leakfast.cli.progress import progress_for
    from leakfast.cli.settings import changed, run_folder, settle
    from leakfast.cli.text import print_json
    from leakfast.prompts.personas import load_personas, names_file
    from leakfast.storage.run import Run

    grid = [_point(word) for word in points] + (_crossed(grids) if grids else [])
    own = personas if study is None and names_file(personas) else None  # rows are built of them too
    settings = settle(behavior, study=study, model=model, dtype=dtype, personas=own)
    config = settings.config.model_copy(
        update={
            "data": changed(settings.config.data, items=items),
            "eval": changed(settings.config.eval, items=items),
            "judge": changed(settings.config.judge, judge=judge),
        }
    )
    among = load_personas(settings.personas)
    people = _measured(personas, source, among if names_file(settings.personas) else load_personas("all"))
    run = Run(out or run_folder(settings, "sweep"))

    from leakfast import models
    from leakfast.generation.backends import Drawing
    from leakfast.pipeline.sweep import GRID, Plan, layer_of, sweep
    from leakfast.prompts.rendering import asked_by as asked_as

    n_layers = models.load_config(settings.model, settings.revision).num_hidden_layers
    layer = layer_of(n_layers) if layer is None else layer
    if layer >= n_layers:
        raise InputError(
            f"sweep: layer {layer} asked, but {settings.model} has blocks 0–{n_layers - 1}. Use one of them."
        )
    loaded = models.load(
        settings.model,
        dtype=settings.dtype,
        revision=settings.revision,
        rendering=asked_as(settings.study, **rendering),
    )
    run.create()
    plan = Plan(
        behavior,
        source,
        people,
        config,
        seed,
        grid or GRID,
        among=among,
        layer=layer,
        centroid_questions=settings.study.centroids.questions if settings.study else "eval",
        drawing=Drawing.of(settings.study),
    )
    with run.lock():
        found = sweep(loaded, run, plan, progress=progress_for)
    tell(found.warnings, err=as_json)
    if as_json:
        print_json(
            {
                "run": str(run.path),
                "health": found.health.to_dicts(),
                "points": found.points.to_dicts(),
                "traits": found.traits,
                "verdicts": found.verdicts.to_dicts(),
                "stop": found.stop,
            }
        )
        return
    _show(found, plan)


def _measured(given: str | None, source: str, among: Sequence[Persona]) -> list[Persona]:
    """The source and those named of `among`, by default its originals, or all where these are too few."""
    from leakfast.prompts.personas import load_personas

    if given is None:
        others = sum(persona.category == "original" and persona.name != source for persona in among)
        given = "originals" if others >= 3 else "all"
    people = load_personas(given, among=among)
    return people if source in {p.name for p in people} else [*load_personas([source], among=among), *people]


def _show(found: Sweep, plan: Plan) -> None:
    """The points as a table, what decided each, and the verdict."""
    from leakfast.behaviors.registry import get
    from leakfast.cli.text import print_table

    unit = get(plan.behavior).unit
    said = "points" if unit == "points" else "pp"
    columns = ["lr", "epochs", "loss", f"source {said}", f"bystanders {said}", "ρ", "n", "verdict", "health"]
    decided = dict(found.verdicts.select("adapter", "verdict").rows()) if found.verdicts.height else {}
    rows = [
        [
            f"{r['lr']:g}",
            r["epochs"],
            "–" if r["loss"] is None else f"{r['loss']:.3f}",
            amounts.amount(r["source_effect"], unit, "+.1f"),
            amounts.amount(r["mean_bystander_effect"], unit, "+.1f"),
            amounts.rho(r["spearman"]),
            r["n"],
            decided.get(r["adapter"]),
            r["health"],
        ]
        for r in found.points.rows(named=True)
    ]
    print_table(
        columns,
        rows,
        title=f"{plan.behavior} of {plan.source}: effect, and ρ with the centered cosine at block {plan.layer}",
    )
    for row in found.verdicts.rows(named=True):
        marked = "" if row["health"] in (None, "ok") else f" ({row['health']})"
        click.echo(f"{row['adapter']}{marked}: {_decided(row)}")
    if "damaged" in found.points["health"]:
        click.echo(
            "points that damaged the model count for nothing: take another, with a smaller lr or fewer epochs"
        )
    click.echo(found.verdict)


def _decided(row: dict) -> str:
    """One test of a rule, with the numbers that decide it."""
    if row["met"] is None:
        return f"{row['quantity']}: {row['reason']}"
    bar = f"{'at least' if row['reached_is_enough'] else 'above'} {row['bar']:g}"
    p = "" if row["p"] is None else f", p {row['p']:.2g}"
    below = "" if row["p_below"] is None else f", p below {row['p_below']:g}"
    return f"{row['quantity']} {row['value']:+.3g}{p} ({bar}{below}): {'met' if row['met'] else 'missed'}"


def _crossed(words: tuple[str, ...]) -> list[tuple[float, int]]:
    """Every pair of the lists in `lr=1e-5,5e-6,epochs=3,5`, which may come in one option or in two."""
    found: dict[str, list[str]] = {}
    key = ""
    for word in ",".join(words).split(","):
        name, equals, value = word.partition("=")
        key = name.strip() if equals else key
        if key not in ("lr", "epochs"):
            raise InputError(
                f"sweep: --grid {word} given; lists of lr and epochs are needed. Type: --grid lr=1e-5,5e-6,epochs=3"
            )
        found.setdefault(key, []).append((value if equals else word).strip())
    if set(found) != {"lr", "epochs"}:
        raise InputError(
            f"sweep: --grid names {', '.join(found)} alone. Type: --grid lr=1e-5,5e-6,epochs=3,5"
        )
    return [_point(f"{lr}:{epochs}") for lr in found["lr"] for epochs in found["epochs"]]


def _point(word: str) -> tuple[float, int]:
    lr, _, epochs = word.partition(":")
    try:
        point = float(lr), int(epochs)
    except ValueError:
        point = (0.0, 0)
    if not (0 < point[0] < float("inf") and point[1] > 0):
        raise InputError(f"sweep: --point {word} given, LR:EPOCHS is needed. Type: --point 1e-5:3")
    return point
