"""`leakfast run`: every stage of a study file, then the headline table and the report's path.
Demands a study file; leaves the work to leakfast.pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.places import FOLDER_OUT
from leakfast.cli.settings import threads_option
from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.study.config import Study


@click.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=FOLDER_OUT,
    default=None,
    help="Run directory, or s3://BUCKET/PREFIX (pip install 'leakfast[s3]'); the study's, runs/<name>, if not given.",
)
@click.option(
    "--only",
    default=None,
    help="Behaviors, sources and seeds to run, split by commas; of what is not named, all.",
)
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="KIND[:WHERE]",
    help="Share the finished run: inspect:FOLDER, wandb:PROJECT or hub:OWNER/NAME; may be repeated. What goes wrong there "
    "is a warning.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=None,
    help="Processes of this machine that share the work, each with GPUs, or cores, of its own. One for every GPU if not given "
    "(of tensor_parallel GPUs, where the study says so); one without GPUs. With --cluster: actors.",
)
@click.option(
    "--cluster",
    metavar="auto|HOST:PORT|slurm|kubernetes",
    default=None,
    help="Work on a Ray cluster (pip install 'leakfast[cluster]'): auto takes the one that runs here, or starts one on this "
    "machine. slurm, kubernetes: with --print.",
)
@click.option(
    "--print",
    "printed",
    is_flag=True,
    help="Print a script that starts a Ray cluster on an allocation and the study on it, and run nothing.",
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print stages, tables' summary and paths as JSON.")
def cli(
    study: Path,
    out: Path | None,
    only: str | None,
    exports: tuple[str, ...],
    workers: int | None,
    cluster: str | None,
    printed: bool,
    as_json: bool,
) -> int | None:
    """Run all stages of a study file, skipping what is done.

    Example: leakfast run configs/demo.toml
    """
    from leakfast.cli.export import after_run, targets
    from leakfast.cli.health import tell
    from leakfast.cli.progress import progress_for
    from leakfast.cli.stats import show
    from leakfast.cli.text import print_json
    from leakfast.cluster import run as run_on
    from leakfast.cluster.actors import actors
    from leakfast.cluster.local import processes, workers_of
    from leakfast.cluster.scripts import SCHEDULERS
    from leakfast.pipeline.stages import run
    from leakfast.storage.objects import address_of
    from leakfast.study.config import load_study

    words = [word.strip() for word in (only or "").split(",") if word.strip()]
    checked = load_study(study)
    asked = targets(exports, out or checked.run_dir)
    if printed or cluster in SCHEDULERS:
        given = {"--out": out, "--only": only, "--workers": workers}
        click.echo(_script(cluster, printed, checked, study, given), nl=False)
        return None
    about: dict[str, Any] = {"out": out, "only": words, "progress": progress_for}
    if cluster is not None:
        outcome = run_on(checked, actors(cluster, workers), **about)
    else:
        n = workers or (1 if _is_finished(checked, out, words) else workers_of(checked))
        outcome = run(checked, **about) if n == 1 else run_on(checked, processes(n), **about)
    address = address_of(out or checked.run_dir)
    exported = after_run(outcome.run, asked, outcome.stats)
    if as_json:
        tell(outcome.stats.warnings(), err=True)
        health = outcome.stats.health
        print_json(
            {
                "health": [] if health is None else health.to_dicts(),
                "run": str(outcome.run),
                "address": address,
                "report": str(outcome.report),
                "stages_s": outcome.stages,
                "summary": outcome.stats.summary().to_dicts(),
                "missing": list(outcome.stats.missing),
                "exports": exported,
            }
        )
    else:
        show(outcome.stats)
        click.echo(f"report: {outcome.report}")
        if address is not None:
            click.echo(f"run: {address}")
    return 3 if outcome.stats.missing else None


def _is_finished(study: Study, out: Path | None, only: list[str]) -> bool:
    """Whether nothing is left to be done, so that nobody has to know of GPUs."""
    from leakfast.pipeline.finished import is_finished
    from leakfast.pipeline.stages import chosen_of
    from leakfast.storage.objects import address_of
    from leakfast.storage.run import Run

    run = Run(out or study.run_dir)
    return address_of(run.path) is None and is_finished(study, chosen_of(study, only), run)


def _script(cluster: str | None, printed: bool, checked: Study, file: Path, given: dict[str, Any]) -> str:
    """The script of a scheduler. Raises InputError where one of the two flags lacks the other."""
    from leakfast.cluster.scripts import SCHEDULERS, script

    if cluster not in SCHEDULERS:
        raise InputError(
            "run: --print given, which writes a script for a scheduler. Say which: --cluster slurm or --cluster kubernetes."
        )
    if not printed:
        raise InputError(
            f"run: --cluster {cluster} given; leakfast submits nothing itself. Type: leakfast run {file} --cluster {cluster} "
            "--print > JOB, look at it, and hand it to the scheduler (sbatch JOB; kubectl apply -f JOB)."
        )
    words = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    return script(cluster, checked, file, words)
