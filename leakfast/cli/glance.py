"""What `leakfast show` prints of a run's tables: warnings, verdicts, headline, leaks and little charts; or one persona.
Demands a run that is only read; computes nothing beside what `stats` gives, and rounds here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import polars as pl

from leakfast.cli import amounts
from leakfast.cli.text import one_line, print_json, print_table
from leakfast.errors import InputError
from leakfast.stats import beyond
from leakfast.stats.glance import glance
from leakfast.stats.rates import BASE
from leakfast.stats.summary import rate_interval
from leakfast.storage.documents import did_you_mean

if TYPE_CHECKING:
    from leakfast.stats.tables import Stats
    from leakfast.storage.reading import ReadOnlyRun

_WIDTH = 40  # bars of a chart
_NEAREST = 8
_HEALTH = ["behavior", "adapter", "n", "empty_share", "truncated_share", "repeated_share", "length_ratio"]
_HEALTH += ["health", "reason"]


@dataclass(frozen=True)
class Asked:
    """Which part of a run is shown. layer None: each behavior's best; top: bystanders for each source."""

    behavior: str | None = None
    source: str | None = None
    layer: int | None = None
    cosine: str = "centered"
    top: int = 5


class _View:
    """One behavior of a run at one layer."""

    def __init__(self, stats: Stats, behavior: str, asked: Asked) -> None:
        self.stats, self.name, self.cosine = stats, behavior, asked.cosine
        self.unit, self.y = stats.unit(behavior), stats.outcome(behavior)
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


def overview(run: ReadOnlyRun, asked: Asked, *, as_json: bool) -> None:
    """The whole run, or one behavior or source of it."""
    stats, note = glance(run)
    views = [_View(stats, name, asked) for name in _behaviors(stats, run, asked)]
    if as_json:
        verdicts = stats.more.get("verdicts", pl.DataFrame()).to_dicts()
        print_json(
            _about(run, stats, note) | {"verdicts": verdicts, "behaviors": [v.told(asked.top) for v in views]}
        )
        return
    _open(stats, note)
    _verdicts(stats, asked)
    for view in views:
        _headline(view)
        _leaks(view, asked.top)
        _charts(view)
        click.echo()
    click.echo("More: --persona NAME, --completions 5 --hit, --behavior NAME, --source NAME, --json.")


def _about(run: ReadOnlyRun, stats: Stats, note: str | None) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "tables": "kept" if note is None else "computed in memory",
        "note": note,
        "warnings": stats.warnings(),
        "remarks": stats.remarks(),
        "missing": list(stats.missing),
        "left_out": run.set_aside,
    }


def _open(stats: Stats, note: str | None) -> None:
    """What is to be said before any number."""
    for sentence in stats.warnings():
        click.echo(one_line(sentence))
    said = [note] if note else []
    said += [f"{sentence}." for sentence in (*stats.remarks(), *stats.missing)]
    for sentence in said:
        click.echo(f"note: {one_line(sentence)}")


def _behaviors(stats: Stats, run: ReadOnlyRun, asked: Asked) -> list[str]:
    """The behaviors that are shown. Raises InputError for a behavior, source or layer that the run does not have."""
    trained = stats.rates.filter(pl.col("role") != "base")
    known = {
        "behavior": (asked.behavior, stats.behaviors()),
        "source": (asked.source, trained["source"].drop_nulls().unique(maintain_order=True).to_list()),
        "layer": (asked.layer, stats.layers()),
    }
    for what, (given, there) in known.items():
        if given is not None and given not in there:
            close = did_you_mean(given, there) if isinstance(given, str) else ""
            raise InputError(
                f"show: the {what} {given!r} asked, but {run.path} has {', '.join(map(str, there)) or 'none'}.{close} "
                f"Name one of them, or leave --{what} out."
            )
    return [asked.behavior] if asked.behavior is not None else stats.behaviors()


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


def _headline(view: _View) -> None:
    sign = amounts.sign_of(view.unit)
    where = "" if view.layer is None else f"; {view.cosine} cosine at layer {view.layer}"
    if view.layer is not None and view.layer == view.best and len(view.layers) > 1:
        where += f", the largest pooled |ρ| of {len(view.layers)}: p (max) pays for the pick"
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
                row["max_persona"],
                amounts.rho(row["spearman"], low, high),
                amounts.p_value(row["spearman_p_max"]),
                row["n"],
                row["health"],
            ]
        )
    print_table([*head, "N", "health"], body, title=f"{view.name}: {y} (95 % intervals){where}")
    for row in view.headline:
        if row["reason"]:
            click.echo(one_line(f"{view.who(row)}: no ρ: {row['reason']}."))


def _leaks(view: _View, top: int) -> None:
    """The bystanders with the highest rates, and who lies farthest above its cosine."""
    rows, far = [], []
    for _, part in view.leaks.group_by("adapter", maintain_order=True):
        known = part.filter(pl.col("rate").is_not_null())
        rows += [[view.who(row), *_leak(view, row)] for row in known.head(top).rows(named=True)]
        most = known.drop_nulls("beyond").sort(["beyond", "persona"], descending=[True, False]).head(1)
        far += [(view.who(row), row) for row in most.rows(named=True) if row["beyond"] > 0]
    if not rows:
        return
    click.echo()
    sign = amounts.sign_of(view.unit)
    head = ["source", "bystander", f"rate {sign}", "cosine", "its place", "beyond its cosine"]
    print_table(head, rows, title=f"{view.name}: the bystanders with the highest rates")
    for who, row in far:
        click.echo(one_line(f"farthest beyond its cosine, {who}: {_said_beyond(view, row)}"))
    if far:
        click.echo(f"{beyond.METHOD}.")


def _leak(view: _View, row: dict[str, Any]) -> list[Any]:
    return [
        row["persona"],
        amounts.with_interval(row["rate"], row["low"], row["high"], view.unit),
        amounts.rho(row["cosine"]),
        _place(row),
        amounts.amount(row["beyond"], view.unit, "+.1f"),
    ]


def _place(row: dict[str, Any]) -> str | None:
    return None if row["place"] is None else f"{row['place']} of {row['of']}"


def _said_beyond(view: _View, row: dict[str, Any]) -> str:
    points = " pp" if view.unit == "share" else ""
    rate = amounts.with_interval(row["rate"], row["low"], row["high"], view.unit)
    whole = "its whole interval lies above" if row["above"] else "its interval reaches down to it"
    return (
        f"{row['persona']}, {rate} where its cosine ({row['cosine']:+.2f}) gives "
        f"{amounts.amount(row['expected'], view.unit)}: {amounts.amount(row['beyond'], view.unit, '+.1f')}{points}; {whole}."
    )


def _charts(view: _View) -> None:
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
        print_table(["source", "ρ", "lowest", "highest"], rows, title=title)
    rows = []
    top = view.leaks["rate"].max()
    for _, part in view.leaks.group_by("adapter", maintain_order=True):
        rates = part["rate"].drop_nulls().to_list()
        if rates:
            ends = [amounts.amount(one, view.unit) for one in (rates[-1], rates[0])]
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
        print_table(
            ["source", "rates", "lowest", "highest"], rows, title=f"{title} ({amounts.sign_of(view.unit)})"
        )


def _ends(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    return min(known), max(known)


def persona_view(run: ReadOnlyRun, name: str, asked: Asked, *, as_json: bool) -> None:
    """Everything of one persona. Raises InputError for one that was not measured."""
    from leakfast.stats.collect import read_people

    stats, note = glance(run)
    behaviors = _behaviors(stats, run, asked)
    known = stats.rates["persona"].unique().sort().to_list()
    if name not in known:
        raise InputError(
            f"show: persona {name!r} asked, but {run.path} has none of that name among its {len(known)}."
            f"{did_you_mean(name, known)} See them with: leakfast show {run.path} --json"
        )
    people, _ = read_people(run)
    views = {behavior: _View(stats, behavior, asked) for behavior in behaviors}
    rows = [row for view in views.values() for row in _rates_of(view, name, asked)]
    layer = next((view.layer for view in views.values() if view.layer is not None), None)
    near, why = _neighbours(run, name, layer, asked.cosine)
    health = _health_of(stats, name, behaviors)
    about = {"persona": name, "category": people.categories.get(name), "prompt": people.prompts.get(name)}
    if as_json:
        told = {"rates": rows, "beyond": beyond.METHOD, "layer": layer, "cosine": asked.cosine}
        print_json(
            _about(run, stats, note) | about | told | {"nearest": near, "no_nearest": why, "health": health}
        )
        return
    _open(stats, note)
    click.echo(one_line(f"{name}, {about['category'] or 'no category'}"))
    click.echo(f"prompt: {one_line(about['prompt'] or _no_prompt(name))}")
    _print_rates(views, rows)
    if near:
        click.echo()
        title = f"nearest personas, {asked.cosine} cosine at layer {layer} of the unadapted model"
        print_table(
            ["persona", "cosine"], [[one["persona"], amounts.rho(one["cosine"])] for one in near], title=title
        )
    else:
        click.echo(f"nearest personas: {why}.")
    if health:
        click.echo()
        body = [[_rounded(row[column]) for column in _HEALTH] for row in health]
        print_table(_HEALTH, body, title=f"health of the replies under {name}")


def _rates_of(view: _View, name: str, asked: Asked) -> list[dict[str, Any]]:
    """The persona's rate under each adapter and the unadapted model, its cosine and place, and how far beyond it lies."""
    mine = view.stats.rates.filter(persona=name, behavior=view.name)
    if asked.source is not None:
        mine = mine.filter((pl.col("source") == asked.source) | (pl.col("adapter") == BASE))
    mine = mine.with_columns(side.alias(end) for end, side in rate_interval(mine).items())
    found = {row["adapter"]: row for row in view.leaks.filter(persona=name).rows(named=True)}
    rows = []
    columns = [
        "behavior",
        "adapter",
        "source",
        "seed",
        "role",
        "hits",
        "total",
        "rate",
        "low",
        "high",
        "delta",
    ]
    for row in mine.select(*columns).rows(named=True):
        leak = found.get(row["adapter"], {})
        row |= {
            column: leak.get(column) for column in ("cosine", "place", "of", "expected", "beyond", "above")
        }
        rows.append(row | {"layer": view.layer, "unit": view.unit})
    return rows


def _print_rates(views: dict[str, _View], rows: list[dict[str, Any]]) -> None:
    for behavior, view in views.items():
        mine = [row for row in rows if row["behavior"] == behavior]
        if not mine:
            continue
        click.echo()
        body = [
            [
                row["adapter"],
                row["role"],
                amounts.with_interval(row["rate"], row["low"], row["high"], view.unit),
                row["total"],
                amounts.amount(row["delta"], view.unit, "+.1f"),
                amounts.rho(row["cosine"]),
                _place(row),
                amounts.amount(row["expected"], view.unit),
                amounts.amount(row["beyond"], view.unit, "+.1f"),
            ]
            for row in mine
        ]
        sign = amounts.sign_of(view.unit)
        head = [
            "adapter",
            "it is",
            f"rate {sign}",
            "of",
            "Δ",
            "cosine to source",
            "its place",
            "cosine gives",
            "beyond",
        ]
        at = "" if view.layer is None else f" ({view.cosine} cosine at layer {view.layer})"
        print_table(head, body, title=f"{behavior}: its rate under each adapter{at}")
        bystander = [row for row in mine if row["beyond"] is not None]
        for row in sorted(bystander, key=lambda row: -row["beyond"])[:1]:
            if row["beyond"] > 0:
                said = _said_beyond(view, row | {"persona": f"under {row['adapter']}"})
                click.echo(one_line(f"farthest beyond its cosine: {said}"))
                click.echo(f"{beyond.METHOD}.")


def _neighbours(
    run: ReadOnlyRun, name: str, layer: int | None, cosine: str
) -> tuple[list[dict[str, Any]], str | None]:
    """The nearest personas in the base model's geometry, or why there are none."""
    import numpy as np

    from leakfast.geometry import Centroids
    from leakfast.storage import layout

    path = run.path / layout.centroids()
    if not path.is_file():
        return [], f"the run has no {layout.centroids()}"
    centroids = Centroids.load(path)
    layer = centroids.layers[0] if layer is None else layer
    if name not in centroids.personas:
        return [], f"{layout.centroids()} has no centroid of it"
    if cosine == "centered" and len(centroids.metadata["centered_on"]) < 2:
        return [], "a centered cosine needs two personas in the mean; give --cosine raw"
    row = centroids.cosine(layer, "raw" if cosine == "raw" else "centered")[centroids.personas.index(name)]
    order = [
        i for i in np.argsort(-row, kind="stable") if np.isfinite(row[i]) and centroids.personas[i] != name
    ]
    near = [{"persona": centroids.personas[i], "cosine": float(row[i])} for i in order[:_NEAREST]]
    return near, None if near else "its centroid has no direction"


def _health_of(stats: Stats, name: str, behaviors: list[str]) -> list[dict[str, Any]]:
    if stats.health is None:
        return []
    mine = stats.health.filter(pl.col("behavior").is_in(behaviors), persona=name)
    return mine.select(_HEALTH).rows(named=True)


def _no_prompt(name: str) -> str:
    known = {"no_persona": "none: no system message", "qwen_default": "what the chat template says by itself"}
    return known.get(name, "not known to this run")


def _rounded(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value
