"""`leakfast detect`: what every detector finds in a run's completions, by adapter and persona.
Demands a run with completions; draws nothing and changes nothing."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.cli.places import RUN


@click.command()
@click.argument("run", type=RUN)
@click.option("--behavior", default=None, help="Completions of this behavior alone.  [default: all]")
@click.option(
    "--questions", default=None, help="Completions of this further question set.  [default: the main one]"
)
@click.option(
    "--words",
    type=click.Path(path_type=Path),
    default=None,
    help="TOML file with word lists of your own.  [default: configs/detectors.toml]",
)
@click.option(
    "--marker", "literal", default=None, help="Literal to look for.  [default: the marker behavior's]"
)
@click.option("--model", default=None, help="Look for the marker's tokens too, as this model spells it.")
@click.option("--personas", "by_persona", is_flag=True, help="A line a persona instead of one an adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def cli(
    run: Path,
    behavior: str | None,
    questions: str | None,
    words: Path | None,
    literal: str | None,
    model: str | None,
    by_persona: bool,
    as_json: bool,
) -> None:
    """Count what each detector finds in the completions of RUN.

    Example: leakfast detect runs/demo --model organism
    """
    import polars as pl

    from leakfast.behaviors import detectors as detect
    from leakfast.behaviors.marker import MARKER
    from leakfast.cli.text import print_json, print_table
    from leakfast.storage.run import Run

    literal = literal or MARKER
    spelled = None
    if model is not None:
        from leakfast import models

        spelled = detect.spellings(models.load_tokenizer(model), literal)
    store = Run(run).open()
    prefix = f"completions/{behavior}" if behavior else "completions"
    if questions is not None:
        prefix = _set_folder(store, behavior, questions)
    found = detect.count(store, literal, prefix=prefix, words=detect.read_words(words), spelled=spelled)
    if cut := detect.count_cut(store, prefix):
        click.echo(
            f"detect: {cut} completions end at the marker (--stop-at-marker): whether it is there is exact, all else "
            "is said of what was drawn before it.",
            err=True,
        )
    if as_json:
        print_json({"run": str(run), "marker": literal, "spellings": spelled, "counts": found.to_dicts()})
        return
    places = [name for name in found.columns if name.endswith("_at")]
    if not by_persona:
        numbers = pl.exclude("behavior", "adapter", "persona", *places)
        found = found.group_by(["behavior", "adapter"], maintain_order=True).agg(numbers.sum())
    shown = [[_short(cell) for cell in row] for row in found.rows()]
    print_table(found.columns, shown, title=f"completions in which each detector fires ({literal})")


def _set_folder(run, behavior: str | None, questions: str) -> str:
    """Where a run keeps what was drawn on a further question set. Raises InputError naming the sets there are."""
    from leakfast.errors import InputError
    from leakfast.storage.layout import SETS

    there = sorted({tuple(path.split("/")[1:3]) for path in run.shards(SETS)})
    found = [name for name, asked in there if asked == questions and behavior in (None, name)]
    if len(found) == 1:
        return f"{SETS}/{found[0]}/{questions}"
    if found:
        raise InputError(
            f"detect: {', '.join(found)} were asked the set {questions}. Name one: --behavior NAME."
        )
    known = ", ".join(f"{asked} (of {name})" for name, asked in there) or "none"
    raise InputError(
        f"detect: {run.path} has no completions of a further question set {questions}; it has {known}. Leave "
        "--questions out for the main set."
    )


def _short(cell):
    return round(cell, 3) if isinstance(cell, float) else cell
