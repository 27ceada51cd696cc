"""`leakfast plan`: what a study will cost before anything is spent. Demands a study file and its tokenizer;
draws completions only where a calibration is asked for, and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.cluster.simulate import Planned
    from leakfast.pipeline.estimate_stage import Stage
    from leakfast.study.config import Study

RHOS = (0.3, 0.5)  # assumed, at which the power is told
TRIALS = 400


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--calibrate",
    type=click.IntRange(min=0),
    default=0,
    help="Completions drawn now, from the unadapted model, to learn length, rate and size.",
)
@click.option(
    "--tokens-each", type=click.FloatRange(min=0), default=None, help="Output tokens a completion, if known."
)
@click.option(
    "--tokens-per-s",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Output tokens a second of your device, if known.",
)
@click.option(
    "--train-tokens-per-s",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help='Tokens a second that a training of all weights (method = "full") runs through, if known.',
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default=None,
    help="Who calibrates.  [default: the study's]",
)
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Seed of the calibration's draws.")
@click.option(
    "--from",
    "timed",
    type=click.Path(path_type=Path),
    default=None,
    help="A run that was timed (of this study, or one like it): the whole study, training included, on --workers or --gpus.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="With --from: how many workers.  [default: 1]"
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=None,
    help="With --from: workers of one GPU each, or tensor_parallel.",
)
@click.option(
    "--usd-per-hour", type=click.FloatRange(min=0), default=None, help="With --from: price of a worker."
)
@click.option("--json", "as_json", is_flag=True, help="Print the stages as JSON.")
def cli(
    study: Path,
    calibrate: int,
    tokens_each: float | None,
    tokens_per_s: float | None,
    train_tokens_per_s: float | None,
    backend: str | None,
    seed: int,
    timed: Path | None,
    workers: int | None,
    gpus: int | None,
    usd_per_hour: float | None,
    as_json: bool,
) -> None:
    """Show prompts, tokens, seconds, disk, judge's price and power of a study's measurements.

    Of trainings of all weights (method = "full") memory, checkpoints on disk, and tokens.

    With --from RUN: the wall time of the whole study on so many workers.

    Example: leakfast plan configs/demo.toml --calibrate 64
    """
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.pipeline.estimate import plan
    from leakfast.study.config import load_study

    checked = load_study(study)
    if timed or workers or gpus or usd_per_hour:
        _show_scheduled(_scheduled(checked, timed, workers, gpus, usd_per_hour), as_json)
        return
    with progress_for("calibrate") as progress:
        stages = plan(
            checked,
            tokens_each=tokens_each,
            tokens_per_s=tokens_per_s,
            train_tokens_per_s=train_tokens_per_s,
            calibrate=calibrate,
            backend=backend,
            seed=seed,
            progress=progress,
        )
    if as_json:
        told = {"study": checked.name, "run": str(checked.run_dir), "stages": [asdict(s) for s in stages]}
        print_json(told | {"power": powers(checked)})
        return
    _show_stages(checked, stages)
    _show_powers(powers(checked))


def _show_stages(study: Study, stages: Sequence[Stage]) -> None:
    """A row a stage, and what its numbers rest on."""
    from leakfast.cli.text import print_table

    columns, rows = _columns(stages)
    what = "training of adapters" if columns[-1] == "memory GB" else "training"
    print_table(columns, rows, title=f"plan of {study.name} on {study.model}; {what} is not planned")
    for stage in stages:
        if stage.note:
            click.echo(f"{stage.name}: {stage.note}")
        if stage.output_from:
            click.echo(f"{stage.name}: output tokens {stage.output_from}")
        if stage.completions and stage.seconds is None:
            click.echo(f"{stage.name}: no seconds without a rate. Give --tokens-per-s N or --calibrate N.")
        elif stage.rate_from:
            click.echo(f"{stage.name}: seconds at the rate {stage.rate_from}")
    engines = study.vllm.data_parallel
    if engines > 1 and any(stage.seconds for stage in stages):
        click.echo(f"seconds are one engine's; [vllm] data_parallel = {engines} shares them among {engines}")
    starts = [stage.start_s for stage in stages if stage.start_s is not None]
    if starts:
        click.echo(f"starting the engine took {max(starts):.1f} s; no seconds above hold it")


def _columns(stages: Sequence[Stage]) -> tuple[list[str], list[list[Any]]]:
    """(names of columns, a row a stage); memory has a column where a training of all weights is among them."""
    rows: list[list[Any]] = [
        [
            s.name,
            s.targets,
            s.prompts or None,
            s.prompt_tokens or None,
            s.completions or None,
            s.output_tokens,
            None if s.seconds is None else round(s.seconds, 1),
            None if s.disk_bytes is None else round(s.disk_bytes / 1e6, 1),
            None if s.judge_usd is None else f"{s.judge_usd:.2f}",
        ]
        for s in stages
    ]
    columns = [
        "stage",
        "targets",
        "prompts",
        "prompt tokens",
        "completions",
        "output tokens",
        "seconds",
        "MB",
        "judge USD, about",
    ]
    if any(stage.memory_bytes for stage in stages):
        columns.append("memory GB")
        for row, stage in zip(rows, stages, strict=True):
            row.append(None if stage.memory_bytes is None else f"{stage.memory_bytes / 1e9:.3g}")
    return columns, rows


def _show_powers(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        _show_power(row)
    if any(row["at"] for row in rows):
        from leakfast.cli.power import assumptions
        from leakfast.stats.power import Assumed

        click.echo(f"power {assumptions(Assumed())}; {TRIALS} simulated studies. Others: `leakfast power`.")


def _scheduled(
    study: Study, timed: Path | None, workers: int | None, gpus: int | None, usd_per_hour: float | None
) -> Planned:
    """Raises InputError for a flag that does not go with the others."""
    from leakfast.cluster.simulate import simulate
    from leakfast.models import threads
    from leakfast.storage.run import Run

    if timed is None:
        raise InputError(
            "plan: --workers, --gpus and --usd-per-hour need the rates of a run that was timed. Add --from RUN; a small one of "
            "the same model will do."
        )
    if workers and gpus:
        raise InputError("plan: --workers and --gpus given. Give one of them.")
    each = study.vllm.tensor_parallel
    if gpus and gpus < each:
        raise InputError(
            f"plan: --gpus {gpus} given, but the study says tensor_parallel = {each}. Give {each} or more."
        )
    cores = len(threads.affinity())
    n = gpus // each if gpus else workers or 1
    shared = 1.0 if gpus else max(1.0, n / cores)
    return simulate(study, Run(timed).open(), n, usd_per_hour=usd_per_hour, shared=shared)


def _show_scheduled(planned: Planned, as_json: bool) -> None:
    from leakfast.cli.text import print_json

    if as_json:
        print_json(asdict(planned))
        return
    if planned.wall_s is None or planned.efficiency is None or planned.critical_path_s is None:
        click.echo(f"nobody timed {', '.join(planned.untimed)}; no time is given. Rates are {planned.said}.")
        return
    click.echo(
        f"{planned.tasks} tasks on {planned.workers} workers: {planned.wall_s / 60:.1f} min, of which they work "
        f"{100 * planned.efficiency:.0f} %; rates {planned.said}. Judges come after, and are not planned."
    )
    after = "" if planned.shown_s is None else f"{planned.shown_s:.1f} s more; "
    click.echo(f"tables, figures and report, in the driver: {after}{planned.shown_said}")
    click.echo(f"critical path: {planned.critical_path_s / 60:.1f} min ({' → '.join(planned.path)})")
    click.echo("last to end: " + ", ".join(f"{name} at {s / 60:.1f} min" for name, s in planned.last))
    if planned.usd is not None:
        click.echo(f"price: {planned.usd:.2f} USD")


def powers(study: Study) -> list[dict[str, Any]]:
    """One entry for the trained behaviors of equal sizes that a detector reads: their names, sizes, what is assumed,
    and the power at each of RHOS, pooled and for one source; `reason` where there are too few bystanders. Judged scores
    and multiple choice have another noise and no entry."""
    from leakfast.behaviors.registry import get
    from leakfast.pipeline import asks
    from leakfast.prompts.personas import load_personas
    from leakfast.stats import power as model

    bystanders = len(load_personas(study.personas)) - 1  # a source is one of them
    alike: dict[model.Design, list[str]] = {}
    for behavior in asks.trained(study):
        if get(behavior).detector is None or not get(behavior).by_completions:
            continue
        asked = next(one for one in asks.asked(study, behavior) if not one.beside)
        design = model.Design(
            bystanders,
            len(getattr(asked.questions, "questions", asked.questions)),
            asked.config.samples,
            len(study.sources),
            len(study.seeds),
        )
        alike.setdefault(design, []).append(behavior)
    rows: list[dict[str, Any]] = []
    assumed = model.Assumed()
    for design, behaviors in alike.items():
        row = {"behaviors": behaviors, "design": asdict(design), "assumed": asdict(assumed), "trials": TRIALS}
        if bystanders < model.FEWEST:
            why = f"{bystanders} bystanders; a rank correlation needs {model.FEWEST}"
            rows.append(row | {"at": [], "reason": why})
            continue
        alone = replace(design, sources=1)
        at = [
            {"rho": rho, "one_source": asdict(model.power(rho, alone, assumed, TRIALS))}
            | asdict(model.power(rho, design, assumed, TRIALS))
            for rho in RHOS
        ]
        rows.append(row | {"at": at, "reason": None})
    return rows


def _show_power(row: dict[str, Any]) -> None:
    from leakfast.cli.power import sizes
    from leakfast.stats.power import Design

    names, design = ", ".join(row["behaviors"]), Design(**row["design"])
    if row["reason"]:
        click.echo(f"{names}: no power: {row['reason']}")
        return
    told = []
    for one in row["at"]:
        pooled = f", {100 * one['power']:.0f} % for all pooled" if design.sources > 1 else ""
        told.append(
            f"at an assumed rho of {one['rho']:g} {100 * one['one_source']['power']:.0f} % for one source{pooled}"
        )
    click.echo(f"{names}: power {'; '.join(told)} ({sizes(design)})")
