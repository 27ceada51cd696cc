"""`leakfast predict`: who will show a behavior that one persona is about to be trained on. Demands finished runs, and centroids
or predictors of the unadapted model; trains and draws nothing, rounds here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli import amounts
from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.stats.predicting_runs import Base, Forecast, Trained


@click.command()
@click.option("--behavior", required=True, help="What would be trained; the runs must have measured it.")
@click.option("--source", help="The persona it would be trained into. Needed unless --check is given.")
@click.option(
    "--from",
    "runs",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    metavar="RUN",
    help="A finished run to learn from; may be given several times.",
)
@click.option(
    "--run",
    "base",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Folder with base centroids (or predictors) that have the source.  [default: the first --from]",
)
@click.option(
    "--model",
    help="Model that would be trained. Its cosines are computed where it is not that of --run or of the first --from.",
)
@click.option("--predictor", default="cosine_centered", help="What predicts, one of the runs' predictors.")
@click.option(
    "--layer",
    type=click.IntRange(min=0),
    help="Decoder block of the predictor.  [default: the largest mean |ρ| over the sources learned from]",
)
@click.option("--level", type=float, default=0.9, help="Level of the intervals, a share.")
@click.option("--top", type=click.IntRange(min=1), default=20, help="Bystanders to print.")
@click.option(
    "--check",
    is_flag=True,
    help="Leave out each source of the runs in turn and say how many of its bystanders the intervals hold.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all bystanders as JSON, every digit.")
def cli(
    behavior: str,
    source: str | None,
    runs: tuple[Path, ...],
    base: Path | None,
    model: str | None,
    predictor: str,
    layer: int | None,
    level: float,
    top: int,
    check: bool,
    as_json: bool,
) -> None:
    """Expect who will show a behavior, before anything is trained.

    Example: leakfast predict --source villain --behavior marker --from runs/organism-marker

    Each source of the runs gets a logistic line of its bystanders' rates on the predictor. A new source's line is drawn as
    theirs were, and its bystanders scatter around it as theirs do: the interval is that of one bystander's rate. Remarks say
    what it reaches beyond: values that were not fitted, another model, another kind of source, fewer than three sources. A
    source that the runs have trained is left out of the fit, and what was measured stands beside.
    """
    from leakfast.stats import predicting_runs

    if not 0 < level < 1:
        raise InputError(
            f"predict: level {level:g} given; a share between 0 and 1 is needed. Give --level 0.9."
        )
    if source is None and not check:
        raise InputError(
            "predict: no source given; the persona that would be trained is needed. Give --source NAME, or --check to see how "
            "well the runs' own sources are predicted."
        )
    pairs = predicting_runs.trained(runs, behavior, predictor)
    if check:
        _check(pairs, layer, level, as_json)
        return
    assert source is not None
    others = [one for one in pairs if one.source != source]
    if layer is not None and others:  # before a model is loaded
        predicting_runs.layer_of(others, layer)
    known = _base(base or runs[0], model, predictor, chosen=base is not None)
    found = predicting_runs.forecast(pairs, known, source, behavior, predictor, layer=layer, level=level)
    _show(found, source, behavior, top, as_json)


def _base(run: Path, model: str | None, predictor: str, chosen: bool) -> Base:
    """Values of the source: from a run, or computed where another model is asked."""
    from leakfast.geometry import Centroids
    from leakfast.stats import predicting_runs
    from leakfast.stats.people import read_people
    from leakfast.storage import layout
    from leakfast.storage.run import Run

    path = run / layout.centroids()
    theirs = Centroids.load(path).metadata.get("model") if path.is_file() else None
    if model is None or model == theirs:
        return predicting_runs.base_of(run)
    if chosen:
        raise InputError(
            f"predict: --model {model} and --run {run} were given, but that folder is of {theirs or 'no model'}. One of the two "
            "is needed: leave out --model, or --run."
        )
    if not predictor.startswith(("cosine_centered", "cosine_raw")):
        raise InputError(
            f"predict: {predictor} of {model} is not known; cosines alone are computed on the way. Make a folder with "
            f"`leakfast predictors --model {model} --out RUN` and give it with --run."
        )
    from leakfast.measure.centroids import measure
    from leakfast.prompts.rendering import asked_by
    from leakfast.study.config import settings_in

    store, asked = Run(run).open(), {}
    if (
        path := store.check_study()
    ) is not None:  # as the run's own cosines are made, which the lines were fitted on
        study = settings_in(path)
        asked = {"personas": study.personas, "questions": study.centroids.questions, "dtype": study.dtype}
        asked["rendering"] = asked_by(study)
    people, _ = read_people(store)
    return predicting_runs.of_model(measure(model, **asked), people)


def _check(pairs: list[Trained], layer: int | None, level: float, as_json: bool) -> None:
    from leakfast.cli.text import print_json, print_table
    from leakfast.stats.predicting_runs import coverage

    found = coverage(pairs, layer=layer, level=level)
    known = found.drop_nulls("held")
    total = float((known["held"] * known["n"]).sum() / known["n"].sum()) if known.height else None
    if as_json:
        print_json({"level": level, "held": total, "sources": found.to_dicts()})
        return
    head = ["source left out", "sources", "layer", "N", "held %", "ρ", "mean expected %", "mean measured %"]
    body = [
        [
            *(row[name] for name in ("source", "sources", "layer", "n")),
            amounts.amount(row["held"], "share"),
            amounts.rho(row["spearman"]),
            amounts.amount(row["mean_expected"], "share"),
            amounts.amount(row["mean_measured"], "share"),
        ]
        for row in found.rows(named=True)
    ]
    print_table(head, body, title=f"{100 * level:g} % intervals on sources left out")
    for row in found.filter(found["reason"].is_not_null()).rows(named=True):
        click.echo(f"{row['source']}: no interval: {row['reason']}.")
    if total is not None:
        click.echo(f"{100 * total:.1f} % of {known['n'].sum()} bystanders lie in their interval.")


def _show(found: Forecast, source: str, behavior: str, top: int, as_json: bool) -> None:
    from leakfast.cli.text import print_json, print_table

    told: dict[str, Any] = {"source": source, "behavior": behavior, "predictor": found.predictor}
    told |= {"layer": found.layer, "level": found.level, "sources": found.sources}
    told |= {"completions": found.completions, "remarks": found.remarks}
    if as_json:
        print_json(told | {"bystanders": found.rows.to_dicts()})
        return
    measured = found.rows["measured"].is_not_null().any()
    head = [
        "rank",
        "persona",
        "category",
        found.predictor,
        "expected %",
        f"{100 * found.level:g} %",
        "beyond",
    ]
    body = []
    for row in found.rows.head(top).rows(named=True):
        ends = None if row["low"] is None else f"{100 * row['low']:.1f}–{100 * row['high']:.1f}"
        beyond = ", ".join(
            word for word, so in (("value", row["outside"]), ("persona", not row["seen"])) if so
        )
        cells = [row["rank"], row["persona"], row["category"], f"{row['value']:+.3f}"]
        cells += [amounts.amount(row["expected"], "share"), ends, beyond or None]
        body.append(cells + ([amounts.amount(row["measured"], "share")] if measured else []))
    where = f" at layer {found.layer}" if found.layer is not None else ""
    title = f"{behavior} of {source}, expected from {', '.join(found.sources)} ({found.predictor}{where})"
    print_table(head + (["measured %"] if measured else []), body, title=title)
    for remark in found.remarks:
        click.echo(f"note: {remark}.")
