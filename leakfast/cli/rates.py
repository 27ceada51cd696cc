"""What `leakfast eval` shows of what was measured: rates by persona, health first, and what multiple choice has besides.
Demands what `measure` returned; rounds here, decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from leakfast.behaviors.registry import get
from leakfast.cli import amounts
from leakfast.cli import health as healths
from leakfast.cli.text import print_json, print_table
from leakfast.storage import layout

if TYPE_CHECKING:
    import polars as pl

    from leakfast.measure import Measured
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run


def tell(run: Run, done: Measured) -> None:
    """What was measured, and what remains to be done with it, on stderr."""
    unit = "completions drawn" if get(done.behavior).by_completions else "prompts scored"
    probable = layout.PROBABILITY in done.folders[0].split("/")[:2]
    if probable:
        unit = "probabilities scored"
    click.echo(
        f"eval: {done.made} {unit} of {done.behavior} ({done.questions}), {done.kept} kept from before, in {run.path}",
        err=True,
    )
    if done.engine and "not_guaranteed" in done.engine:
        click.echo(
            f"eval: seeds and rows are fixed; {done.engine['backend']} does not guarantee "
            f"{done.engine['not_guaranteed']}",
            err=True,
        )
    if get(done.behavior).measured_by == "judge" and not probable:
        more = " --checkpoints" if done.folders[0].startswith(layout.SERIES) else ""
        click.echo(
            f"eval: {done.behavior} has no rates before a judge has read them: leakfast judge run {run.path}{more}",
            err=True,
        )


def rates(
    run: Run,
    done: Sequence[Measured],
    personas: Sequence[Persona],
    *,
    by: str,
    top: int,
    as_json: bool,
    more: Mapping[str, Any] | None = None,
) -> int | None:
    """Tables of what was measured, or all of it as JSON, `more` beside it; 3 where items could not be counted."""
    found = [found for one in done if (found := _found(run, one, personas, by, as_json)) is not None]
    if as_json:
        told = [{"behavior": one.behavior, **one.told} for one in found]
        if len({one.behavior for one in done}) == 1 and len(told) == 1:
            alone = {k: v for k, v in told[0].items() if k != "behavior"}
            print_json({"run": str(run.path), **alone, **(more or {})})
        else:
            print_json({"run": str(run.path), "behaviors": told, **(more or {})})
    else:
        several = len({(one.behavior, one.questions) for one in found}) > len({one.behavior for one in found})
        for one in found:
            show(one.table, one.behavior, top, one.questions if several else "", one.health)
            for line in one.lines:
                click.echo(line)
    return 3 if any(one.trouble for one in found) else None


class _Found:
    """One behavior's rates, what of them is told as JSON, and further lines for people."""

    def __init__(self, one: Measured, table: pl.DataFrame, health: pl.DataFrame | None) -> None:
        self.behavior, self.questions, self.table, self.health = one.behavior, one.questions, table, health
        self.trouble, self.lines = "", []
        self.told: dict[str, Any] = {}


def _found(run: Run, one: Measured, personas: Sequence[Persona], by: str, as_json: bool) -> _Found | None:
    """None where a judge has to read the completions first."""
    from leakfast.measure import rates as rates_of

    if not get(one.behavior).by_completions:
        return _of_choices(run, one, rates_of(run, one, personas, by), by)
    from leakfast.stats.health import sentences

    looked = healths.of_evaluation(run, one)
    healths.tell(sentences(looked), err=as_json)
    if get(one.behavior).detector is None:
        return None
    found = _Found(one, rates_of(run, one, personas), looked)
    found.told = {"questions": one.questions, "health": looked.to_dicts(), "rates": found.table.to_dicts()}
    return found


def _of_choices(run: Run, one: Measured, table: pl.DataFrame, by: str) -> _Found:
    """With what guessing gives, the labels chosen, the mean mass on the answers, and what could not be counted."""
    import polars as pl

    from leakfast.measure.choices import table as tables
    from leakfast.measure.choices.measurer import read_scores
    from leakfast.stats.accuracy import chosen_labels, remarks

    scores = read_scores(run, one)
    labels = chosen_labels(scores, tables.CHOSEN[by])
    found = _Found(one, table, None)
    for sentence in remarks(table, labels):
        click.echo(f"eval: {sentence}", err=True)
    found.trouble = tables.troubles(table)
    if found.trouble:
        click.echo(f"eval: not counted: {found.trouble}", err=True)
    kept = next(e for path, e in run.manifest["shards"].items() if path.startswith(f"{one.folders[0]}/"))
    found.told = {
        "items": one.questions,
        "scoring": scores["scoring"][0],
        "by": by,
        "answers": kept.get("answers", ""),
        "rates": table.to_dicts(),
        "chosen_labels": labels.to_dicts(),
    }
    if (guess := table["chance"].mean()) is not None:
        found.lines.append(f"chance: {100 * guess:.1f} % (mean of 1 / number of choices)")
    for (name,), mine in labels.filter(pl.col("persona").is_null()).group_by("adapter", maintain_order=True):
        said = ", ".join(
            f"{label} {100 * share:.0f} % ({100 * key:.0f})"
            for label, share, key in mine.sort("label").select("label", "share", "share_right").rows()
        )
        found.lines.append(f"labels chosen by {name} (right in brackets): {said}")
    if table["answer_mass"].null_count() < table.height:
        masses = table.group_by("adapter", maintain_order=True).agg(pl.col("answer_mass").mean()).rows()
        said = ", ".join(f"{name} {100 * mass:.1f} %" for name, mass in masses if mass is not None)
        found.lines.append(f"mean probability on the answers: {said}")
    return found


def show(table: pl.DataFrame, behavior: str, top: int, questions: str = "", health: Any = None) -> None:
    """One block per adapter: its source, the highest bystanders, and the mean over all bystanders; health: the table
    of that name, whose verdicts stand beside. The interval is over questions, with Wilson's, which
    takes all samples as independent, beside it under its name; alone where no question has two samples, or of items."""
    import polars as pl

    clustered = "bb_low" in table.columns and table["bb_low"].null_count() < table.height
    rows = []
    verdict = {}
    if health is not None:
        verdict = dict(health.filter(pl.col("persona").is_null()).select("adapter", "health").rows())
    for name in table["adapter"].unique(maintain_order=True):
        part = table.filter(pl.col("adapter") == name)
        own = part.filter(pl.col("role") == "source")
        others = part.filter(pl.col("role") != "source").sort(["rate", "persona"], descending=[True, False])
        told = [] if health is None else [verdict.get(name)]
        listed = [*own.rows(named=True), *others.head(top).rows(named=True)]
        rows += [[*_line(name, row, clustered), *told] for row in listed]
        who = "all" if name == layout.BASE else "all bystanders"
        hits, total = int(others["hits"].sum()), int(others["total"].sum())
        gap = [None] * (2 if clustered else 1)
        rows.append(
            [
                name,
                "mean",
                who,
                amounts.amount(others["rate"].mean(), "share"),
                *gap,
                hits,
                total,
                None,
                *told,
            ]
        )
    which = ["95 % interval", "Wilson 95 %"] if clustered else ["Wilson 95 %"]
    columns = ["adapter", "role", "persona", f"{behavior} %", *which, "hits", "of", "Δ pp"]
    columns += [] if health is None else ["health"]
    on = f" on {questions}" if questions else ""
    over = " (95 % interval over questions)" if clustered else ""
    print_table(columns, rows, title=f"{behavior}{on}: rate by persona{over}")


def _line(name: str, row: dict[str, Any], clustered: bool) -> list[Any]:
    shown = ("bb", "ci") if clustered else ("ci",)
    ends = [(row[f"{kind}_low"], row[f"{kind}_high"]) for kind in shown]
    spans = [None if low is None else f"{100 * low:.1f} – {100 * high:.1f}" for low, high in ends]
    delta = None if row["delta"] is None else f"{100 * row['delta']:+.1f}"
    return [
        name,
        row["role"],
        row["persona"],
        amounts.amount(row["rate"], "share"),
        *spans,
        row["hits"],
        row["total"],
        delta,
    ]


def trajectory(run: Run, as_json: bool) -> None:
    """Make the table and figure of what the run holds, and print the rates at shares of training."""
    from leakfast.report import trajectory
    from leakfast.stats import baselines, summary

    table = trajectory.write(run)
    healths.tell([] if table is None else baselines.points_apart(table), err=True)
    if as_json:
        print_json({"run": str(run.path), "trajectory": [] if table is None else table.to_dicts()})
        return
    if table is None:
        click.echo("eval: no point has a rate yet: a judge has to read the completions first", err=True)
        return
    shares = sorted(table["share"].unique().to_list())
    rows = []
    key = ["behavior", "adapter", "items", "scoring"]
    for told, part in table.group_by(key, maintain_order=True):
        scale = 100 if summary.unit(table, str(told[0])) == "share" else 1
        for (persona,), line in part.group_by("persona", maintain_order=True):
            found = {
                share: (rate, health) for share, rate, health in line.select("share", "rate", "health").rows()
            }
            rates = [found.get(share, (None, None)) for share in shares]
            marked = [" (damaged)" if health == "damaged" else "" for _, health in rates]
            shown = [
                None if rate is None else f"{scale * rate:.1f}{mark}"
                for (rate, _), mark in zip(rates, marked, strict=True)
            ]
            rows.append([*told, line["role"][0], persona, *shown])
    print_table(
        [*key, "role", "persona", *(f"{100 * s:g} %" for s in shares)],
        rows,
        title="rate in % (of judged behaviors: points) at shares of training",
    )
