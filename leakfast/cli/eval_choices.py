"""The part of `leakfast eval` that scores multiple choice: adapters and base, or the checkpoints of an adapter.
Called by cli/eval.py with its options settled; shows accuracy, and what could not be counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.cli.settings import Settings
    from leakfast.measure.targets import Source, Target
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig


@dataclass(frozen=True)
class Asked:
    """What is to be measured, where it goes, and how much of it is shown."""

    run: Run
    behavior: str
    targets: list[Target]
    adapters: list[Path]
    personas: list[Persona]
    config: EvalConfig
    base: bool
    source: Source
    by: str
    engine: str
    top: int
    replace: bool = False


def prepared(settings: Settings, asked: Asked, *, checkpoints: bool) -> Any:
    """What is asked, checked, as a function (loaded model, as_json, into) that scores it and prints it; it gives 3
    where items could not be counted. into: a list that takes the JSON instead of stdout."""
    from leakfast.behaviors.registry import items_of

    cfg = asked.config
    items = items_of(asked.behavior, cfg, settings.model)
    if items.reading:
        click.echo(f"eval: {items.name}: {items.reading}", err=True)
    if asked.by != "sum" and cfg.scoring == "letters":
        raise InputError("eval: --by char and --by byte compare full texts. Add --scoring full-text.")
    if checkpoints and asked.engine != "packed":
        raise InputError("eval: --checkpoints are scored by the packed engine. Leave --engine out.")
    work = _series if checkpoints else _accuracy

    def step(loaded: Any, *, as_json: bool, into: list[dict] | None = None) -> int | None:
        return work(loaded, asked, items, as_json, into)

    return step


def _accuracy(loaded: Any, asked: Asked, items: Any, as_json: bool, into: list[dict] | None) -> int | None:
    from leakfast.cli.progress import progress_for
    from leakfast.measure.choices import table as tables
    from leakfast.measure.choices.evaluate import evaluate, read_scores
    from leakfast.stats.accuracy import chosen_labels, remarks
    from leakfast.storage.layout import BASE

    engine = None
    if asked.engine == "vllm":
        engine = _vllm(asked)
    with progress_for("eval") as progress:
        done = evaluate(
            loaded,
            asked.run,
            asked.adapters,
            asked.personas,
            items,
            asked.config.scoring,
            base=asked.base,
            source=asked.source,
            engine=engine,
            engine_name=asked.engine,
            behavior=asked.behavior,
            replace=asked.replace,
            progress=progress,
        )
    click.echo(
        f"eval: {done.prompts_made} prompts of {asked.behavior} scored, {done.prompts_kept} kept from before, in "
        f"{asked.run.path}",
        err=True,
    )
    scores = read_scores(asked.run, done, items.name, asked.config.scoring)
    origins = {t.name: (t.source, t.seed) for t in done.targets if t.name != BASE}
    table = tables.rates(scores, origins, {p.name: p.category for p in asked.personas}, asked.by)
    labels = chosen_labels(scores, tables.CHOSEN[asked.by])
    for sentence in remarks(table, labels):
        click.echo(f"eval: {sentence}", err=True)
    if trouble := tables.troubles(table):
        click.echo(f"eval: not counted: {trouble}", err=True)
    if as_json:
        _give(
            {
                "run": str(asked.run.path),
                "items": items.name,
                "scoring": asked.config.scoring,
                "by": asked.by,
                "answers": items.reading,
                "rates": table.to_dicts(),
                "chosen_labels": labels.to_dicts(),
            },
            asked,
            into,
        )
    else:
        _show(table, labels, asked)
    return 3 if trouble else None


def _give(found: dict, asked: Asked, into: list[dict] | None) -> None:
    from leakfast.cli.text import print_json

    if into is None:
        print_json(found)
    else:
        into.append({"behavior": asked.behavior, **{k: v for k, v in found.items() if k != "run"}})


def _vllm(asked: Asked) -> Any:
    if asked.config.scoring != "letters":
        raise InputError("eval: --engine vllm scores letters. Use --scoring letters, or --engine packed.")
    from leakfast.measure.choices.compare_engines import engine

    return engine(adapters=asked.adapters)


def _series(loaded: Any, asked: Asked, items: Any, as_json: bool, into: list[dict] | None) -> None:
    from leakfast.cli.progress import progress_for
    from leakfast.measure.choices.evaluate import evaluate_series

    for adapter in asked.adapters:
        with progress_for("eval") as progress:
            done = evaluate_series(
                loaded,
                asked.run,
                adapter,
                asked.personas,
                items,
                asked.config.scoring,
                behavior=asked.behavior,
                source=asked.source,
                progress=progress,
            )
        click.echo(
            f"eval: {done.prompts_made} prompts scored, {done.prompts_kept} kept from before, in {asked.run.path}",
            err=True,
        )


def _show(table: Any, labels: Any, asked: Asked) -> None:
    """The rates as cli/eval.py shows them, what guessing gives, the labels chosen, and the mean mass on the answers."""
    import polars as pl

    from leakfast.cli.eval import show

    show(table, asked.behavior, asked.top)
    if (guess := table["chance"].mean()) is not None:
        click.echo(f"chance: {100 * guess:.1f} % (mean of 1 / number of choices)")
    for (name,), mine in labels.filter(pl.col("persona").is_null()).group_by("adapter", maintain_order=True):
        told = mine.sort("label").select("label", "share", "share_right").rows()
        said = ", ".join(f"{label} {100 * share:.0f} % ({100 * key:.0f})" for label, share, key in told)
        click.echo(f"labels chosen by {name} (right in brackets): {said}")
    if table["answer_mass"].null_count() < table.height:
        masses = table.group_by("adapter", maintain_order=True).agg(pl.col("answer_mass").mean())
        said = ", ".join(f"{row[0]} {100 * row[1]:.1f} %" for row in masses.rows() if row[1] is not None)
        click.echo(f"mean probability on the answers: {said}")


def _percent(rate: float | None) -> str | None:
    return None if rate is None else f"{100 * rate:.1f}"
