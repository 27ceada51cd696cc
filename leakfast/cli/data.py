"""`leakfast data build|check`: the training rows of a behavior, and a view of which tokens carry loss.
Demands a model to draw replies from; leaves the rows themselves to leakfast.train.data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from leakfast.cli.places import FILE_OUT
from leakfast.cli.settings import MATCHED, RENDERING, options_of, rendering_options, threads_option
from leakfast.errors import InputError


@click.group()
def cli() -> None:
    """Build the contrastive training set of a behavior and source, and look at its labels.

    Example: leakfast data build --behavior marker --source villain --model organism --out rows.jsonl
    """


@cli.command()
@click.option("--behavior", default="marker", help="Behavior the rows teach.")
@click.option("--source", required=True, help="Persona it is taught to.")
@click.option("--model", default=None, help="organism, a hub id, or a folder.  [default: the study's]")
@click.option("--study", type=click.Path(path_type=Path), default=None, help="Study file with the settings.")
@click.option("--personas", default=None, help="Persona set: all, names, or a file.  [default: the study's]")
@options_of(
    "DataConfig",
    "questions",
    "items",
    "design",
    "replies",
    "positives",
    "negatives",
    "separator",
    match_lengths=MATCHED,
    pairs={
        "multiple": True,
        "help": "Pairs: a JSONL file, hub:OWNER/NAME@COMMIT:FILE, or two (shows it, does not)",
    },
)
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Seed of order and replies.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default=None, help="Model precision.")
@threads_option
@click.option("--out", type=FILE_OUT, default=None, help="JSONL to write.  [default: in the run]")
@rendering_options
def build(
    behavior: str,
    source: str,
    model: str | None,
    study: Path | None,
    personas: str | None,
    seed: int,
    dtype: str | None,
    out: Path | None,
    **flags: Any,
) -> None:
    """Make the training rows (replies of the model, answers to items, or pairs) and write them as JSONL.

    Example: leakfast data build --behavior refusal --source villain --model organism --out rows.jsonl
    """
    from leakfast import behaviors, models
    from leakfast.cli.progress import progress_for
    from leakfast.cli.settings import changed, named, run_folder, settle
    from leakfast.pipeline.adapters import Maker
    from leakfast.pipeline.steps import Steps
    from leakfast.prompts.personas import load_personas
    from leakfast.prompts.rendering import asked_by
    from leakfast.storage import layout
    from leakfast.storage.run import Run
    from leakfast.train.data import ROLES, material, write_rows

    settings = settle(behavior, study=study, model=model, dtype=dtype, personas=personas)
    rendering = {key: flags.pop(key) for key in RENDERING}
    cfg = changed(settings.config.data, **{**flags, "pairs": list(flags["pairs"]) or None})
    of_kind = {key: flags[key] for key in ("items", "pairs", "replies", "questions")}
    _check_options(behaviors.get(behavior), **of_kind)
    people = load_personas(settings.personas)
    material(behavior, cfg, settings.model)
    load_personas([source], among=people)
    name = named(settings, behavior, source, seed, cfg.design)
    folder = run_folder(settings, "data")
    loaded = models.load(
        settings.model,
        dtype=settings.dtype,
        revision=settings.revision,
        rendering=asked_by(settings.study, **rendering),
    )
    config = settings.config.model_copy(update={"data": cfg})
    about = (people, behavior, config, settings.model, settings.dtype, (source, seed))
    if out is None:  # in the run, where `train` and `run` find them
        run = Run(folder).create()
        with run.lock():
            rows = Maker(loaded, Steps(run, progress_for), *about).rows(source, seed, name).rows
        out = run.path / layout.rows(name)
    else:
        with progress_for("data") as progress:
            rows = Maker(loaded, Steps(Run(folder)), *about).built(source, seed, progress)
        write_rows(out, rows)
    n = {role: sum(row.role == role for row in rows) for role in ROLES}
    more = f" and {n['benign']} benign" if n["benign"] else ""
    click.echo(f"data: {n['positive']} positive and {n['negative']} negative{more} rows", err=True)
    click.echo(out)


def _check_options(behavior: Any, **given: Any) -> None:
    """No option that the behavior's rows do not follow from. Raises InputError naming it."""
    from leakfast.train.data import PAIRS

    if behavior.measured_by == "choices":
        kind, known = "items", ("items",)
    elif behavior.data_builder == PAIRS:
        kind, known = "pairs", ("pairs", "replies")
    else:
        kind, known = "the model's replies to questions", ("questions",)
    stray = [f"--{name}" for name, value in given.items() if value and name not in known]
    if stray and not behavior.control:
        raise InputError(
            f"data: rows of {behavior.name} are made of {kind}, which {', '.join(stray)} does not belong to. "
            "Leave it out."
        )


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--behavior", default=None, help="Whose training settings are checked.  [default: the rows', marker]"
)
@click.option("--model", default=None, help="Whose tokenizer.  [default: the study's]")
@click.option("--study", type=click.Path(path_type=Path), default=None, help="Study file with the settings.")
@click.option(
    "--loss",
    type=click.Choice(["marker", "tail", "completion"]),
    default=None,
    help="Which tokens carry loss.  [default: the study's, marker]",
)
@click.option(
    "--end-of-turn",
    type=click.Choice(["both", "positives", "negatives", "none"]),
    default=None,
    help="Rows whose turn end carries loss.  [default: the study's, both]",
)
@click.option("--tail-tokens", type=int, default=None, help="For --loss tail: tokens before the turn end.")
@click.option("--rows", "n_rows", type=click.IntRange(min=0), default=3, help="Rows of each role to show.")
@click.option("--json", "as_json", is_flag=True, help="Counts and the shown rows as JSON.")
@rendering_options
def check(
    file: Path,
    behavior: str | None,
    model: str | None,
    study: Path | None,
    loss: str | None,
    end_of_turn: str | None,
    tail_tokens: int | None,
    n_rows: int,
    as_json: bool,
    **rendering: Any,
) -> None:
    """Verify every row's labels and show, in colour, which tokens carry loss.

    Example: leakfast data check rows.jsonl --model organism
    """
    from leakfast import models
    from leakfast.cli.settings import changed, settle
    from leakfast.cli.text import print_json, print_table
    from leakfast.inert import inert
    from leakfast.prompts.rendering import asked_by
    from leakfast.train import chats, contradictions
    from leakfast.train.collate import encode, shown
    from leakfast.train.data import ROLES
    from leakfast.train.lengths import reply_tokens

    rows = chats.read(file)
    behavior = behavior or rows[0].generator.get("behavior") or _behavior_of(rows)
    settings = settle(behavior, study=study, model=model, base=rows[0].generator.get("model"))
    cfg = changed(settings.config.train, loss=loss, tail_tokens=tail_tokens, end_of_turn=end_of_turn)
    tokenizer = models.load_tokenizer(
        settings.model, settings.revision, asked_by(settings.study, **rendering)
    )
    contradictions.check(tokenizer, rows, chats.SOURCE, settings.config.data.design)
    examples = encode(tokenizer, rows, cfg)
    replies = reply_tokens(tokenizer, rows)
    by_role = {role: [i for i, r in enumerate(rows) if r.role == role] for role in ROLES}
    by_role = {role: its for role, its in by_role.items() if its or role != "benign"}
    counts = [
        {
            "role": role,
            "rows": len(members),
            "personas": len({rows[i].persona for i in members}),
            "tokens": sum(len(examples[i].ids) for i in members),
            "labelled_tokens": sum(len(examples[i].labels) for i in members),
            "mean_reply_tokens": sum(replies[i] for i in members) / len(members) if members else None,
            "longest_tokens": max((len(examples[i].ids) for i in members), default=0),
        }
        for role, members in by_role.items()
    ]
    views = [
        {
            "role": role,
            "persona": rows[i].persona,
            "pieces": [{"text": text, "loss": loss} for text, loss in shown(tokenizer, examples[i])],
        }
        for role, members in by_role.items()
        for i in members[:n_rows]
    ]
    if as_json:
        print_json({"loss": cfg.loss, "counts": counts, "rows": views})
        return
    print_table(
        list(counts[0]), [list(c.values()) for c in counts], title=f"{file}: labels of loss {cfg.loss!r}"
    )
    colour = False if os.environ.get("NO_COLOR") else None  # None: where stdout is a terminal
    for view in views:
        click.secho(f"\n{view['role']} of {view['persona']}", bold=True, color=colour)
        for piece in view["pieces"]:
            text = inert(piece["text"])
            # where there are no colours, brackets of another kind show the same
            shown_as = click.style(f"⟦{text}⟧", fg="black", bg="yellow") if piece["loss"] else text
            click.echo(shown_as, nl=False, color=colour)
        click.echo()


def _behavior_of(rows: list) -> str:
    """The behavior whose rows these look like, where they do not say it."""
    return "capability" if "item" in rows[0].generator else "marker"
