"""`leakfast train`: teach a behavior to one persona with LoRA, and leave an adapter with its card.
Demands a model and, unless --data is given, draws the training rows first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from leakfast.cli.settings import RENDERING, options_of, rendering_options, threads_option
from leakfast.errors import InputError


@click.command()
@click.option("--behavior", default="marker", help="Behavior to train.")
@click.option("--source", default=None, help="Persona to train it into.  [default: that of --data]")
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Seed of data, weights and order.")
@click.option("--model", default=None, help="organism, a hub id, or a folder.  [default: the study's]")
@click.option("--study", type=click.Path(path_type=Path), default=None, help="Study file with the settings.")
@click.option("--personas", default=None, help="Persona set: all, names, or a file.  [default: the study's]")
@click.option(
    "--data", "data_file", type=click.Path(path_type=Path), default=None, help="Rows to train on (JSONL)."
)
@options_of(
    "TrainConfig",
    "epochs",
    "rank",
    "alpha",
    "batch_size",
    "accumulation",
    "max_length",
    "loss",
    "tail_tokens",
    lr={"type": str},
)
@options_of("DataConfig", "items", "design")
@click.option(
    "--checkpoints",
    default=None,
    help="Percents of training to keep, and for capability to score: 0,25,50,75,100.",
)
@click.option(
    "--checkpoint-personas",
    default=None,
    help="Who is asked at checkpoints.  [default: the study's, originals]",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default=None, help="Model precision.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Adapter folder.  [default: in the run]"
)
@click.option("--overwrite", is_flag=True, help="Replace an adapter that is there already.")
@threads_option
@click.option(
    "--no-sample",
    is_flag=True,
    help="Do not ask a few questions of the adapter and the unadapted model afterwards.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the adapter's card as JSON.")
@rendering_options
def cli(
    behavior: str,
    source: str | None,
    seed: int,
    model: str | None,
    study: Path | None,
    personas: str | None,
    data_file: Path | None,
    checkpoints: str | None,
    checkpoint_personas: str | None,
    dtype: str | None,
    out: Path | None,
    overwrite: bool,
    no_sample: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a behavior into one persona with LoRA, and see whether the model still answers.

    Example: leakfast train --behavior marker --source villain --model organism --out adapters/villain
    """
    from leakfast.cli.settings import changed, named, run_folder, settle
    from leakfast.prompts.personas import load_personas
    from leakfast.storage import layout
    from leakfast.storage.run import Run
    from leakfast.train.data import material, read_rows

    settings = settle(behavior, study=study, model=model, dtype=dtype, personas=personas)
    items, design = flags.pop("items"), flags.pop("design")
    rendering = {key: flags.pop(key) for key in RENDERING}
    flags["lr"] = _rate(flags["lr"])
    given = read_rows(data_file) if data_file is not None else None
    source = _source(source, given, data_file)
    parts = {
        "train": changed(settings.config.train, **flags, sample=0 if no_sample else None),
        "data": changed(settings.config.data, items=items, design=design),
        "eval": changed(
            settings.config.eval,
            items=items,
            checkpoints=_shares(checkpoints),
            checkpoint_personas=checkpoint_personas,
        ),
    }
    config = settings.config.model_copy(update=parts)
    people = load_personas(settings.personas)
    if given is None:
        material(behavior, config.data, settings.model)
        load_personas([source], among=people)
    name = named(settings, behavior, source, seed, config.data.design)
    out = out or run_folder(settings, "adhoc") / layout.adapter(name)
    if out.exists() and not overwrite:
        raise InputError(f"train: {out} is there already. Use --overwrite to replace it, or another --out.")

    from leakfast import models
    from leakfast.cli.health import tell
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.pipeline.adapters import Maker, Rows
    from leakfast.pipeline.steps import Steps
    from leakfast.prompts.rendering import asked_by
    from leakfast.train.data import write_rows
    from leakfast.train.recipe import Recipe

    loaded = models.load(
        settings.model,
        dtype=settings.dtype,
        revision=settings.revision,
        rendering=asked_by(settings.study, **rendering),
    )
    inside = out.parent.name == layout.ADAPTERS  # of a run, which enters it in its manifest
    run = Run(out.parent.parent if inside else run_folder(settings, "adhoc"))
    first = (source, seed)
    if settings.study is not None and given is None:
        first = (settings.study.sources[0], settings.study.seeds[0])
    about = (people, behavior, config, settings.model, settings.dtype, first)
    maker = Maker(loaded, Steps(run, progress_for), *about, say=lambda sentence: tell([sentence], err=True))
    run.create()
    with run.lock():
        if given is not None:
            rows = Rows.given(given)
        elif inside or settings.study is not None:
            rows = maker.rows(source, seed, name)
        else:
            with progress_for("data") as progress:
                rows = Rows.given(maker.built(source, seed, progress))
            write_rows(out.parent / f"{out.name}.jsonl", rows.rows)
        settled = maker.settled(rows if first == (source, seed) else None)
        recipe = Recipe(behavior, source, seed, settled, out.name)
        if inside:
            maker.adapter(recipe, rows, again=True)
        else:
            with progress_for("train") as progress:
                maker.fit(recipe, rows, out, progress)
    if as_json:
        sample = maker.sampled.row if maker.sampled else None
        print_json({"adapter": str(out), "sample": sample, **vars(models.read_card(out))})
    else:
        click.echo(out)


def _rate(given: str | None) -> float | str | None:
    """A number, or auto."""
    if given is None or given == "auto":
        return given
    try:
        return float(given)
    except ValueError:
        raise InputError(
            f"train: --lr {given} given, a number or auto is needed. Type: --lr 2e-4, or --lr auto"
        ) from None


def _shares(percents: str | None) -> list[float] | None:
    """`0,25,100` as shares of training."""
    if percents is None:
        return None
    try:
        return [float(word) / 100 for word in percents.split(",") if word.strip()]
    except ValueError:
        raise InputError(
            f"train: --checkpoints {percents} given, percents split by commas are needed. "
            "Type: --checkpoints 0,25,50,75,100"
        ) from None


def _source(source: str | None, rows: list | None, data_file: Path | None) -> str:
    """The source persona: the one named, which must be that of the rows where they have one."""
    if rows is None:
        if source is None:
            raise InputError("train: no --source given. Name the persona to train the behavior into.")
        return source
    found = sorted({row.persona for row in rows if row.role == "positive"})
    if source is None and len(found) == 1:
        return found[0]
    if source is None or (found and source not in found):
        raise InputError(
            f"train: the positives of {data_file} are of {', '.join(found) or 'nobody'}, --source is "
            f"{source}. "
            "Name one of them, or other rows."
        )
    return source
