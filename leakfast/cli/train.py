"""`leakfast train`: teach a behavior to one persona, and leave an adapter (or a whole model) with its card.
Demands a model and, unless --data is given, draws the training rows first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.places import FOLDER_OUT
from leakfast.cli.settings import MATCHED, RENDERING, options_of, rendering_options, threads_option
from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.cli.adapters_made import Wanted
    from leakfast.study.config import BehaviorConfig


@click.command()
@click.option("--behavior", default="marker", help="Behavior to train.")
@click.option(
    "--source",
    default=None,
    help="Persona to train it into, or several split by commas: an adapter each.  [default: that of --data]",
)
@click.option(
    "--seed",
    "seeds",
    default="42",
    callback=lambda *given: _seeds(*given),
    help="Seed of data, weights and order, or several split by commas: an adapter each.",
)
@click.option(
    "--together/--one-by-one",
    default=None,
    help="Several adapters in common passes over the base; on a CPU the speed is about the same (0.9 to 1.3 times, "
    "measured).  [default: together on a GPU]",
)
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
    "end_of_turn",
    lr={"type": str},
    method={"help": "What is trained: an adapter of that kind, or all weights (full)."},
)
@options_of("DataConfig", "items", "design", "separator", match_lengths=MATCHED)
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    default=None,
    help="Adapter of the same base, rank and alpha that is trained further.  [default: that of the study's `after`, else "
    "fresh weights]",
)
@click.option(
    "--stacked/--continued",
    default=None,
    help="Keep that adapter as it is and train another on top, of any rank: both are kept as one.  [default: the study's, "
    "else continued]",
)
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
    "--out",
    type=FOLDER_OUT,
    default=None,
    help="Adapter folder; of several, the folder that they are put into.  [default: in the run]",
)
@click.option("--overwrite", is_flag=True, help="Replace an adapter that is there already.")
@threads_option
@click.option(
    "--no-sample",
    is_flag=True,
    help="Do not ask a few questions of the adapter and the unadapted model afterwards.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the adapter's card as JSON; of several, a list of them."
)
@rendering_options
def cli(
    behavior: str,
    source: str | None,
    seeds: list[int],
    together: bool | None,
    model: str | None,
    study: Path | None,
    personas: str | None,
    data_file: Path | None,
    init: Path | None,
    stacked: bool | None,
    checkpoints: str | None,
    checkpoint_personas: str | None,
    dtype: str | None,
    out: Path | None,
    overwrite: bool,
    no_sample: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a behavior into one persona with LoRA (or all weights), and see whether the model still answers.

    With several sources or seeds the model is loaded once, and each gets an adapter of its own; one after the other they
    are to the byte those of a command each. A training that is killed goes on where it was when the same command is
    given again.

    Example: leakfast train --behavior marker --source villain --model organism --out adapters/villain
    """
    from leakfast.cli.settings import changed, named, run_folder, settle
    from leakfast.prompts.personas import load_personas
    from leakfast.storage import layout
    from leakfast.train import chats
    from leakfast.train.data import material

    settings = settle(behavior, study=study, model=model, dtype=dtype, personas=personas)
    rows_asked = {key: flags.pop(key) for key in ("items", "design", "separator", "match_lengths")}
    rendering = {key: flags.pop(key) for key in RENDERING}
    flags["lr"] = _rate(flags["lr"])
    given = chats.read(data_file) if data_file is not None else None
    sources = _sources(source, given, data_file)
    parts: dict[str, Any] = {
        "train": changed(settings.config.train, **flags, sample=0 if no_sample else None),
        "data": changed(settings.config.data, **rows_asked),
        "eval": changed(
            settings.config.eval,
            items=rows_asked["items"],
            checkpoints=_shares(checkpoints),
            checkpoint_personas=checkpoint_personas,
        ),
    }
    parts |= {} if stacked is None else {"stacked": stacked}
    config = settings.config.model_copy(update=parts)
    if config.stacked and init is None and config.after is None:
        raise InputError(
            "train: --stacked given, but no adapter to train on top of. Give --init ADAPTER, or leave --stacked out."
        )
    if config.train.lr == "auto" and config.data.benign == 1 and given is None:
        raise InputError(
            f"train: --lr auto given, but all rows of {behavior} are benign (benign = 1.0 in the study). Needed: rows that show "
            "the behavior, by which a rate is found, or a number. Type: --lr 2e-4"
        )
    people = load_personas(settings.personas)
    if given is not None and any(row.persona == chats.UNNAMED for row in given):
        given = chats.placed(given, *load_personas(sources, among=people), people)
    if given is None:
        material(behavior, config.data, settings.model)
        load_personas(sources, among=people)
    name = partial(named, settings, behavior, design=config.data.design)
    wanted = _wanted(out, run_folder(settings, "adhoc"), sources, seeds, name, overwrite=overwrite)
    if together and config.eval.checkpoints:
        raise InputError(
            "train: --together given, but points of training are kept of adapters trained one after the other. Leave "
            "--together out, or --checkpoints (of a study: its checkpoints)."
        )
    if full := config.train.method == "full":
        _no_stray_of_full(config, together)

    from leakfast import models
    from leakfast.cli.adapters_made import Making
    from leakfast.cli.text import print_json
    from leakfast.prompts.rendering import asked_by
    from leakfast.train.start import Start

    if init is not None:
        Start.of(init)  # is one, before weights are read
    loaded = models.load(
        settings.model,
        dtype=settings.dtype,
        revision=settings.revision,
        rendering=asked_by(settings.study, **rendering),
    )
    inside = wanted[0].out.parent.name == layout.ADAPTERS  # of a run, which enters it in its manifest
    run = wanted[0].out.parent.parent if inside else run_folder(settings, "adhoc")
    making = Making(loaded, settings, behavior, people, config, run, inside, given, init)
    if together is None:
        together = loaded.device.type == "cuda" and not config.eval.checkpoints and not full
    found = making.all(wanted, together=together and len(wanted) > 1)
    if as_json:
        made = [
            {"adapter": str(its), "sample": sample and sample.row, **vars(models.read_card(its))}
            for its, sample in found.items()
        ]
        print_json(made if len(made) > 1 else made[0])
    else:
        click.echo("\n".join(map(str, found)))


def _no_stray_of_full(config: BehaviorConfig, together: bool | None) -> None:
    """Raises InputError for what a training of all weights does not take."""
    stray = ["--together"] * bool(together) + ["--lr auto"] * (config.train.lr == "auto")
    stray += ["--checkpoints"] * bool(config.eval.checkpoints)
    if stray:
        raise InputError(
            f"train: --method full given with {' and '.join(stray)}, but a whole model is trained by itself, at a rate that is "
            f"yours to choose, and kept at its end. Leave {' and '.join(stray)} out, or use --method lora."
        )


def _wanted(
    out: Path | None,
    run: Path,
    sources: Sequence[str],
    seeds: Sequence[int],
    name: Callable[[str, int], str],
    *,
    overwrite: bool,
) -> list[Wanted]:
    """The adapters: of several, those that are there may stay. InputError for a single one that is there already."""
    from leakfast.cli.adapters_made import Wanted
    from leakfast.storage import layout

    pairs = [(source, seed) for seed in seeds for source in sources]
    several, wanted = len(pairs) > 1, []
    for source, seed in pairs:
        mine = name(source, seed)
        folder = (out / mine if several else out) if out else run / layout.adapter(mine)
        if folder.exists() and not several and not overwrite:
            raise InputError(
                f"train: {folder} is there already. Use --overwrite to replace it, or another --out."
            )
        wanted.append(Wanted(source, seed, mine, folder, not overwrite))
    return wanted


def _sources(given: str | None, rows: list | None, data_file: Path | None) -> list[str]:
    """The personas named; of rows that are given, whose they are."""
    names = list(dict.fromkeys(word.strip() for word in (given or "").split(",") if word.strip()))
    if len(names) > 1 and rows is not None:
        raise InputError(
            f"train: --source {given} given with --data {data_file}, whose rows are of one source. Name one of them, or "
            "leave --data out."
        )
    return names if len(names) > 1 else [_source(names[0] if names else None, rows, data_file)]


def _seeds(context: click.Context, option: click.Parameter, given: str) -> list[int]:
    """`1,2,3` as numbers."""
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words) or len({*map(int, words)}) < len(words):
        raise click.BadParameter(
            f"{given} given, a number from 0, or several split by commas, are needed: 1,2,3"
        )
    return [int(word) for word in words]


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
        found = [float(word) / 100 for word in percents.split(",") if word.strip()]
    except ValueError:
        found = [math.nan]
    if not all(0 <= share <= 1 for share in found):
        raise InputError(
            f"train: --checkpoints {percents} given, percents (0 to 100) split by commas are needed. "
            "Type: --checkpoints 0,25,50,75,100"
        )
    return found


def _source(source: str | None, rows: list | None, data_file: Path | None) -> str:
    """The source persona: the one named, which must be that of the rows where they have one."""
    from leakfast.train import chats

    if rows is None:
        if source is None:
            raise InputError("train: no --source given. Name the persona to train the behavior into.")
        return source
    found = sorted({row.persona for row in rows if row.role == "positive"} - {chats.UNNAMED})
    if source is None and len(found) == 1:
        return found[0]
    if source is None or (found and source not in found):
        raise InputError(
            f"train: the positives of {data_file} are of {', '.join(found) or 'nobody'}, --source is "
            f"{source}. "
            "Name one of them, or other rows."
        )
    return source
