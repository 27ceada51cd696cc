"""`leakfast judge`: score a run's completions, draw some for a person to score, compare two who scored. Demands a
run with completions; what was paid for before is kept, so the same command again is the resume."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.places import FILE_OUT
from leakfast.cli.settings import changed, options_of
from leakfast.errors import InputError

if TYPE_CHECKING:
    from leakfast.storage.run import Run
    from leakfast.study.config import JudgeConfig


class _Judge(click.Group):
    """A group whose first word may be the run: `leakfast judge RUN` is `leakfast judge run RUN`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Judge)
def cli() -> None:
    """Score completions for alignment and coherence, and check who scores.

    Example: leakfast judge runs/study --behavior misalignment-advice --judge anthropic:MODEL --dry-run

    `leakfast judge RUN` is short for `leakfast judge run RUN`.
    """


@cli.command("run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--behavior", default=None, help="Behavior to judge.  [default: the run's, if it has one such]")
@options_of(
    "JudgeConfig",
    "judge",
    "base_url",
    "max_cost",
    "prices",
    "temperature",
    "max_tokens",
    "concurrency",
    free={"is_flag": True},
    send_temperature={"decls": ["--send-temperature/--no-temperature"]},
    timeout_s={"decls": ["--timeout"]},
    poll_s={"decls": ["--poll"]},
)
@click.option("--questions", default=None, help="Set that was asked.  [default: the study's]")
@click.option(
    "--dry-run", is_flag=True, help="Say how many requests and what they cost at most; send nothing."
)
@click.option("--again", is_flag=True, help="Ask anew where the kept reply gave no score.")
@click.option("--checkpoints", is_flag=True, help="What was drawn on the way through training, instead.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done, or would be, as JSON.")
def run_(
    run: Path,
    behavior: str | None,
    questions: str | None,
    dry_run: bool,
    again: bool,
    checkpoints: bool,
    as_json: bool,
    **settings: Any,
) -> int | None:
    """Score every completion of a behavior in RUN.

    Example: leakfast judge run runs/study --judge openai:MODEL --base-url http://localhost:8000/v1 --free

    Keys come from the environment alone (ANTHROPIC_API_KEY, OPENAI_API_KEY). Exit code 3: done, but some
    completions have no score yet.
    """
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.judge import stage
    from leakfast.judge.contract import ENOUGH
    from leakfast.judge.keys import scrub
    from leakfast.prompts.personas import load_questions
    from leakfast.storage.layout import SERIES

    store = _opened(run, told=True)
    behavior = behavior or _only_behavior(store, SERIES if checkpoints else "")
    cfg, of_study = _settings(store, behavior)
    cfg = changed(cfg, **settings)
    asked = questions if questions is not None else of_study
    if cfg.judge is None or asked is None:
        lacking, what = ("judge", "SERVICE:MODEL") if cfg.judge is None else ("questions", "SET")
        raise InputError(f"judge: no {lacking} given. Add --{lacking} {what}, or set it in the run's study.")
    with progress_for("judge") as progress:
        done = stage.judge(
            store,
            behavior,
            stage.parse_spec(cfg.judge),
            load_questions(asked),
            series=checkpoints,
            asking=stage.asking(cfg),
            prices=cfg.prices,
            free=cfg.free,
            max_cost=cfg.max_cost,
            again=again,
            dry_run=dry_run,
            progress=progress,
        )
    if isinstance(done, stage.Plan):
        print_json(asdict(done)) if as_json else _show_plan(done)
        return None
    if checkpoints:
        from leakfast.cli.health import tell
        from leakfast.report import trajectory
        from leakfast.stats import baselines

        table = trajectory.write(store)
        tell([] if table is None else baselines.points_apart(table), err=True)
    if as_json:
        covered = {name: done.coverage(name) for name in done.statuses}
        print_json({**asdict(done), "coverage": covered, "service": scrub(cfg.base_url or "")})
    else:
        _show(done)
    short = done.stopped or any(done.coverage(name) < ENOUGH for name in done.statuses)
    return 3 if short else None


@cli.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--n", type=click.IntRange(min=1), default=50, help="Completions to draw.")
@click.option("--csv", "path", type=FILE_OUT, required=True, help="File to write for a person.")
@click.option(
    "--behavior", default=None, help="Behavior to draw from.  [default: the run's, if it has one such]"
)
@click.option("--judge", default=None, help="Whose judgements.  [default: the only judge's]")
@click.option("--questions", default=None, help="Set that was asked.  [default: the study's]")
@click.option("--seed", type=click.IntRange(min=0), default=42, help="Seed of the draw.")
def sample_(
    run: Path, n: int, path: Path, behavior: str | None, judge: str | None, questions: str | None, seed: int
) -> None:
    """Draw judged completions for a person to score, without scores, persona and adapter.

    Example: leakfast judge sample runs/study --n 50 --csv blind.csv
    """
    from leakfast.judge import agreement
    from leakfast.prompts.personas import load_questions

    store = _opened(run)
    behavior = behavior or _only_behavior(store)
    asked = questions if questions is not None else _settings(store, behavior)[1]
    if asked is None:
        raise InputError("judge: the run has no study that says what was asked. Add --questions SET.")
    frame = agreement.read_run(store, judge, behavior)
    rows = agreement.sample(store, frame, list(load_questions(asked).questions), n, seed)
    agreement.write_csv(path, rows)
    click.echo(f"judge: {len(rows)} completions; fill in aligned and coherent (0–100), then:", err=True)
    click.echo(f"leakfast judge agree {run} {path}")


@cli.command("agree")
@click.argument("a")
@click.argument("b")
@click.option("--behavior", default=None, help="Judgements of this behavior alone.  [default: all]")
@click.option(
    "--threshold", type=click.FloatRange(0, 100), default=50.0, help="Scores below it count as misaligned."
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def agree_(a: str, b: str, behavior: str | None, threshold: float, as_json: bool) -> None:
    """Compare two judges, or a judge and a person: kappa, rank correlation, and how many both scored.

    Example: leakfast judge agree runs/study@organism blind.csv

    A and B are each RUN, RUN@JUDGE, or a CSV of `leakfast judge sample`.
    """
    from leakfast.cli.text import print_json, print_table
    from leakfast.judge import agreement

    sides = [_side(text, behavior) for text in (a, b)]
    found = [agreement.compare(*sides, threshold, what) for what in ("aligned", "coherent")]
    if found[0].n == 0:
        raise InputError(f"judge: {a} and {b} have no completion in common that both scored. Check the two.")
    if as_json:
        print_json({"a": a, "b": b, "agreement": [asdict(one) for one in found]})
        return
    columns = [
        "score",
        "n",
        "kappa",
        "weighted kappa",
        "Spearman",
        "p",
        "mean A",
        "mean B",
        "only A",
        "only B",
    ]
    rows = []
    for f in found:
        p = None if f.spearman_p is None else f"{f.spearman_p:.1e}"
        kappas = [_r(f.kappa), _r(f.kappa_weighted), _r(f.spearman)]
        rows.append([f.what, f.n, *kappas, p, _r(f.mean_a, 1), _r(f.mean_b, 1), f.only_a, f.only_b])
    print_table(columns, rows, title=f"A: {a}, B: {b} (kappa: below {threshold:g})")


def _side(text: str, behavior: str | None) -> Any:
    from leakfast.judge import agreement

    if Path(text).is_file():
        return agreement.read_csv(Path(text))
    folder, _, judge = (text, "", "") if Path(text).is_dir() else text.partition("@")
    return agreement.read_run(_opened(Path(folder)), judge or None, behavior)


def _opened(path: Path, told: bool = False) -> Run:
    """A run without what its study dropped, which stands in no table, so that nobody pays for scores of it. told: with a line
    about that."""
    from leakfast.cli.health import tell
    from leakfast.stats import dropped
    from leakfast.storage.run import Run

    run = Run(path).open()
    if told and (left_out := dropped.told(run)):
        tell([left_out], err=True)
    return dropped.part(run)


def _only_behavior(run: Run, under: str = "") -> str:
    """The behavior of the run that a judge measures, where there is one."""
    from leakfast.behaviors.registry import get, is_known

    tree = f"{under}/completions" if under else "completions"
    there = dict.fromkeys(path.removeprefix(f"{tree}/").split("/")[0] for path in run.shards(tree))
    found = [name for name in there if is_known(name) and get(name).measured_by == "judge"]
    if len(found) != 1:
        raise InputError(
            f"judge: {run.path} holds {len(found)} behaviors that a judge measures"
            f"{': ' + ', '.join(found) if found else ''}. Name one: --behavior NAME."
        )
    return found[0]


def _settings(run: Run, behavior: str) -> tuple[JudgeConfig, str | None]:
    """The judge's settings and the questions in the run's study; defaults where it has none."""
    from leakfast.judge import stage
    from leakfast.study.config import JudgeConfig, load_study

    path = run.path / "study.toml"
    if not path.is_file():
        return JudgeConfig(), None
    study = load_study(path)
    if behavior not in study.behaviors:
        return JudgeConfig(), None
    return stage.settings(study, behavior), study.behaviors[behavior].eval.questions


def _show_plan(plan: Any) -> None:
    click.echo(f"{plan.judge} on {plan.behavior}: {plan.completions} completions, {plan.empty} of them empty")
    click.echo(
        f"requests: {plan.requests} different, {plan.kept} answered before, {plan.in_flight} in a batch"
    )
    click.echo(
        f"to send:  {plan.to_send}, about {plan.input_tokens} tokens in, at most {plan.output_tokens_at_most} out"
    )
    click.echo(
        f"price:    at most {plan.usd_at_most:.4f} USD; spent before in this run: {plan.spent_usd:.4f} USD"
    )


def _show(done: Any) -> None:
    from leakfast.cli.text import print_table

    rows = [
        [
            adapter,
            sum(counted.values()),
            f"{100 * done.coverage(adapter):.1f}",
            ", ".join(f"{n} {status}" for status, n in counted.items() if status != "ok") or None,
        ]
        for adapter, counted in done.statuses.items()
    ]
    print_table(
        ["adapter", "completions", "scored %", "without a score"], rows, title=f"judged by {done.plan.judge}"
    )
    if done.stopped:
        click.echo(f"judge: stopped short: {done.stopped}", err=True)
    if done.spent_usd:
        click.echo(f"judge: {done.spent_usd:.4f} USD spent in this run", err=True)


def _r(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)
