"""What `leakfast show RUN --persona NAME` prints: one persona's prompt, its rate under every adapter, its cosines and
neighbours, the health of its replies. Demands a run that is only read; leaves the whole run to `cli.glance`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import polars as pl

from leakfast.cli import amounts
from leakfast.cli.glance import (
    Asked,
    View,
    about,
    behaviors_of,
    check_asked,
    place,
    said_beyond,
    say_first,
    table,
)
from leakfast.cli.text import print_json
from leakfast.errors import InputError
from leakfast.inert import one_line
from leakfast.stats import beyond
from leakfast.stats.glance import glance
from leakfast.stats.rates import BASE
from leakfast.stats.summary import rate_interval
from leakfast.storage.documents import did_you_mean

if TYPE_CHECKING:
    from leakfast.stats.tables import Stats
    from leakfast.storage.reading import ReadOnlyRun

_NEAREST = 8
_RATES = ["behavior", "adapter", "source", "seed", "role", "hits", "total", "rate", "low", "high", "delta"]
_HEALTH = ["behavior", "adapter", "n", "empty_share", "truncated_share", "repeated_share", "length_ratio"]
_HEALTH += ["health", "reason"]


def persona_view(run: ReadOnlyRun, name: str, asked: Asked, *, as_json: bool) -> None:
    """Everything of one persona. Raises InputError for one that was not measured."""
    from leakfast.stats.people import read_people

    check_asked(run, asked)
    stats, note = glance(run)
    behaviors = behaviors_of(stats, run, asked)
    known = stats.rates["persona"].unique().sort().to_list()
    if name not in known:
        raise InputError(
            f"show: persona {name!r} asked, but {run.path} has none of that name among its {len(known)}."
            f"{did_you_mean(name, known)} See them with: leakfast stats {run.path} --table rates"
        )
    people, _ = read_people(run)
    views = {behavior: View(stats, behavior, asked) for behavior in behaviors}
    rows = [row for view in views.values() for row in _rates_of(view, name, asked)]
    layer = next((view.layer for view in views.values() if view.layer is not None), None)
    near, why = _neighbours(run, name, layer, asked.cosine)
    health = _health_of(stats, name, behaviors)
    who = {"persona": name, "category": people.categories.get(name), "prompt": people.prompts.get(name)}
    if as_json:
        told = {"rates": rows, "beyond": beyond.METHOD, "layer": layer, "cosine": asked.cosine}
        print_json(
            about(run, stats, note) | who | told | {"nearest": near, "no_nearest": why, "health": health}
        )
        return
    say_first(stats, note)
    click.echo(one_line(f"{name}, {who['category'] or 'no category'}"))
    click.echo(f"prompt: {one_line(who['prompt'] or _no_prompt(name))}")
    _print_rates(views, rows)
    if near:
        click.echo()
        title = f"nearest personas, {asked.cosine} cosine at layer {layer} of the unadapted model"
        table(["persona", "cosine"], [[one["persona"], amounts.rho(one["cosine"])] for one in near], title)
    else:
        click.echo(f"nearest personas: {why}.")
    if health:
        click.echo()
        body = [[_rounded(row[column]) for column in _HEALTH] for row in health]
        table(_HEALTH, body, f"health of the replies under {name}")


def _rates_of(view: View, name: str, asked: Asked) -> list[dict[str, Any]]:
    """The persona's rate under each adapter and the unadapted model, its cosine and place, and how far beyond it lies."""
    mine = view.stats.rates.filter(persona=name, behavior=view.name)
    if asked.source is not None:
        mine = mine.filter((pl.col("source") == asked.source) | (pl.col("adapter") == BASE))
    mine = mine.with_columns(side.alias(end) for end, side in rate_interval(mine).items())
    found = {row["adapter"]: row for row in view.leaks.filter(persona=name).rows(named=True)}
    rows = []
    for row in mine.select(_RATES).rows(named=True):
        leak = found.get(row["adapter"], {})
        row |= {
            column: leak.get(column) for column in ("cosine", "place", "of", "expected", "beyond", "above")
        }
        rows.append(row | {"layer": view.layer, "unit": view.unit})
    return rows


def _print_rates(views: dict[str, View], rows: list[dict[str, Any]]) -> None:
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
                place(row),
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
        table(head, body, f"{behavior}: its rate under each adapter{at}")
        bystander = [row for row in mine if row["beyond"] is not None]
        for row in sorted(bystander, key=lambda row: -view.way * row["beyond"])[:1]:
            if view.way * row["beyond"] > 0:
                said = said_beyond(view, row | {"persona": f"under {row['adapter']}"})
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
