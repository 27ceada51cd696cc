"""`leakfast power`: how likely a study is to find the relation of cosine and leakage, before it is run. Demands sizes and
assumptions, or a finished run to take them from; rounding happens here."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leakfast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leakfast.stats.power import Assumed, Design, Power
    from leakfast.stats.power_choices import Bought, Point


@click.command()
@click.option("--rho", type=float, default=0.3, help="True rank correlation of cosine and expected rate.")
@click.option("--base-rate", type=float, help="Mean rate of bystanders, a share.  [default: 0.13]")
@click.option("--personas", type=int, help="Bystanders of each source.  [default: 110]")
@click.option("--questions", type=int, help="Questions asked.  [default: 20]")
@click.option("--samples", type=int, help="Completions a question.  [default: 10]")
@click.option("--sources", type=int, help="Sources, pooled.  [default: 5]")
@click.option("--seeds", type=int, help="Training seeds of each source; rates are averaged.  [default: 1]")
@click.option(
    "--from",
    "run",
    type=click.Path(path_type=Path),
    help="A finished run to take sizes, mean rate, spreads and cosines from; the other options go before it.",
)
@click.option("--behavior", help="Which of the run's behaviors, where there are several.")
@click.option("--sd-persona", type=float, help="Spread of personas, logits.  [default: 1.0]")
@click.option("--sd-question", type=float, help="Spread of questions, logits.  [default: 0.5]")
@click.option("--sd-interaction", type=float, help="Spread of personas by questions, logits.  [default: 0.3]")
@click.option(
    "--sd-seed", type=float, help="Spread of a persona between training seeds, logits.  [default: 0]"
)
@click.option("--sd-source", type=float, help="Spread of sources around the base rate, logits.  [default: 0]")
@click.option(
    "--sources-alike",
    type=float,
    help="Correlation between sources of what the cosine leaves of a persona's logit.  [default: 0]",
)
@click.option("--per-hour", type=int, help="Generations an hour; shows what one hour more buys most.")
@click.option("--curves/--no-curves", default=True, help="Power at other sizes, and the smallest rho found.")
@click.option("--trials", type=int, default=1000, help="Studies simulated at each point.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of everything drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def cli(
    rho: float,
    run: Path | None,
    behavior: str | None,
    per_hour: int | None,
    curves: bool,
    trials: int,
    seed: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Simulate how likely a study is to find that leakage follows the cosine.

    Example: leakfast power --rho 0.3 --sources 1 --samples 3 --per-hour 20000

    A study finds it where a two-sided test of the bystanders' mean rates against the cosine gives p < 0.05: Spearman's ρ
    for one source, for several the ranks within each source, pooled, against shuffles of the personas. --rho is
    an assumption, never taken from a run: the ρ that a run happened to show says how likely it was to be found no
    better than its p does.
    """
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.stats import power as model
    from leakfast.stats import power_choices as choices

    if trials < 100:
        raise InputError(f"power: {trials} trials; at least 100 are needed. Give --trials 1000.")
    if behavior is not None and run is None:
        raise InputError("power: --behavior names one of a run's; a run is needed. Give --from RUN too.")
    design, assumed, notes = resolved(run, behavior, given)
    model.check(rho, design, assumed)
    found = model.power(rho, design, assumed, trials, seed)
    alone = (
        found if design.sources == 1 else model.power(rho, replace(design, sources=1), assumed, trials, seed)
    )
    smallest, points, bought = None, [], []
    with progress_for("power") as progress:
        drawn: dict[str, Any] = {"trials": trials, "seed": seed, "progress": progress}
        if curves:
            smallest = choices.smallest_rho(design, assumed, **drawn)
            points = choices.curves(rho, design, assumed, here=found, **drawn)
        if per_hour is not None:
            bought = choices.spend(rho, design, assumed, per_hour, **drawn)
    if as_json:
        told = {"rho": rho, "alpha": model.ALPHA, "trials": trials, "seed": seed, "design": asdict(design)}
        told |= {"assumed": asdict(assumed), "notes": notes, "generations": design.generations()}
        told |= asdict(found) | {"one_source": asdict(alone)}
        told |= {"smallest_rho": smallest, "curves": list(map(asdict, points))}
        print_json(told | {"per_hour": per_hour, "next_hour": list(map(asdict, bought))})
        return
    for line in sentences(rho, design, assumed, found, trials):
        click.echo(line)
    if design.sources > 1:
        click.echo(f"one source alone: power {_with_interval(alone)}, observed rho {_signed(alone.observed)}")
    if curves:
        said = f"{smallest:.2f}" if smallest is not None else "none below 0.99"
        click.echo(f"smallest rho found with 80 % power: {said}")
        _show_curves(points, design)
    if per_hour is not None:
        _show_bought(bought, per_hour)
    for note in notes:
        click.echo(f"note: {note}")


def resolved(
    run: Path | None, behavior: str | None, given: dict[str, Any]
) -> tuple[Design, Assumed, list[str]]:
    """Sizes and assumptions: those given, else the run's, else the defaults; and notes on what was read."""
    from leakfast.stats.power import Assumed, Design

    design, assumed, notes = Design(), Assumed(), []
    if run is not None:
        from leakfast.stats.power_from import read

        found = read(run, behavior)
        design, assumed, notes = found.design, found.assumed, [f"read from {run}: {found.notes[0]}"]
        notes += found.notes[1:]
    given = {name: value for name, value in given.items() if value is not None}
    if "sources_alike" in given:
        given["alike"] = given.pop("sources_alike")
    sizes = {field.name for field in fields(Design)}
    design = replace(design, **{name: value for name, value in given.items() if name in sizes})
    assumed = replace(assumed, **{name: value for name, value in given.items() if name not in sizes})
    if design.personas < 10:
        notes.append("below 10 personas the test's approximations are rough: its level is not quite 5 %")
    if design.seeds > 1 and assumed.sd_seed == 0:
        notes.append("sd_seed is 0: a training seed more is worth no more than samples (--sd-seed)")
    return design, assumed, notes


def sentences(rho: float, design: Design, assumed: Assumed, found: Power, trials: int) -> list[str]:
    """The headline: what was assumed, the power, the ρ that studies would see."""
    lines = [
        f"{sizes(design)}: {design.generations():,} generations",
        assumptions(assumed),
        f"power at rho {rho:g}: {_with_interval(found)} ({trials:,} simulated studies, p < 0.05 two-sided)",
    ]
    if found.observed is not None:
        lines.append(
            f"observed rho: {found.observed:+.2f} expected, {found.observed_low:+.2f} to {found.observed_high:+.2f} in 90 % "
            "of the studies"
        )
    if found.blank:
        lines.append(f"in {100 * found.blank:.1f} % of the studies no bystander differs, which finds nothing")
    return lines


def sizes(design: Design) -> str:
    """5 sources x 110 bystanders x …"""
    named = {
        "source": design.sources,
        "bystander": design.personas,
        "question": design.questions,
        "sample": design.samples,
        "training seed": design.seeds,
    }
    return " x ".join(f"{number} {what}{'' if number == 1 else 's'}" for what, number in named.items())


def _with_interval(found: Power) -> str:
    return f"{100 * found.power:.1f} % [{100 * found.power_low:.1f}, {100 * found.power_high:.1f}]"


def _signed(rho: float | None) -> str:
    return "–" if rho is None else f"{rho:+.2f}"


def assumptions(assumed: Assumed) -> str:
    """One sentence of what is taken to be true."""
    known = "" if assumed.cosines is None else ", cosines of sources related as in the run"
    return (
        f"assumed: mean bystander rate {100 * assumed.base_rate:.1f} %; spreads in logits: personas "
        f"{assumed.sd_persona:.2f}, questions {assumed.sd_question:.2f}, personas by questions "
        f"{assumed.sd_interaction:.2f}, training seeds {assumed.sd_seed:.2f}, sources {assumed.sd_source:.2f}; sources alike "
        f"{assumed.alike:.2f}{known}"
    )


def _show_curves(points: Sequence[Point], design: Design) -> None:
    from leakfast.cli.text import print_table

    rows = [
        [
            one.size,
            f"{one.value}{' *' if one.value == getattr(design, one.size) else ''}",
            f"{one.generations:,}",
            f"{100 * one.power:.1f}",
            f"{100 * one.power_low:.1f} - {100 * one.power_high:.1f}",
            None if one.observed is None else f"{one.observed:+.2f}",
        ]
        for one in points
    ]
    click.echo()
    columns = ["size", "value", "generations", "power %", "95 % interval", "observed rho"]
    print_table(columns, rows, title="power at other sizes, one changed at a time (* as asked)")


def _show_bought(bought: Sequence[Bought], per_hour: int) -> None:
    from leakfast.cli.text import print_table

    rows = [
        [
            one.size,
            one.value if one.reason is None else None,
            f"{one.spent:,}",
            None if one.power is None else f"{100 * one.power:.1f}",
            None
            if one.gain is None
            else f"{100 * one.gain:+.1f} [{100 * one.gain_low:+.1f}, {100 * one.gain_high:+.1f}]",
            one.reason or "",
        ]
        for one in bought
    ]
    click.echo()
    columns = ["more", "then", "generations", "power %", "gained, points", ""]
    title = f"what one hour more buys ({per_hour:,} generations, on one size; further trainings not counted)"
    print_table(columns, rows, title=title)
