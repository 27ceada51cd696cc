"""What `leakfast show` prints of a run's tables: warnings, verdicts, headline, leaks and little charts. Demands a run that
is only read; computes nothing beside what `stats` gives, and rounds here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import polars as pl

from leakfast.behaviors.registry import sign_of
from leakfast.cli import amounts
from leakfast.cli.across_shown import print_across
from leakfast.cli.text import print_json, print_table
from leakfast.errors import InputError
from leakfast.inert import one_line
from leakfast.report.across import across
from leakfast.stats import beyond, named
from leakfast.stats.glance import glance
from leakfast.stats.pairs import layers_of
from leakfast.stats.summary import most
from leakfast.storage.documents import did_you_mean

if TYPE_CHECKING:
    from leakfast.stats.tables import Stats
    from leakfast.storage.reading import ReadOnlyRun

_WIDTH = 40  # bars of a chart


@dataclass(frozen=True)
class Asked:
    """Which part of a run is shown. layer None: each behavior's best; top: bystanders for each source."""

    behavior: str | None = None
    source: str | None = None
    layer: int | None = None
    cosine: str = "centered"
    top: int = 5


class View:
    """One behavior of a run at one layer."""

    def __init__(self, stats: Stats, behavior: str, asked: Asked) -> None:
        self.stats, self.name, self.cosine = stats, behavior, asked.cosine
        self.unit, self.y = stats.unit(behavior), stats.outcome(behavior)
        self.way = sign_of(behavior)  # of a rate that is more of the behavior
        self.best = stats.best_layer(behavior, asked.cosine, self.y)
        rows = stats.summary(asked.cosine, self.y).filter(behavior=behavior)
        if asked.source is not None:
            rows = rows.filter(source=asked.source)
        self.layers = rows["layer"].drop_nulls().unique().sort().to_list()
        self.layer = asked.layer if asked.layer is not None else self.best
        if self.layer is None and self.layers:
            self.layer = self.layers[0]
        self.rows = rows
        at = pl.col("layer").is_null() | (pl.col("layer") == (-1 if self.layer is None else self.layer))
        self.headline = rows.filter(at).rows(named=True)
        leaks = beyond.leaks(stats, behavior, self.layer, asked.cosine)
        self.leaks = leaks if asked.source is None else leaks.filter(source=asked.source)

    @property
    def several(self) -> bool:
        """Whether a source has several adapters here, which are then named in its place."""
        told = [row["source"] for row in self.headline]
        return len(set(told)) < len(told)

    def who(self, row: dict[str, Any]) -> str:
        return (row["adapter"] or row["source"]) if self.several else row["source"]

    def curves(self) -> list[dict[str, Any]]:
        """Per source and pooled: layers and ρ at each."""
        found = []
        for key, part in self.rows.group_by("adapter", "source", maintain_order=True):
            rho = dict(part.select("layer", "spearman").rows())
            row = {"adapter": key[0], "source": key[1], "layers": self.layers}
            found.append(row | {"spearman": [rho.get(layer) for layer in self.layers]})
        return found

    def told(self, top: int) -> dict[str, Any]:
        """Everything that is shown, at full precision."""
        return {
            "behavior": self.name,
            "unit": self.unit,
            "outcome": self.y,
            "cosine": self.cosine,
            "layer": self.layer,
            "best_layer": self.best,
            "headline": self.headline,
            "rho_by_layer": self.curves(),
            "leaks": [
                {"adapter": name, "of": part.height, "rows": part.head(top).to_dicts()}
                for (name,), part in self.leaks.group_by("adapter", maintain_order=True)
            ],
            "beyond": beyond.METHOD,
        }


def table(head: Sequence[str], body: Sequence[Sequence[Any]], title: str) -> None:
    """A table below its title, which is a line of its own: a narrow table would fold it."""
    click.echo(one_line(title))
    print_table(head, body)


def overview(run: ReadOnlyRun, asked: Asked, *, as_json: bool) -> None:
    """The whole run, or one behavior or source of it."""
    check_asked(run, asked)
    stats, note = glance(run)
    views = [View(stats, name, asked) for name in behaviors_of(stats, run, asked)]
    rows = across(stats) if asked.behavior is None else []
    if as_json:
        verdicts = stats.more.get("verdicts", pl.DataFrame()).to_dicts()
        print_json(
            about(run, stats, note)
            | {"verdicts": verdicts, "across": rows, "behaviors": [v.told(asked.top) for v in views]}
        )
        return
    say_first(stats, note)
    _verdicts(stats, asked)
    print_across(rows, asked.source)
    for view in views:
        _headline(view)
        _leaks(view, asked.top)
        _charts(view)
        click.echo()
    click.echo("More: --persona NAME, --completions 5 --hit, --behavior NAME, --source NAME, --json.")


def about(run: ReadOnlyRun, stats: Stats, note: str | None) -> dict[str, Any]:
    """What is told of any part of a run: where the tables are from, and what is not well."""
    return {
        "run": str(run.path),
        "tables": "kept" if note is None else "computed in memory",
        "note": note,
        "warnings": stats.warnings(),
        "remarks": stats.remarks(),
        "missing": list(stats.missing),
        "left_out": run.set_aside,
    }


def say_first(stats: Stats, note: str | None) -> None:
    """What is to be said before any number."""
    for sentence in stats.warnings():
        click.echo(one_line(sentence))
    said = [note] if note else []
    said += [f"{sentence}." for sentence in (*stats.remarks(), *stats.missing)]
    for sentence in said:
        click.echo(f"note: {one_line(sentence)}")


def check_asked(run: ReadOnlyRun, asked: Asked) -> None:
    """Raises InputError for a layer, behavior or source that the run cannot have, before its tables are read, or computed."""
    if asked.layer is not None:
        _check(run, "layer", asked.layer, layers_of(run))
    for what, given, known in (
        ("behavior", asked.behavior, named.behaviors_of),
        ("source", asked.source, named.sources_of),
    ):
        if given is not None and (there := known(run)) is not None:
            _check(run, what, given, there)


def behaviors_of(stats: Stats, run: ReadOnlyRun, asked: Asked) -> list[str]:
    """The behaviors that are shown. Raises InputError for a behavior, source or layer that the run does not have."""
    trained = stats.rates.filter(pl.col("role") != "base")
    known = {
        "behavior": (asked.behavior, stats.behaviors()),
        "source": (asked.source, trained["source"].drop_nulls().unique(maintain_order=True).to_list()),
        "layer": (asked.layer, stats.layers()),
    }
    for what, (given, there) in known.items():
        _check(run, what, given, there)
    return [asked.behavior] if asked.behavior is not None else stats.behaviors()


def _check(run: ReadOnlyRun, what: str, given: Any, there: Sequence[Any]) -> None:
    if given is not None and given not in there:
        close = did_you_mean(given, there) if isinstance(given, str) else ""
        raise InputError(
            f"show: the {what} {given!r} asked, but {run.path} has {', '.join(map(str, there)) or 'none'}.{close} "
            f"Name one of them, or leave --{what} out."
        )


def _verdicts(stats: Stats, asked: Asked) -> None:
    """A line for each claim that the study's rules decide."""
    if "verdicts" not in stats.more:
        return
    table = stats.more["verdicts"]
    if asked.behavior is not None:
        table = table.filter(behavior=asked.behavior)
    for (claim, behavior), part in table.group_by("claim", "behavior", maintain_order=True):
        found = dict.fromkeys(part["verdict"].drop_nulls())
        unwell = part["health_of"].drop_nulls().unique().to_list() if "health_of" in part.columns else []
        rests = f" (rests on adapters that are not ok: {', '.join(unwell)})" if unwell else ""
        click.echo(one_line(f"verdict: {claim}, {behavior}: {', '.join(found)}{rests}"))


def _headline(view: View) -> None:
    sign = amounts.sign_of(view.unit)
    where = "" if view.layer is None else f"; {view.cosine} cosine at layer {view.layer}"
    if view.layer is not None and view.layer == view.best and len(view.layers) > 1:
        where += f", the largest pooled |ρ| of {len(view.layers)}"
        if any(row["spearman_p_max"] is not None for row in view.headline):
            where += ": p (max) pays for the pick"
    y = "change against the unadapted model" if view.y == "delta" else "rate"
    head = [
        "source",
        f"source {sign}",
        f"mean bystander {sign}",
        f"most {sign}",
        "who",
        f"ρ with {view.y}",
        "p (max)",
    ]
    body = []
    for row in view.headline:
        low, high = row["spearman_both_low"], row["spearman_both_high"]
        if low is None:
            low, high = row["spearman_ci_low"], row["spearman_ci_high"]
        source = (row["source_rate"], row["source_ci_low"], row["source_ci_high"])
        mean = (row["mean_bystander"], row["mean_bystander_low"], row["mean_bystander_high"])
        body.append(
            [
                view.who(row),
                amounts.with_interval(*source, view.unit),
                amounts.with_interval(*mean, view.unit),
                amounts.amount(row["max_bystander"], view.unit),
                most(row),
                amounts.rho(row["spearman"], low, high),
                amounts.p_value(row["spearman_p_max"]),
                row["n"],
                row["health"],
            ]
        )
    table([*head, "N", "health"], body, f"{view.name}: {y} (95 % intervals){where}")
    for row in view.headline:
        if row["reason"]:
            click.echo(one_line(f"{view.who(row)}: no ρ: {row['reason']}."))


def _leaks(view: View, top: int) -> None:
    """The bystanders that show most of the behavior, and who lies farthest beyond its cosine."""
    rows, far = [], []
    for _, part in view.leaks.group_by("adapter", maintain_order=True):
        known = part.filter(pl.col("rate").is_not_null())
        rows += [[view.who(row), *_leak(view, row)] for row in known.head(top).rows(named=True)]
        most = (
            known.drop_nulls("beyond").sort(["beyond", "persona"], descending=[view.way > 0, False]).head(1)
        )
        far += [(view.who(row), row) for row in most.rows(named=True) if view.way * row["beyond"] > 0]
    if not rows:
        return
    click.echo()
    sign = amounts.sign_of(view.unit)
    head = ["source", "bystander", f"rate {sign}", "cosine", "its place", "beyond its cosine"]
    table(head, rows, f"{view.name}: the bystanders with the {'highest' if view.way > 0 else 'lowest'} rates")
    for who, row in far:
        click.echo(one_line(f"farthest beyond its cosine, {who}: {said_beyond(view, row)}"))
    if far:
        click.echo(f"{beyond.METHOD}.")


def _leak(view: View, row: dict[str, Any]) -> list[Any]:
    return [
        row["persona"],
        amounts.with_interval(row["rate"], row["low"], row["high"], view.unit),
        amounts.rho(row["cosine"]),
        place(row),
        amounts.amount(row["beyond"], view.unit, "+.1f"),
    ]


def place(row: dict[str, Any]) -> str | None:
    return None if row["place"] is None else f"{row['place']} of {row['of']}"


def said_beyond(view: View, row: dict[str, Any]) -> str:
    points = " pp" if view.unit == "share" else ""
    rate = amounts.with_interval(row["rate"], row["low"], row["high"], view.unit)
    side, back = ("above", "down") if view.way > 0 else ("below", "up")
    whole = f"its whole interval lies {side}" if row["above"] else f"its interval reaches {back} to it"
    return (
        f"{row['persona']}, {rate} where its cosine ({row['cosine']:+.2f}) gives "
        f"{amounts.amount(row['expected'], view.unit)}: {amounts.amount(row['beyond'], view.unit, '+.1f')}{points}; {whole}."
    )


def _charts(view: View) -> None:
    """ρ over the layers, and the bystanders' rates from the highest to the lowest, as bars."""
    curves = [curve for curve in view.curves() if any(rho is not None for rho in curve["spearman"])]
    if len(view.layers) > 1 and curves:
        known = [rho for curve in curves for rho in curve["spearman"] if rho is not None]
        low, high = min(0.0, *known), max(0.0, *known)
        rows = [
            [view.who(c), amounts.bars(c["spearman"], low, high), *map(amounts.rho, _ends(c["spearman"]))]
            for c in curves
        ]
        click.echo()
        title = f"ρ over layers {view.layers[0]} to {view.layers[-1]} ({view.cosine} cosine), bars from {low:+.2f} to {high:+.2f}"
        table(["source", "ρ", "lowest", "highest"], rows, title)
    rows = []
    top = view.leaks["rate"].max()
    for _, part in view.leaks.group_by("adapter", maintain_order=True):
        rates = part["rate"].drop_nulls().sort(descending=True).to_list()
        if rates:
            ends = [amounts.amount(one, view.unit) for one in (min(rates), max(rates))]
            rows.append(
                [
                    view.who(part.row(0, named=True)),
                    amounts.bars(amounts.binned(rates, _WIDTH), 0.0, top),
                    *ends,
                ]
            )
    if rows and top:
        click.echo()
        title = f"bystanders' rates from the highest to the lowest, bars from 0 to {amounts.amount(top, view.unit)}"
        table(["source", "rates", "lowest", "highest"], rows, f"{title} ({amounts.sign_of(view.unit)})")


def _ends(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return min(known), max(known)
